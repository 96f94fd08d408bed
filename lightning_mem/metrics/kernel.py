"""Kernel distance (KID) and memorization-informed Fréchet distance (MiFID), on features of any extractor."""

import torch
from torch import Tensor

from lightning_mem.metrics.frechet import frechet_distance_from_features
from lightning_mem.metrics.neighbors import Rows
from lightning_mem.metrics.similarities import float64_rows, score_blocks

_ROWS = 1024  # rows of each side per block


def kernel_distance(
    samples: Rows, reference: Rows, *, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> float:
    r"""Squared maximum mean discrepancy under a polynomial kernel; on Inception features, KID.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{nm} \sum_{i,j} k(x_i, y_j), \quad k(x, y) = (\gamma \, x \cdot y + c)^p

    over all pairs, in float64: the value around which the usual means over random subsets scatter.

    Args:
        samples: [n, d] features of samples, n >= 2.
        reference: [m, d] features of reference images, m >= 2.
        degree: p, at least 1.
        gamma: Positive. Null: 1 / d.
        coef: c.

    Returns:
        An unbiased estimate: it may be negative, and its expectation does not depend on n. :func:`jackknife_interval`
        over the samples gives its interval where the two sides differ.

    Raises:
        ValueError: If a side has fewer than 2 rows, widths differ, a value is not finite, or an option is outside its
            range.

    Undefined when:
        The two sides are of one distribution: there the estimate is not normally distributed, and no interval is
        offered that holds.

    Source:
        Bińkowski et al., Demystifying MMD GANs, arXiv:1801.01401.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    if gamma is not None and not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    for name, rows in (("samples", samples), ("reference", reference)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"{name} must be [n >= 2, d] features, got {tuple(rows.shape)}")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"both sides must have the same features, got {samples.shape[1]} and {reference.shape[1]} of them"
        )
    scale = 1 / samples.shape[1] if gamma is None else gamma

    def total(first: Rows, second: Rows, *, without_diagonal: bool) -> float:
        value = 0.0
        for start in range(0, len(first), _ROWS):
            rows = _block("samples", first, start)
            for other in range(0, len(second), _ROWS):
                kernel = (rows @ _block("reference", second, other).to(rows.device).T * scale + coef) ** degree
                value += float(kernel.sum())
                if without_diagonal and start == other:
                    value -= float(kernel.diagonal().sum())
        return value

    n, m = len(samples), len(reference)
    within = total(samples, samples, without_diagonal=True) / (n * (n - 1))
    within += total(reference, reference, without_diagonal=True) / (m * (m - 1))
    return within - 2 * total(samples, reference, without_diagonal=False) / (n * m)


def memorization_informed_frechet_distance(
    samples: Rows, reference: Rows, *, training: Rows | None = None, eps: float = 0.1
) -> float:
    r"""Fréchet distance, divided by how far samples are from the training images where that is little (MiFID).

    .. math:: \frac{F}{M}, \quad
        M = \frac1n \sum_i \min_j \left( 1 - |\cos(x_i, y_j)| \right) \text{ where that is below eps, else } 1

    Args:
        samples: [n, d] features of samples.
        reference: [m, d] features of the images the Fréchet distance is taken to.
        training: [t, d] features of the training images. Null: the reference is the training set.
        eps: Cut of the mean cosine distance, in (0, 1]; 0.1 is used with Inception features.

    Returns:
        The distance, lower is better; at least the Fréchet distance; 0 where that is below 1e-8, and infinite where
        every sample is an exact copy.

    Raises:
        ValueError: If a side is malformed, a feature vector has length 0, or eps is outside its range.

    Undefined when:
        Another extractor or eps is used: features of one network may all be close by cosine. No interval is offered:
        the cut makes it jump.

    Source:
        Bai et al., On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a Large-scale
        Competition, arXiv:2106.03062. torchmetrics 1.9 averages over the reference images in place of the samples.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    distance = frechet_distance_from_features(samples, reference)
    closest = torch.zeros(len(samples), dtype=torch.float64)
    for at, _, cosines in score_blocks(samples, reference if training is None else training, "cosine"):
        closest[at] = torch.maximum(closest[at], cosines.double().abs().amax(1).cpu())
    penalty = float((1 - closest.clamp(max=1)).mean())
    if distance < 1e-8:
        return 0.0
    return distance if penalty >= eps else distance / penalty if penalty > 0 else float("inf")


def _block(name: str, rows: Rows, start: int) -> Tensor:
    device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
    return float64_rows(name, rows, slice(start, min(start + _ROWS, len(rows))), device)
