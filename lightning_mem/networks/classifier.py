"""Thin builder over timm's ResNets, and the one module by which such a network knows the timestep."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import timm
import torch
import torch.distributed as dist
from diffusers.models.embeddings import get_timestep_embedding
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

Norm = Literal["batch", "group"]
Stem = Literal["large", "small"]
Activation = Literal["relu", "silu", "gelu"]

SMALL = "small"
"""Name of the backbone that is built from ``widths`` and ``blocks``."""

LARGE_IMAGE = 64
"""Side in pixels from which the defaults are those of ImageNet's networks."""


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the classifier; what is not named here goes into ``extra``.

    Args:
        backbone: A ResNet of timm by its name (``resnet18``, ``resnet34``, ``resnet50`` ...), or ``small``, a ResNet of
            the ``widths`` and ``blocks`` below. null: ``resnet34`` at 64 pixels and above, ``small`` below.
        stem: ``large`` is timm's, which divides the side by 4; ``small`` is one 3 x 3 convolution of stride 1 without
            pooling. null: ``large`` at 64 pixels and above, ``small`` below.
        widths: Of ``small`` only: channels of each level; each further level halves the resolution.
        blocks: Of ``small`` only: residual blocks of each level.
        norm: ``batch`` as in the paper, its statistics over the *global* batch of all processes; ``group`` for batches
            too small for statistics.
        norm_num_groups: Of ``group`` only: groups of the group norms; divides every width.
        activation: ``relu`` as in the paper; ``silu`` and ``gelu`` are smooth, and so is the gradient of what they make
            in x_t, by which guidance goes. null: ``silu`` for ``small``, else ``relu``.
        time_channels: Width of the sinusoidal embedding of t; even, at least 4.
        dropout: In [0, 1), before the last layer.
        extra: Any other argument of timm's ResNet, e.g. ``pretrained: true``.
    """

    backbone: str | None = None
    stem: Stem | None = None
    widths: tuple[int, ...] = (32, 64)
    blocks: tuple[int, ...] = (1, 1)
    norm: Norm = "batch"
    norm_num_groups: int = 8
    activation: Activation | None = None
    time_channels: int = 128
    dropout: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (
            not 1 <= len(self.widths) <= 4
            or len(self.blocks) != len(self.widths)
            or min(*self.widths, *self.blocks) < 1
        ):
            raise ValueError(
                "widths and blocks need one positive entry for each of 1 to 4 levels, "
                f"got {list(self.widths)} and {list(self.blocks)}"
            )
        if sum(self.blocks) < 2:
            raise ValueError(
                f"blocks must come to at least 2 (timm spreads them over a depth), got {list(self.blocks)}"
            )
        if self.widths[0] % 2:
            raise ValueError(f"the first of widths must be even, got {self.widths[0]}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.time_channels < 4 or self.time_channels % 2:
            raise ValueError(f"time_channels must be even and at least 4, got {self.time_channels}")

    def resolved(self, image_size: int) -> "ClassifierConfig":
        """Itself with the nulls replaced by what they mean at this image size."""
        large = image_size >= LARGE_IMAGE
        backbone = self.backbone or ("resnet34" if large else SMALL)
        stem = self.stem or ("large" if large else "small")
        activation = self.activation or ("silu" if backbone == SMALL else "relu")
        return replace(self, backbone=backbone, stem=stem, activation=activation)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClassifierConfig":
        """The settings that :meth:`to_dict` wrote."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


class TimeModulation(nn.Module):
    r"""FiLM by the timestep: :math:`h \mapsto (1 + s(t)) \odot h + b(t)`, one scale and shift a channel.

    (s, b) is a linear map of SiLU(GroupNorm(sinusoidal embedding of t)). That map starts at zero, so that the network
    starts as the plain one, whatever t is.

    Args:
        channels: Of h.
        time_channels: Width of the embedding.

    Source:
        SIDE, arXiv:2410.02467v7, figure 9; FiLM: Perez et al., arXiv:1709.07871.
    """

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.time_channels = time_channels
        self.norm = nn.GroupNorm(1, time_channels)  # more groups would divide coarse time, the slow waves, away
        self.act = nn.SiLU()
        self.linear = nn.Linear(time_channels, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Features [B, C, H, W] at training timesteps t int64 [B]."""
        embedding = get_timestep_embedding(t, self.time_channels).to(self.linear.weight.dtype)
        scale, shift = self.linear(self.act(self.norm(embedding)))[:, :, None, None].chunk(2, dim=1)
        return (1 + scale) * h + shift


class TimedNorm(nn.Module):
    """A normalisation followed by the modulation of the timestep that the network was called with."""

    def __init__(self, norm: nn.Module, modulation: TimeModulation) -> None:
        super().__init__()
        self.norm, self.modulation = norm, modulation
        self.t: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Normalised and modulated features [B, C, H, W]."""
        if self.t is None:
            raise ValueError("the timestep is not known here: call the whole classifier with (x_t, t)")
        return self.modulation(self.norm(h), self.t)


class _SumOverProcesses(torch.autograd.Function):
    """Sum over all processes, of values forward and of gradients backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d whose training statistics are those of the global batch, on any device.

    One process: torch's own. Several: the same numbers that one process would have seen, up to rounding; torch's
    SyncBatchNorm does this on GPUs only. Every process must have the same number of rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features [B, C, H, W]."""
        shared = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared:
            return super().forward(x)
        wide = x.float()
        count = wide.numel() // wide.size(1) * dist.get_world_size()
        mean = _SumOverProcesses.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), var.detach() * count / (count - 1))
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics, as torch's own does."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var, rate)


