"""Class-conditional latent models of diffusers: a diffusion transformer and its autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from lightning_mem.diffusion import Denoiser
from lightning_mem.modules.latent_parts import LatentParts, class_of, load_codec, part_classes, read_index
from lightning_mem.networks import DiTDenoiser
from lightning_mem.types import Prediction


@dataclass(frozen=True)
class ClassToImageParts(LatentParts):
    """What a diffusion transformer works with.

    Args:
        classes: Its number of labels; one more stands for none.
    """

    classes: int = 1000
    component = "transformer"
    network_class = DiTTransformer2DModel

    @property
    def num_classes(self) -> int:
        """Its number of labels."""
        return self.classes

    def _identity(self) -> Sequence[Any]:
        return [self.classes]

    def denoiser(self, network: Any, prediction: Prediction, cfg_weight: float) -> Denoiser:
        """Guided by its own label."""
        return DiTDenoiser(network, prediction, self.classes, cfg_weight)

    def _check(self, name: str, config: Any) -> None:
        if not isinstance(config.sample_size, int) or config.out_channels not in (
            config.in_channels,
            2 * config.in_channels,
        ):
            shown = {key: config.get(key) for key in ("sample_size", "in_channels", "out_channels")}
            raise ValueError(f"{name} has a transformer that is not a class-conditional DiT: it says {shown}")


def is_class_to_image(path: str | Path) -> bool:
    """Whether a diffusers folder or hub id holds a class-conditional diffusion transformer."""
    return class_of(read_index(path), "transformer") == DiTTransformer2DModel.__name__


def load_class_parts(path: str | Path, device: torch.device | str = "cpu") -> ClassToImageParts:
    """Autoencoder and number of labels of a DiT pipeline, in float32.

    Raises:
        ValueError: If a part is missing or is of another class (named).
    """
    part_classes(path, {"vae": "AutoencoderKL", "transformer": DiTTransformer2DModel.__name__})
    config = DiTTransformer2DModel.load_config(str(path), subfolder="transformer")
    return ClassToImageParts(load_codec(path, device), int(config["num_embeds_ada_norm"]))
