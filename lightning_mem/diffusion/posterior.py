"""Which images of a finite set, or which groups of them, explain a noised image: one streaming log-sum-exp for all."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_mem.diffusion.process import DiffusionProcess
from lightning_mem.types import to_float

KEPT_BYTES = 2**28
"""Sets whose float64 form fits are converted once, and log-weights that fit are computed once a call; 256 MiB."""

Chunk = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [n, D], their groups [n] ascending, images per group [K], and log-weights [n, B]; float64 and int64."""


def _spread(values: Tensor, groups: Tensor) -> Tensor:
    """Values of groups [K, B] as those of their images [n, B]; one group's needs no copies."""
    return values if len(values) == 1 else values[groups]


class Posterior:
    r"""A finite set of images as the data distribution, split into K groups, seen through the noise.

    .. math:: \log m_k(x_t) = \log \sum_{i \in k} \exp\!\left(
        -\frac{\lVert x_t - \sqrt{\bar\alpha_t}\,y_i \rVert^2}{2 (1 - \bar\alpha_t)}\right)
        + \frac{\lVert x_t \rVert^2}{2 (1 - \bar\alpha_t)}

    The last term is the same for every group, so the softmax over k is the share of each group. All sums are float64,
    a chunk of the set at a time, with the maximum taken out group by group.

    Args:
        images: uint8 [N, C, H, W], or floats in [-1, 1]; non-empty; may be memory-mapped.
        process: The noising process; only its alpha_bar is used.
        groups: int64 [N] in [0, K); null for one group of all.
        chunk: Rows of the set handled at once; a larger set needs chunk x (B + C H W) float64 and no more.

    Raises:
        ValueError: If the set is empty, groups do not match it, or chunk is below 1.
    """

    def __init__(
        self, images: Tensor, process: DiffusionProcess, groups: Tensor | None = None, chunk: int = 4096
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be a non-empty [N, C, H, W], got {tuple(images.shape)}")
        if groups is not None and groups.shape != (len(images),):
            raise ValueError(f"labels must have one entry per image ({len(images)}), got {tuple(groups.shape)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.images = images if images.dtype == torch.uint8 else images.float()
        self.process = process
        self.chunk = chunk
        self.order = None if groups is None else groups.cpu().argsort(stable=True)
        self.groups = torch.zeros(len(images), dtype=torch.int64) if groups is None else groups.cpu()[self.order]
        self.num_groups = int(self.groups[-1]) + 1
        self._kept: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def rows(self, start: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk that begins at ``start``, in order of groups, float64 and int64 on ``device``.

        Returns:
            Images with their squared norms as a last column [n, D + 1], groups [n], and images per group [K].
        """
        if (start, device) in self._kept:
            return self._kept[start, device]
        span = slice(start, start + self.chunk)
        images = (self.images[span] if self.order is None else self.images[self.order[span]]).to(device)
        groups = self.groups[span].to(device)
        flat = (to_float(images) if images.dtype == torch.uint8 else images).flatten(1).double()
        flat = torch.cat([flat, flat.square().sum(1, keepdim=True)], dim=1)
        found = flat, groups, torch.bincount(groups, minlength=self.num_groups)
        if 8 * len(self.images) * flat.shape[1] <= KEPT_BYTES:
            self._kept[start, device] = found
        return found

    def _chunks(self, flat: Tensor, alpha_bar: Tensor) -> Callable[[], Iterable[Chunk]]:
        """The chunks with their log-weights at x_t [B, D], as often as asked."""
        # the part of the squared distance that does not depend on the image is left out
        factors = torch.cat([alpha_bar.sqrt() * flat.T, -alpha_bar / 2]) / (1 - alpha_bar)

        def compute() -> Iterable[Chunk]:
            for start in range(0, len(self.images), self.chunk):
                images, groups, counts = self.rows(start, flat.device)
                yield images[:, :-1], groups, counts, images @ factors

        if 8 * len(self.images) * max(flat.shape) > KEPT_BYTES:  # images [N, D] and log-weights [N, B]
            return compute
        only = list(compute())
        return lambda: only

    def _log_mass(self, chunks: Callable[[], Iterable[Chunk]], like: Tensor) -> Tensor:
        """log m of every group, [K, B]."""
        top = torch.full((self.num_groups, len(like)), -torch.inf, dtype=torch.float64, device=like.device)
        mass = torch.zeros_like(top)
        for _, groups, counts, logits in chunks():
            new_top = torch.maximum(top, torch.segment_reduce(logits, "max", lengths=counts, axis=0))
            safe = new_top.masked_fill(new_top.isinf(), 0.0)  # groups of which no image came yet
            weight = (logits - _spread(safe, groups)).exp_()
            mass = mass * (top - safe).exp() + torch.segment_reduce(weight, "sum", lengths=counts, axis=0)
            top = new_top
        return mass.log() + top.masked_fill(top.isinf(), 0.0)

    @staticmethod
    def _weighted(chunks: Callable[[], Iterable[Chunk]], log_mass: Tensor, share: Tensor) -> Tensor:
        """sum_k share_k E[x0 | x_t, k] for log m and share [K, B]; [B, D]."""
        total = torch.zeros((), dtype=torch.float64, device=share.device)
        for images, groups, _, logits in chunks():
            weight, spread = (logits - _spread(log_mass, groups)).exp_(), _spread(share, groups)
            weight = weight * spread if weight.requires_grad else weight.mul_(spread)
            total = total + weight.T @ images
        return total

    def log_mass(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log m_k(x_t), float64 [B, K]; differentiable in x_t, once, in bounded memory.

        Args:
            x_t: [B, C, H, W].
            t: int64 [B], training timesteps.
        """
        flat = x_t.flatten(1).double()
        return _LogMass.apply(flat, self.process.alpha_bar_at(t, flat).T, self).T

    def mean(self, x_t: Tensor, t: Tensor, share: Tensor | None = None) -> Tensor:
        """E[x0 | x_t] with the groups weighted by ``share``, float64 in the shape of x_t.

        Args:
            x_t: [B, C, H, W].
            t: int64 [B], training timesteps.
            share: Weight of each group, [B, K]; null for what x_t says, which is the mean over the whole set.
        """
        flat = x_t.flatten(1).double()
        chunks = self._chunks(flat, self.process.alpha_bar_at(t, flat).T)
        log_mass = self._log_mass(chunks, flat)
        share = log_mass.softmax(0) if share is None else share.to(log_mass).T
        return self._weighted(chunks, log_mass, share).reshape(x_t.shape)


class _LogMass(torch.autograd.Function):
    r"""log m_k with its gradient in closed form, :math:`\sqrt{\bar\alpha}/(1-\bar\alpha)\,E[x_0 \mid x_t, k]`."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, alpha_bar: Tensor, posterior: Posterior) -> Tensor:
        ctx.chunks = posterior._chunks(flat, alpha_bar)
        ctx.log_mass = posterior._log_mass(ctx.chunks, flat)
        ctx.weighted, ctx.alpha_bar = posterior._weighted, alpha_bar
        return ctx.log_mass.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        signal = ctx.alpha_bar.sqrt() / (1 - ctx.alpha_bar)
        return signal.T * ctx.weighted(ctx.chunks, ctx.log_mass, slopes[0]), None, None
