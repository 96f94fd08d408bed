"""Completions of half-hidden images: drawn under what is known, scored, and forgotten."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mem.attacks.conditions import Asked, on_device
from lightning_mem.attacks.placement import placed
from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import evaluation_mode, sample_x0
from lightning_mem.diffusion.target import Condition
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.types import to_float, to_uint8

Half = Literal["left", "right", "top", "bottom"]
"""Which half is hidden."""


def hidden_half(half: Half, height: int, width: int) -> Tensor:
    """bool [height, width], true where hidden; the middle line of an odd side is seen."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = height // 2, width // 2
    place = {
        "left": (slice(None), slice(0, columns)), "right": (slice(None), slice(width - columns, width)),
        "top": (slice(0, rows), slice(None)), "bottom": (slice(height - rows, height), slice(None)),
    }[half]  # fmt: skip
    mask[place] = True
    return mask


class _Completing:
    r"""A denoiser that knows part of the answer: there it predicts the noise that leads to the image.

    .. math:: \hat x_0 = m\,\hat x_{0,\theta}(x_t, t) + (1 - m)\,x_0
    """

    def __init__(self, target: Target, known: Tensor, hidden: Tensor) -> None:
        self.denoiser, self.process = target.denoiser, target.process
        self.prediction, self.module = target.denoiser.prediction, getattr(target.denoiser, "module", None)
        self.known, self.hidden = known, hidden

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        known = torch.cat([self.known, self.known[-1:].expand(len(x_t) - len(self.known), *self.known.shape[1:])])
        told = self.process.from_x0(known, x_t, t)
        return torch.where(self.hidden, self.denoiser(x_t, t, condition), told.to(x_t.dtype))


class Completions:
    """Completions of half-hidden images, each scored as it is made and forgotten.

    Args:
        target: The model.
        images: uint8 [N, C, H, W].
        half: Which half is hidden.
        num_inpaintings: Completions of an image.
        timestep: Of the loss by which completions are chosen.
        seed: Of all noise.
        kind: Address of these images' noise.
        drawing: num_steps, sampler, eta, block.
        device: Where the model is asked.
        condition: What it is asked under, by an image's row; null for nothing, or the empty prompt.

    Source:
        Replacement of the known part: Song et al., arXiv:2011.13456, appendix I.2; at each step, without resampling.
    """

    def __init__(
        self, target: Target, images: Tensor, half: Half, num_inpaintings: int, timestep: int, seed: int, kind: str,
        drawing: dict[str, Any], device: torch.device | str, condition: Asked | None = None,
    ) -> None:  # fmt: skip
        self.target, self.images = placed(target, device), images
        self.count, self.timestep, self.kind = num_inpaintings, timestep, kind
        self.seed, self.drawing, self.device = seed, drawing, device
        self.condition = condition
        self.hidden = hidden_half(half, *target.shape[1:])
        pixels = target.codec.pixel_shape(target.shape)[1:]
        scale = torch.ones(pixels[0] // target.shape[1], pixels[1] // target.shape[2], dtype=torch.uint8)
        self.hidden_pixels = torch.kron(self.hidden.byte(), scale).bool()

    def complete(self, rows: Tensor) -> Tensor:
        """Completions in the denoiser's space, float32; row r is completion r % count of image r // count.

        Args:
            rows: int64, ascending, each once, at most a block.
        """
        known = self.target.codec.encode(to_float(self.images[rows // self.count]).to(self.device))
        hidden = self.hidden.to(self.device)
        completing = _Completing(self.target, known, hidden)
        seed = derive_seed(self.seed, "inpainting", self.kind)
        given = None if self.condition is None else self.condition(rows // self.count)
        drawn = sample_x0(replace(self.target, denoiser=completing), rows, seed=seed, condition=given, **self.drawing)
        return torch.where(hidden, drawn, known)

    def pixels(self, completed: Tensor, rows: Tensor) -> Tensor:
        """uint8 images of completions; what was not hidden is the image's own."""
        drawn = to_uint8(self.target.codec.decode(completed)).cpu()
        return torch.where(self.hidden_pixels, drawn, self.images[rows // self.count])

    def losses(self, completed: Tensor, rows: Tensor) -> Tensor:
        """Mean squared error of the predicted noise at the timestep, float64 [B]."""
        process, block = self.target.process, int(self.drawing["block"])
        draws = [generator(self.seed, "inpainting loss", self.kind, int(row)) for row in rows]
        eps = torch.stack([torch.randn(self.target.shape, generator=draw) for draw in draws]).to(self.device)
        fill = torch.arange(block).clamp(max=len(rows) - 1)  # calls of one shape
        t = torch.full((block,), self.timestep, dtype=torch.int64, device=self.device)
        x_t = process.add_noise(completed[fill], eps[fill], t)
        given = None if self.condition is None else on_device(self.condition(rows[fill] // self.count), self.device)
        with torch.no_grad(), evaluation_mode(self.target.denoiser):
            output = self.target.denoiser(x_t, t, given)
        guess = process.to_eps(output.float(), x_t, t, self.target.denoiser.prediction)[: len(rows)]
        return (guess - eps).double().square().flatten(1).mean(1)

    def scores(self, rows: Tensor) -> Tensor:
        """Loss, and RMS-L2 on [0, 1] to the truth over the hidden pixels, float64 [B, 2] on the CPU."""
        completed = self.complete(rows)
        error = self.pixels(completed, rows).int() - self.images[rows // self.count].int()
        away = error[:, :, self.hidden_pixels].double().square().flatten(1).mean(1).sqrt() / 255
        return torch.stack([self.losses(completed, rows).cpu(), away], 1)
