"""Exact things to compare with: densities whose denoisers have a closed form, and slow references in float64."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_mem.diffusion import Condition, DiffusionProcess, Target
from lightning_mem.types import Prediction


class MixtureDenoiser:
    r"""The exact denoiser of data drawn from a mixture of isotropic Gaussians; one component makes it a Gaussian.

    Each component stays a Gaussian under noising, :math:`p_t = \sum_k w_k N(\sqrt{\bar\alpha_t}\,\mu_k,
    \bar\alpha_t s_k^2 + 1 - \bar\alpha_t)`. Written here from Bayes' rule, not from the package's conversions.

    Args:
        means: [K, C, H, W].
        scales: [K] standard deviations s_k; 0 is a point.
        process: Its schedule; only ``alpha_bar`` is taken from it.
        weights: [K] positive, summing to 1; null for equal ones.
        prediction: What the call returns; null for the process's own.
    """

    def __init__(
        self,
        means: Tensor,
        scales: Tensor,
        process: DiffusionProcess,
        weights: Tensor | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        self.means, self.scales = means.double(), scales.double()
        self.weights = torch.full((len(means),), 1 / len(means)).double() if weights is None else weights.double()
        self.process = process
        self.prediction: Prediction = prediction or process.prediction

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha_bar [B, 1], residuals [B, K, D], variances [B, K] and log weighted densities [B, K], all float64."""
        x = x_t.double().flatten(1)
        alpha_bar = self.process.alpha_bar[t.cpu()][:, None]
        residual = x[:, None] - alpha_bar.sqrt()[..., None] * self.means.flatten(1)
        variance = alpha_bar * self.scales**2 + 1 - alpha_bar
        log_density = -0.5 * (residual.square().sum(2) / variance + x.shape[1] * torch.log(2 * math.pi * variance))
        return alpha_bar, residual, variance, self.weights.log() + log_density

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t), [B]."""
        return self._components(x_t, t)[3].logsumexp(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t), float64 [B, C, H, W]."""
        _, residual, variance, log_density = self._components(x_t, t)
        share = log_density.softmax(1)
        return -((share / variance)[..., None] * residual).sum(1).reshape(x_t.shape)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The minimiser of the loss, in ``prediction``; x_t's dtype."""
        alpha_bar = self.process.alpha_bar[t.cpu()].reshape(-1, 1, 1, 1)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = -noise * self.score(x_t, t)
        if self.prediction == "eps":
            return eps.to(x_t.dtype)
        x0 = (x_t.double() - noise * eps) / signal
        return (x0 if self.prediction == "x0" else signal * eps - noise * x0).to(x_t.dtype)

    def target(self) -> Target:
        """Itself, to sample from."""
        return Target(denoiser=self, process=self.process, shape=tuple(self.means.shape[1:]))


class MixtureClassifier:
    """The exact classifier of a noised mixture: p(c | x_t) by Bayes' rule, c the class of the component.

    Args:
        mixture: The law of the data.
        classes: int64 [K], the class of each component; every class from 0 on occurs.
        shift: Added to the timestep that is looked up, within [0, T): a classifier with a wrong time index.
    """

    def __init__(self, mixture: MixtureDenoiser, classes: Tensor, shift: int = 0) -> None:
        self.mixture, self.classes, self.shift = mixture, classes, shift
        self.num_classes = int(classes.max()) + 1
        self.process = mixture.process

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t, c), float64 [B, num_classes]."""
        t = (t + self.shift).clamp(0, self.process.num_timesteps - 1)
        log_density = self.mixture._components(x_t, t)[3]
        own = [log_density[:, self.classes == c].logsumexp(1) for c in range(self.num_classes)]
        return torch.stack(own, 1)


def gaussian_denoiser(mean: Tensor, scale: float, process: DiffusionProcess, **options: Prediction) -> MixtureDenoiser:
    """The exact denoiser of N(mean, scale**2), ``mean`` [C, H, W]."""
    return MixtureDenoiser(mean[None], torch.tensor([scale], dtype=torch.float64), process, **options)


def planted_mixture(members: Tensor, process: DiffusionProcess, narrow: float = 0.03, wide: float = 0.4) -> Target:
    """A target that memorized half: half of its mass sits in narrow Gaussians on the members, half in one wide one.

    Args:
        members: uint8 [N, C, H, W].
        process: Its schedule and prediction.
        narrow: Standard deviation around each member, in [-1, 1] units.
        wide: Standard deviation around grey.
    """
    n = len(members)
    means = torch.cat([members.double() / 127.5 - 1, torch.zeros(1, *members.shape[1:])])
    scales = torch.tensor([narrow] * n + [wide], dtype=torch.float64)
    weights = torch.tensor([0.5 / n] * n + [0.5], dtype=torch.float64)
    target = MixtureDenoiser(means, scales, process, weights).target()
    target.digest = "planted"
    return target


def gaussian_flow(denoiser: MixtureDenoiser, x: Tensor, start: int) -> Tensor:
    """Where the exact probability flow takes x [B, C, H, W] from timestep ``start`` to t = 0 noise, one component.

    A Gaussian keeps its standardised coordinate along the flow.
    """
    mean, scale = denoiser.means[0], denoiser.scales[0]
    alpha_bar = denoiser.process.alpha_bar[start]
    return mean + scale * (x.double() - alpha_bar.sqrt() * mean) / (alpha_bar * scale**2 + 1 - alpha_bar).sqrt()


def dense_posterior_mean(
    images: np.ndarray,
    x_t: np.ndarray,
    alpha_bar: np.ndarray,
    labels: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """E[x0 | x_t] on a finite set by the definition, one row after another, in float64.

    Args:
        images: [N, ...] in [-1, 1].
        x_t: [B, ...].
        alpha_bar: [B].
        labels: [N], with ``wanted`` [B]: only images of the wanted label count.
        wanted: [B].
    """
    bank = images.reshape(len(images), -1).astype(np.float64)
    means = []
    for row, (x, signal) in enumerate(zip(x_t.reshape(len(x_t), -1).astype(np.float64), alpha_bar, strict=True)):
        own = bank if labels is None or wanted is None else bank[labels == wanted[row]]
        squared = ((x - math.sqrt(signal) * own) ** 2).sum(1) / (2 * (1 - signal))
        weight = np.exp(squared.min() - squared)
        means.append(weight @ own / weight.sum())
    return np.stack(means).reshape(x_t.shape)


def dense_class_log_probability(
    images: np.ndarray, labels: np.ndarray, x_t: np.ndarray, alpha_bar: np.ndarray
) -> np.ndarray:
    """log p(c | x_t) on a finite labelled set by the definition, one row and class after another, in float64.

    Args:
        images: [N, ...] in [-1, 1].
        labels: [N] in [0, K).
        x_t: [B, ...].
        alpha_bar: [B].
    """
    bank = images.reshape(len(images), -1).astype(np.float64)
    rows = []
    for x, signal in zip(x_t.reshape(len(x_t), -1).astype(np.float64), alpha_bar, strict=True):
        logits = -((x - math.sqrt(signal) * bank) ** 2).sum(1) / (2 * (1 - signal))
        classes = [np.logaddexp.reduce(logits[labels == c]) for c in range(labels.max() + 1)]
        rows.append(np.array(classes) - np.logaddexp.reduce(logits))
    return np.stack(rows)


def finite_differences(f: Callable[[np.ndarray], float], x: np.ndarray, h: float) -> np.ndarray:
    """The gradient of f at x by central differences of step h, entry by entry."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = h
        gradient[place] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient
