"""SIDE's memorization divergence: how much closer a label's own model is to its training images than the whole one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.metrics.intervals import check_level
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

CHUNK_BYTES = 64 * 2**20

LogDensity = Callable[[Tensor], Tensor]
"""Floats [B, ...] of the images' shape, on the models' scale -> log p, [B]."""


class DivergenceDifference(NamedTuple):
    """A difference of two memorization divergences.

    Args:
        value: In nats; below 0 where the conditional model memorizes the images more.
        low: Lower end of its interval.
        high: Upper end.
        n: Draws behind it.
    """

    value: float
    low: float
    high: float
    n: int


class GaussianMixture:
    r"""Log density of a mixture of isotropic Gaussians.

    .. math:: \log p(x) = \log \sum_k w_k \, N(x \mid m_k, \sigma_k^2 I)

    With training images as means and one sigma it is their kernel density: :meth:`of_images`.

    Args:
        means: [K, ...], uint8 (taken to [-1, 1]) or floats.
        sigma: Standard deviation per pixel on that scale, positive; one, or one per mean.
        weights: [K], positive; scaled to the sum 1. Null: equal.

    Raises:
        ValueError: If there is no mean, or a sigma or weight is not positive or has no mean.
    """

    def __init__(self, means: Tensor, sigma: float | Tensor, weights: Tensor | None = None) -> None:
        if means.ndim < 2 or len(means) == 0:
            raise ValueError(f"means must be [K >= 1, ...], got {tuple(means.shape)}")
        self.shape = means.shape[1:]
        self.means = _rows(means)
        self.sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(means))
        mass = torch.ones(len(means)) if weights is None else weights
        if mass.shape != (len(means),):
            raise ValueError(f"weights must be [{len(means)}], one per mean, got {tuple(mass.shape)}")
        for name, values in (("sigma", self.sigma), ("weights", mass)):
            if not (values > 0).all() or not torch.isfinite(values).all():
                raise ValueError(f"{name} must be positive and finite, got {values.min():g} .. {values.max():g}")
        constant = -0.5 * self.means.shape[1] * torch.log(2 * math.pi * self.sigma.square())
        self._log_mass = (mass.double() / mass.double().sum()).log() + constant
        self._square = self.means.square().sum(1)

    @classmethod
    def of_images(cls, images: Tensor, process: DiffusionProcess, t: int) -> "GaussianMixture":
        r"""Density of the closed-form denoiser's model that stops at a timestep, seen on the scale of clean images.

        .. math:: x_t / \sqrt{\bar\alpha_t} \sim \frac{1}{N} \sum_i N(y_i, \sigma_t^2 I), \quad
            \sigma_t^2 = (1 - \bar\alpha_t) / \bar\alpha_t

        Args:
            images: [N, C, H, W], uint8 or floats in [-1, 1].
            process: Its noising process.
            t: Training timestep, in [0, T), where alpha_bar is above 0.

        Raises:
            ValueError: If the timestep is outside its range.
        """
        if not 0 <= t < process.num_timesteps or process.alpha_bar[t] == 0:
            raise ValueError(f"t must lie in [0, {process.num_timesteps}) with alpha_bar above 0, got {t}")
        alpha_bar = float(process.alpha_bar[t])
        return cls(images, math.sqrt((1 - alpha_bar) / alpha_bar))

    def __call__(self, x: Tensor) -> Tensor:
        """Log density in float64.

        Args:
            x: Floats [B, ...] of the means' shape.
        """
        rows = _rows(x)
        variance = self.sigma.square()
        found = []
        for part in rows.split(max(1, CHUNK_BYTES // (8 * len(self.means)))):
            square = part.square().sum(1, keepdim=True) - 2 * part @ self.means.T + self._square
            found.append(torch.logsumexp(self._log_mass - square / (2 * variance), 1))
        return torch.cat(found)


def divergence_difference(
    images: Tensor,
    log_p: LogDensity,
    log_p_conditional: LogDensity,
    eps: float,
    *,
    num_draws: int = 16,
    seed: int = 0,
    level: float = 0.95,
) -> DivergenceDifference:
    r"""Memorization divergence of a conditional model minus that of the unconditional one, on one label's images.

    With :math:`M(D; p, \epsilon) = KL(q_\epsilon \Vert p)` and :math:`q_\epsilon` the kernel density of D,

    .. math:: M(D_i; p_i, \epsilon) - M(D_i; p, \epsilon)
        = E_{x \sim q_\epsilon(D_i)} [\log p(x) - \log p_i(x)]

    estimated by equally many draws around every image. M alone grows without bound as eps falls; in the difference at
    equal eps the entropy of :math:`q_\epsilon` cancels.

    Args:
        images: [N, ...] of one label, uint8 (taken to [-1, 1]) or floats; at least one.
        log_p: Log density of the unconditional model.
        log_p_conditional: Of the model of this label.
        eps: Standard deviation of the kernel per pixel, on the models' scale; positive.
        num_draws: Around each image, at least 2.
        seed: Of the draws; those around image i come from ``generator(seed, "divergence", i)``.
        level: Of confidence, in (0, 1).

    Returns:
        The difference in nats with an interval (Student's over draws, stratified by image). It is about *these* images:
        what another set would give is not in it.

    Raises:
        ValueError: If a number is outside its range, or a density is 0 or not finite at a draw.

    Undefined when:
        Two values of eps are compared: each is a statement on densities at its own scale, not on copies.

    Source:
        SIDE, arXiv:2410.02467 v7, definition of M and theorem 1: the difference tends to at most 0 as
        :math:`|D_i| \to \infty`, then :math:`\epsilon \to 0`, with equality only where the label says nothing.
    """
    differences = _differences(images, log_p, log_p_conditional, eps, num_draws, seed)
    return _estimate(differences, level)


def label_divergence(
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    sigma: float | None = None,
    num_draws: int = 16,
    seed: int = 0,
    level: float = 0.95,
) -> DivergenceDifference:
    r"""The difference for models that memorize: kernel densities of all images and of each label's, over all labels.

    .. math:: \frac{1}{N} \sum_i |D_i| \, [M(D_i; p_i, \epsilon) - M(D_i; p, \epsilon)],
        \quad p_i = \frac{1}{|D_i|} \sum_{y \in D_i} N(y, \sigma^2 I)

    At sigma = eps this is minus the mutual information between the label and the image with noise eps on it. It lies
    between minus the entropy of the labels, reached where sigma and eps are small against the distances between images,
    and 0. So on a *finite* set labels drawn at random tell as much as true ones in that limit: :math:`-\log C` for C
    labels equally frequent. They differ at larger sigma, where random labels go to 0 first; with ever more images at a
    fixed sigma random labels tell nothing. The order of the limits in theorem 1 is the latter.

    Args:
        images: [N, ...], uint8 (taken to [-1, 1]) or floats.
        labels: int64 [N]. One label for all gives exactly 0.
        eps: Of the kernel, as in :func:`divergence_difference`.
        sigma: Of the models' own kernel, positive. Null: eps.
        num_draws: Around each image, at least 2.
        seed: Of the draws.
        level: Of confidence, in (0, 1).

    Returns:
        The difference in nats with its interval; see :func:`divergence_difference`.

    Raises:
        ValueError: If labels do not match the images, or as :func:`divergence_difference`.

    Source:
        SIDE, arXiv:2410.02467 v7, theorem 1; the form for finite sets is derived.
    """
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise ValueError(f"labels must be int64 [{len(images)}], one per image, got {labels.dtype} {labels.shape}")
    width = eps if sigma is None else sigma
    whole = GaussianMixture(images, width)
    parts = []
    for label in labels.unique():
        own = images[labels == label]
        parts.append(_differences(own, whole, GaussianMixture(own, width), eps, num_draws, seed, int(label)))
    return _estimate(torch.cat(parts), level)


def _differences(
    images: Tensor,
    log_p: LogDensity,
    log_p_conditional: LogDensity,
    eps: float,
    num_draws: int,
    seed: int,
    *address: int,
) -> Tensor:
    """Float64 [N, num_draws]: log p - log p_i at the draws around each image."""
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be [N >= 1, ...], got {tuple(images.shape)}")
    if not 0 < eps < math.inf or num_draws < 2:
        raise ValueError(f"eps must be positive and num_draws at least 2, got {eps} and {num_draws}")
    rows = _rows(images)
    step = max(1, CHUNK_BYTES // (8 * num_draws * rows.shape[1]))
    found = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        noise = [
            torch.randn(
                num_draws, rows.shape[1], dtype=torch.float64, generator=generator(seed, "divergence", *address, i)
            )
            for i in range(start, start + len(part))
        ]
        x = (part[:, None] + eps * torch.stack(noise)).reshape(-1, *images.shape[1:])
        values = [log_p(x).double(), log_p_conditional(x).double()]
        for value in values:
            if value.shape != (len(x),):
                raise ValueError(f"a log density must return [{len(x)}] for as many rows, got {tuple(value.shape)}")
        difference = values[0] - values[1]
        if not torch.isfinite(difference).all():
            image = start + int((~torch.isfinite(difference)).nonzero()[0, 0]) // num_draws
            raise ValueError(f"a density is 0 or not finite near image {image}: the divergence does not exist there")
        found.append(difference.reshape(-1, num_draws))
    return torch.cat(found)


def _estimate(differences: Tensor, level: float) -> DivergenceDifference:
    """Mean of [N, draws] and Student's interval of a sample stratified by rows."""
    check_level(level)
    from scipy.stats import t  # half a second to import; needed nowhere else

    images, draws = differences.shape
    error = math.sqrt(differences.var(1).mean().item() / (images * draws))
    half = float(t.ppf((1 + level) / 2, images * (draws - 1))) * error
    value = differences.mean().item()
    return DivergenceDifference(value, value - half, value + half, images * draws)


def _rows(images: Tensor) -> Tensor:
    """Float64 [N, d] on the models' scale."""
    return (to_float(images) if images.dtype == torch.uint8 else images).double().flatten(1)
