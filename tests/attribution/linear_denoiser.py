"""A denoiser that is one matrix: its gradients and its trainings have closed forms."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

PROCESS = DiffusionProcess(num_timesteps=100)


class Matrix(nn.Module):
    """x_t -> W x_t; with classes, the matrix of the label."""

    prediction = "eps"

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        weight = self.weight if condition is None else self.weight[condition]
        return (weight @ x_t.flatten(1)[..., None]).reshape(x_t.shape)


def images(count: int, seed: int, side: int = 2) -> Tensor:
    """Random grey images."""
    return torch.randint(0, 256, (count, 1, side, side), generator=generator(seed, "images"), dtype=torch.uint8)


def target_of(weights: Tensor, shape: tuple[int, int, int] = (1, 2, 2), digest: str = "linear") -> Target:
    """The target of a matrix [d, d], or of one a class [n, d, d]."""
    classes = len(weights) if weights.ndim == 3 else None
    return Target(Matrix(weights.clone()), PROCESS, shape, num_classes=classes, digest=digest)


def scene_of(target: Target, members: Tensor, folder: Path, heldout: Tensor | None = None, **options: Any) -> Scene:
    """A scene around these training images."""
    reference = Reference.from_images(members, heldout)
    return Scene(target, folder / "run", folder, lambda *a, **k: None, lambda: reference, **options)  # type: ignore[arg-type,return-value]


def noised(pixels: Tensor, times: list[int], seed: int = 0, draws: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x_t and eps float64 [N, K, R, d] at the noise that all images share."""
    x0 = to_float(pixels).double().flatten(1).numpy()
    shape = tuple(pixels.shape[1:])
    eps = np.stack([
        np.stack([
            torch.randn(shape, generator=generator(seed, "attribution", "", t, r)).double().flatten().numpy()
            for r in range(draws)
        ])
        for t in times
    ])  # fmt: skip
    signal = PROCESS.alpha_bar.numpy()[times][:, None, None]
    x_t = np.sqrt(signal) * x0[:, None, None, :] + np.sqrt(1 - signal) * eps
    return x_t, np.broadcast_to(eps, x_t.shape)


def gradients_by_hand(weights: Tensor, pixels: Tensor, times: list[int], loss: bool, unit: bool, draws: int = 1,
                      seed: int = 0) -> np.ndarray:  # fmt: skip
    """Closed form [N, d * d]: of |W x - eps|^2 / d it is 2 (W x - eps) x^T / d, of |W x|^2 / d without eps."""
    x_t, eps = noised(pixels, times, seed, draws)
    out = x_t @ weights.double().numpy().T
    left = out - eps if loss else out
    every = 2 / x_t.shape[-1] * np.einsum("nkra,nkrb->nkab", left, x_t) / draws
    every = every.reshape(*every.shape[:2], -1)
    if unit:
        every = every / np.linalg.norm(every, axis=-1, keepdims=True)
    return every.mean(1)
