"""Fréchet distance at infinitely many images: its bias falls as 1/n, so a line in 1/n is followed to 0."""

import torch
from torch import Tensor

from lightning_mem.metrics.frechet import FeatureStatistics, frechet_distance, frechet_distance_from_features
from lightning_mem.metrics.intervals import check_level, leave_out_interval
from lightning_mem.metrics.neighbors import Rows
from lightning_mem.randomness import generator


def frechet_infinity(samples: Rows, reference: Rows | FeatureStatistics, *, parts: int = 5) -> float:
    r"""Fréchet distance extrapolated to infinitely many images.

    Its expectation at n images is :math:`F_\infty + C/n` plus terms that fall faster. For m = 1 .. ``parts``, the
    samples are dealt into m equal parts, in an order drawn once, the distances of the parts are averaged, and the line

    .. math:: \bar F_m = F_\infty + C \, m / n

    is fitted to them by least squares; its value at 0 is the answer. Every sample counts at every m.

    Args:
        samples: [n, d] features of samples.
        reference: [r, d] features of reference images: they are dealt into parts too, and both biases are taken off. Or
            their :class:`FeatureStatistics`: these are taken as they are, and the bias of their own n stays.
        parts: Most parts, at least 2; each must hold more rows than there are features.

    Returns:
        The distance; as an estimate it may be slightly below 0. :func:`frechet_infinity_interval` says how sure it is.

    Raises:
        ValueError: If a side has too few rows (the message says how many it needs), or as :func:`frechet_distance`.

    Undefined when:
        Parts are only a little larger than d: the terms left out are not small there. The literature takes parts of
        5,000 and more at d = 2,048.

    Source:
        Chong and Forsyth, Effectively Unbiased FID and Inception Score, arXiv:1911.07023. They draw the subsets at
        random; dealing all rows leaves less noise.
    """
    first, second = _checked_sides(samples, reference, parts)
    return _extrapolated(first, second, parts)


def frechet_infinity_interval(
    samples: Rows, reference: Rows | FeatureStatistics, *, parts: int = 5, blocks: int = 20, level: float = 0.95
) -> tuple[float, float]:
    """Block jackknife interval of :func:`frechet_infinity`, for the distance of infinitely many images.

    Blocks of samples, and of reference images where features are given, are left out in turn; the part a row was dealt
    into stays. It takes ``blocks * parts * (parts + 1) / 2`` distances.

    Args:
        samples: [n, d] features of samples.
        reference: [r, d] features of reference images, or their :class:`FeatureStatistics`, taken as exact.
        parts: Most parts, at least 2.
        blocks: At least 2.
        level: Of confidence, in (0, 1).

    Returns:
        ``(low, high)``; it may reach below 0.

    Raises:
        ValueError: As :func:`frechet_infinity`, or if a number is outside its range.

    Undefined when:
        The true distance is (nearly) 0: there the distance is flat, and the estimate is not normally distributed.
    """
    if blocks < 2:
        raise ValueError(f"blocks must be at least 2, got {blocks}")
    check_level(level)
    first, second = _checked_sides(samples, reference, parts)
    whole = _extrapolated(first, second, parts)
    without = [_extrapolated(first, second, parts, blocks, block) for block in range(blocks)]
    return leave_out_interval(whole, torch.tensor(without, dtype=torch.float64), level)


def _checked_sides(
    samples: Rows, reference: Rows | FeatureStatistics, parts: int
) -> tuple[Tensor, Tensor | FeatureStatistics]:
    if parts < 2:
        raise ValueError(f"parts must be at least 2, a line needs two points, got {parts}")
    sides = [("samples", samples)] + ([] if isinstance(reference, FeatureStatistics) else [("reference", reference)])
    tensors = [torch.as_tensor(rows).detach() for _, rows in sides]
    for (name, _), rows in zip(sides, tensors, strict=True):
        if rows.ndim != 2:
            raise ValueError(f"{name} must be [n, d] features, got {tuple(rows.shape)}")
        least = parts * (rows.shape[1] + 1)
        if len(rows) < least:
            raise ValueError(
                f"{name} needs at least {least} rows for {parts} parts of more rows than its {rows.shape[1]} features, "
                f"got {len(rows)}: draw more, take fewer parts or a narrower extractor, or report the plain distance"
            )
    return tensors[0], reference if isinstance(reference, FeatureStatistics) else tensors[1]


def _extrapolated(
    samples: Tensor, reference: Tensor | FeatureStatistics, parts: int, blocks: int = 1, skip: int = -1
) -> float:
    """The fitted line's value at 0, without the rows of block ``skip``."""
    points, values = [], []
    for count in range(1, parts + 1):
        distances = []
        for part in range(count):
            rows = samples[_dealt(len(samples), part, count, blocks, skip)]
            if isinstance(reference, FeatureStatistics):
                own = FeatureStatistics.from_features(rows)
                distances.append(frechet_distance(own.mu, own.sigma, reference.mu, reference.sigma))
            else:
                others = reference[_dealt(len(reference), part, count, blocks, skip)]
                distances.append(frechet_distance_from_features(rows, others))
        points.append(float(count))
        values.append(sum(distances) / count)
    x, y = (torch.tensor(column, dtype=torch.float64) for column in (points, values))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


def _dealt(n: int, part: int, count: int, blocks: int, skip: int) -> Tensor:
    """Rows of one part of ``count``, without those of one block; a row's block does not depend on its part."""
    order = torch.randperm(n, generator=generator(0, "extrapolation"))  # an order by label would part the labels
    return order[part::count][order[part::count] % blocks != skip]