def _first_block(backbone: ResNet) -> Any:
    return backbone.get_submodule("layer1.0")


class TimeClassifier(nn.Module):
    """A ResNet that is called with (x_t, t); :class:`TimedNorm` is after the first norm of its first residual block.

    Args:
        backbone: timm's ResNet.
        time_channels: Width of the embedding of t; null for a network that ignores t.
    """

    def __init__(self, backbone: ResNet, time_channels: int | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.time_dependent = time_channels is not None
        if time_channels is not None:
            block = _first_block(backbone)
            block.bn1 = TimedNorm(block.bn1, TimeModulation(block.conv1.out_channels, time_channels))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits [B, num_classes] of x_t [B, C, H, W] at training timesteps t int64 [B]."""
        if not self.time_dependent:
            return self.backbone(x_t)
        timed = _first_block(self.backbone).bn1
        timed.t = t
        try:
            return self.backbone(x_t)
        finally:
            timed.t = None


def build_classifier(
    config: ClassifierConfig, image_size: int, channels: int, num_classes: int, time_dependent: bool = True
) -> TimeClassifier:
    """A classifier of square images at a timestep.

    The place of its one time module, after the first normalisation of the first residual block and before the
    activation, is that of SIDE ("a singular point"; whether they mean one block or one place a block is not published).

    Args:
        config: Its settings.
        image_size: Side in pixels, at least the factor by which the network shrinks it.
        channels: Of the images.
        num_classes: At least 2.
        time_dependent: False leaves the time module out: the standard classifier, which ignores t.

    Raises:
        ValueError: If the backbone is no ResNet of timm, a number is out of range, or the image is too small.
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs num_classes of at least 2, got {num_classes}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    config = config.resolved(image_size)
    levels = len(config.widths) if config.backbone == SMALL else 4
    shrink = 2 ** (levels - 1) * (4 if config.stem == "large" else 1)
    if image_size < shrink:
        raise ValueError(
            f"image_size must be at least {shrink} for {config.backbone} with a {config.stem} stem, got {image_size}: "
            "use stem small, or backbone small with fewer widths"
        )
    options = {
        "in_chans": channels, "num_classes": num_classes, "drop_rate": config.dropout, "norm_layer": GlobalBatchNorm2d,
        "act_layer": config.activation, **config.extra,
    }  # fmt: skip
    backbone = _small(config, **options) if config.backbone == SMALL else _by_name(str(config.backbone), **options)
    if config.stem == "small":
        stem = nn.Conv2d(channels, _first_block(backbone).conv1.in_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        backbone.add_module("conv1", stem)
        backbone.add_module("maxpool", nn.Identity())
    if config.norm == "group":
        _use_groups(backbone, config.norm_num_groups)
    return TimeClassifier(backbone, config.time_channels if time_dependent else None)


def _use_groups(module: nn.Module, num_groups: int) -> None:
    """Put a group norm of the same scale and shift in the place of each batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if child.num_features % num_groups:
                raise ValueError(f"norm_num_groups ({num_groups}) must divide every width, not {child.num_features}")
            norm = nn.GroupNorm(num_groups, child.num_features, child.eps)
            norm.load_state_dict({"weight": child.weight, "bias": child.bias})
            setattr(module, name, norm)
        else:
            _use_groups(child, num_groups)


def _by_name(name: str, **options: Any) -> ResNet:
    known = timm.list_models("*resnet*", module="resnet")
    if name.split(".")[0] not in known:
        near = [k for k in known if k.startswith(name[:7])][:8] or ["resnet18", "resnet34", "resnet50"]
        raise ValueError(f"backbone must be {SMALL} or a ResNet of timm ({', '.join(near)} ...), got {name!r}")
    return cast(ResNet, timm.create_model(name, **options))


def _small(config: ClassifierConfig, **options: Any) -> ResNet:
    """A ResNet of a few narrow levels; timm's always calls four."""
    options.pop("pretrained", None)
    options |= {"stem_type": "deep", "stem_width": config.widths[0] // 2}  # a deep stem ends in twice its width
    backbone = ResNet(BasicBlock, config.blocks, channels=config.widths, **options)  # type: ignore[arg-type]
    for level in range(len(config.widths) + 1, 5):
        setattr(backbone, f"layer{level}", nn.Identity())
    return backbone
