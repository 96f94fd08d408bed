"""What every verb acts on: a denoiser with its process, shape and identity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_mem.diffusion.codec import Codec, PixelCodec
from lightning_mem.diffusion.process import DiffusionProcess
from lightning_mem.types import Prediction, Weights

Condition = Tensor | Mapping[str, Tensor] | None
"""None, int64 labels [B], or a mapping of tensors with B rows (prompt embeddings)."""


@runtime_checkable
class Denoiser(Protocol):
    """A callable ``(x_t [B, C, H, W], t int64 [B], condition) -> output`` that says what its output is.

    A white-box method asks for the attribute ``module``, the network itself; nothing else may.
    """

    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The network's own output at training timestep t."""


@dataclass
class Target:
    """A model to be measured, attacked or protected.

    Args:
        denoiser: The network's call; see :class:`Denoiser`.
        process: Its noising process.
        shape: (C, H, W) of what the denoiser sees.
        num_classes: Number of labels it is conditioned on; null for an unconditional one.
        weights: Which weights these are, ``raw`` or ``ema``.
        digest: Identity: equal digests mean equal samples.
        codec: Between the denoiser's space and pixels.
        conditioner: Makes conditions of prompts, where the denoiser takes any: ``conditioner(["a cat", ""])``.
        device: Where the denoiser lives.
    """

    denoiser: Denoiser
    process: DiffusionProcess
    shape: tuple[int, int, int]
    num_classes: int | None = None
    weights: Weights = "raw"
    digest: str = ""
    codec: Codec = field(default_factory=PixelCodec)
    conditioner: Callable[[Sequence[str]], Mapping[str, Tensor]] | None = None
    device: torch.device | str = "cpu"

    def target(self) -> "Target":
        """Itself, so that whatever has ``target()`` can be sampled."""
        return self
