"""What a latent network works with beside itself, whatever it is conditioned on."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from huggingface_hub import hf_hub_download, model_info
from torch import Tensor

from lightning_mem.diffusion import Denoiser, DiffusionProcess, LatentCodec, Target
from lightning_mem.records import digest
from lightning_mem.types import Prediction, Weights

INDEX = "model_index.json"
"""The file of a diffusers pipeline that names its parts."""


@dataclass(frozen=True)
class LatentParts(ABC):
    """The parts of a latent pipeline that stay as they are; frozen, so that copies of whatever holds them share them.

    Args:
        codec: Between latents and pixels.
    """

    codec: LatentCodec
    component: ClassVar[str]
    network_class: ClassVar[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentParts":
        return self

    @property
    def num_classes(self) -> int | None:
        """Number of labels the network is conditioned on; null for none."""
        return None

    @property
    def prompts(self) -> Callable[[Sequence[str]], Mapping[str, Tensor]] | None:
        """Makes conditions of prompts; null where the model knows none."""
        return None

    @cached_property
    def digest(self) -> str:
        """Identity: equal digests mean equal latents and equal ways to condition."""
        return digest(self.codec.digest, *self._identity())

    @abstractmethod
    def _identity(self) -> Sequence[Any]:
        """What beside the codec decides a sample."""

    @abstractmethod
    def denoiser(self, network: Any, prediction: Prediction, cfg_weight: float) -> Denoiser:
        """The call of a network with these parts."""

    def load_network(self, path: str | Path) -> tuple[Any, DiffusionProcess]:
        """Network and process of the pipeline at a path.

        Raises:
            ValueError: If the network is not square, or asks for more than its kind is given here.
        """
        name, scheduler = str(path), part_classes(path, {"scheduler": None})["scheduler"]
        network = self.network_class.from_pretrained(name, subfolder=self.component, use_safetensors=True)
        self._check(name, network.config)
        schedule = DDIMScheduler.load_config(name, subfolder="scheduler")
        # latents are not clipped; schedulers that know no clipping do not say so, and others read that as "clip"
        return network, DiffusionProcess.from_config({"clip_sample": False, **schedule, "_class_name": scheduler})

    @abstractmethod
    def _check(self, name: str, config: Any) -> None:
        """Refuse a network of another kind."""

    def target(
        self,
        network: Any,
        process: DiffusionProcess,
        weights: Weights = "raw",
        device: torch.device | str = "cpu",
        cfg_weight: float = 1.0,
        identified: bool = True,
    ) -> Target:
        """The target of a network with these parts; ``identified`` computes its digest."""
        values = [value for _, value in sorted(network.state_dict().items())] if identified else []
        size = network.config.sample_size
        return Target(
            denoiser=self.denoiser(network, process.prediction, cfg_weight),
            process=process,
            shape=(network.config.in_channels, size, size),
            num_classes=self.num_classes,
            weights=weights,
            digest=digest(process.digest, self.digest, cfg_weight, *values) if identified else "",
            codec=self.codec,
            conditioner=self.prompts,
            device=device,
        )


def read_index(path: str | Path) -> dict[str, Any]:
    """Names and classes of a pipeline's parts; empty where there is no diffusers pipeline."""
    try:
        file = Path(path) / INDEX if Path(path).is_dir() else _of_hub(str(path))
        index = json.loads(Path(file).read_text())
    except (OSError, ValueError):  # of the hub too: no such repository, no network, no name of one
        return {}
    return index if isinstance(index, dict) else {}


def _of_hub(name: str) -> str:
    """The index of a hub id, from the hub, or what is kept of it here."""
    try:
        model_info(name)
        unreachable = False
    except Exception:  # no network, no such repository, no name of one: each library has a type of its own
        unreachable = True  # to download would try six times before it says so
    return hf_hub_download(name, INDEX, local_files_only=unreachable)


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """Class of a pipeline's part; null where it has none."""
    found = index.get(part)
    return found[1] if isinstance(found, list) and len(found) == 2 else None


def part_classes(path: str | Path, needed: Mapping[str, str | None]) -> dict[str, str | None]:
    """Class of each part that is needed.

    Args:
        path: A diffusers folder or hub id.
        needed: Parts and the class each must be of; null where any will do.

    Raises:
        ValueError: If one is missing or of another class.
    """
    index = read_index(path)
    found = {part: class_of(index, part) for part in needed}
    for part, wanted in needed.items():
        if found[part] is None or wanted not in (None, found[part]):
            raise ValueError(
                f"{path} has as {part} {found[part] or 'nothing'}, but a latent model needs {wanted or 'one'}"
            )
    return found


def load_codec(path: str | Path, device: torch.device | str) -> LatentCodec:
    """The codec of a latent pipeline."""
    vae: Any = AutoencoderKL.from_pretrained(str(path), subfolder="vae", use_safetensors=True)
    return LatentCodec(vae.to(device))
