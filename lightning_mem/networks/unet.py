"""Thin builder over diffusers' UNet2DModel, and the call by which it becomes a Denoiser."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lightning_mem.diffusion.target import Condition
from lightning_mem.types import Prediction


@dataclass(frozen=True)
class UNetConfig:
    """Settings of the UNet; what is not named here goes into ``extra``.

    Args:
        block_out_channels: Channels of each resolution level; each further level halves the resolution.
        layers_per_block: Residual blocks of a level.
        attention_levels: Levels with self-attention, 0 the finest; null for none.
        mid_attention: Self-attention in the middle block.
        attention_head_dim: Channels of an attention head.
        dropout: In [0, 1), of the residual blocks.
        norm_num_groups: Groups of the group norms; divides every entry of block_out_channels.
        extra: Any other argument of diffusers' UNet2DModel.
    """

    block_out_channels: tuple[int, ...] = (32, 32)
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] | None = None
    mid_attention: bool = True
    attention_head_dim: int = 8
    dropout: float = 0.0
    norm_num_groups: int = 8
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise ValueError("block_out_channels needs at least one level")
        uneven = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if uneven:
            raise ValueError(f"norm_num_groups ({self.norm_num_groups}) must divide every channel count, not {uneven}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        wrong = [level for level in self.attention_levels or () if not 0 <= level < len(self.block_out_channels)]
        if wrong:
            raise ValueError(f"attention_levels must lie in [0, {len(self.block_out_channels)}), got {wrong}")


def build_unet(config: UNetConfig, image_size: int, channels: int, num_classes: int | None = None) -> UNet2DModel:
    """A UNet2DModel for square images.

    Args:
        config: Its settings.
        image_size: Side in pixels; divisible by 2 ** (levels - 1).
        channels: Of the images, in and out.
        num_classes: Number of labels it is conditioned on; null for none.

    Raises:
        ValueError: If the size cannot be halved as often as there are levels.
    """
    levels = len(config.block_out_channels)
    if image_size % 2 ** (levels - 1):
        raise ValueError(
            f"image_size must be divisible by {2 ** (levels - 1)} for {levels} levels, got {image_size}: "
            "use fewer entries in block_out_channels"
        )
    attention = set(config.attention_levels or ())
    down = tuple("AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(levels))
    up = tuple("AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(levels)))
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        add_attention=config.mid_attention,
        attention_head_dim=config.attention_head_dim,
        dropout=config.dropout,
        norm_num_groups=config.norm_num_groups,
        num_class_embeds=num_classes,
        **config.extra,
    )


class UNetDenoiser:
    """A diffusers UNet as a :class:`~lightning_mem.diffusion.Denoiser`.

    Args:
        module: UNet2DModel, or UNet2DConditionModel with a mapping as condition.
        prediction: What it outputs.
    """

    def __init__(self, module: nn.Module, prediction: Prediction) -> None:
        self.module = module
        self.prediction = prediction

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The network's own output; labels go to its class embedding, a mapping to its arguments of those names."""
        if condition is None:
            return self.module(x_t, t).sample
        if isinstance(condition, torch.Tensor):
            return self.module(x_t, t, class_labels=condition).sample
        return self.module(x_t, t, **condition).sample
