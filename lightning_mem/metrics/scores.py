"""SIDE's scores: how many samples come close to a training image (AMS), and how many training images are met (UMS)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mem.metrics.neighbors import Rows

Closer = Literal["larger", "smaller"]
"""Which scores are closer: larger ones (a similarity) or smaller ones (a distance)."""

Pairs = Literal["any", "nearest"]
"""Which pairs of sample and training image count for UMS: all, or each sample's closest only."""

Bands = Mapping[str, tuple[float, float]]
"""Name of a band to its ends, ``low <= score < high``."""

SSCD_BANDS: dict[str, tuple[float, float]] = {"low": (0.4, 0.5), "mid": (0.5, 0.6), "high": (0.6, math.inf)}
"""SIDE's bands of SSCD cosines; 0.4, the lower end of ``low``, is read off its tables."""


def average_memorization_score(similarities: Rows, bands: Bands, *, closer: Closer = "larger") -> dict[str, float]:
    r"""Share of samples whose closest training image lies in a band (SIDE's AMS).

    .. math:: \frac{1}{N_G} \sum_i 1[\text{low} \le \max_j \gamma(x_i, x_j) < \text{high}]

    with the minimum in place of the maximum where smaller scores are closer. Every band holds its lower end and not its
    upper one, whichever scores are closer, so a score on the edge of two bands is counted once; ends are rounded to the
    scores' precision. The band of the closest copies therefore ends at ``math.inf`` for a cosine (1.0 would leave
    exact copies out) and starts at 0 for a distance. Bands are counted one by one: they may overlap.

    Args:
        similarities: [samples, members] scores of each sample with each training image, floats.
        bands: Name of a band to ``(low, high)``, low below high; ends may be infinite.
        closer: ``larger`` for similarities, ``smaller`` for distances.

    Returns:
        Name to share, in [0, 1]; :func:`wilson_interval` gives its interval.

    Raises:
        ValueError: If the scores are malformed or not finite, or a band is.

    Undefined when:
        Banks of different sizes are compared: more training images bring the closest one closer.

    Source:
        SIDE, arXiv:2410.02467 v7; there both ends of a band belong to it, so that edges count twice.

    Example:
        >>> average_memorization_score(torch.tensor([[0.5, 0.1], [0.2, 0.3]]), {"mid": (0.5, 0.6)})
        {'mid': 0.5}
    """
    rows = checked_similarities(similarities, closer)
    check_bands(bands)
    best = rows.amax(1) if closer == "larger" else rows.amin(1)
    return {name: in_band(best, band).double().mean().item() for name, band in bands.items()}


def unique_memorization_score(
    similarities: Rows,
    bands: Bands,
    *,
    closer: Closer = "larger",
    pairs: Pairs = "any",
    groups: Rows | None = None,
) -> dict[str, float]:
    r"""Number of distinct training images that samples meet in a band, over the number of samples (SIDE's UMS).

    .. math:: \frac{1}{N_G} \Bigl| \bigcup_i \{j : \text{low} \le \gamma(x_i, x_j) < \text{high}\} \Bigr|

    With ``pairs="any"``, as in the paper, all training images near a sample count, the runners-up of a near copy
    included: the score may exceed the AMS, and 1. With ``"nearest"`` each sample names its closest only (the lower
    index where two are equal), and the score is at most the AMS.

    Args:
        similarities: [samples, members] scores of each sample with each training image, floats.
        bands: Name of a band to ``(low, high)``, low below high; ends as in :func:`average_memorization_score`.
        closer: ``larger`` for similarities, ``smaller`` for distances.
        pairs: Whether all pairs count or each sample's closest.
        groups: int64 [members]; training images of one group (duplicates) count once. Null: each counts.

    Returns:
        Name to score, at least 0. :func:`jackknife_interval` gives its interval; the bootstrap does not, since a
        resample repeats samples and so loses distinct images.

    Raises:
        ValueError: If the scores are malformed or not finite, a band is, or groups do not fit.

    Undefined when:
        Numbers of samples differ between the scores that are compared: distinct images grow more slowly than samples.

    Source:
        SIDE, arXiv:2410.02467 v7.

    Example:
        >>> copies = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
        >>> unique_memorization_score(copies, {"high": (0.6, 1.1)})
        {'high': 0.5}
    """
    rows = checked_similarities(similarities, closer)
    check_bands(bands)
    check_pairs(pairs)
    group_of = numbered_groups(groups, rows.shape[1])
    scores = {}
    for name, band in bands.items():
        met = in_band(rows, band)
        if pairs == "nearest":
            nearest = rows.argmax(1) if closer == "larger" else rows.argmin(1)
            met &= torch.zeros_like(met).scatter_(1, nearest[:, None], True)
        scores[name] = len(group_of[met.any(0).cpu()].unique()) / len(rows)
    return scores


def memorization_curves(
    similarities: Rows,
    thresholds: Sequence[float],
    *,
    closer: Closer = "larger",
    pairs: Pairs = "any",
    groups: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """AMS and UMS of everything as close as a threshold or closer, for each threshold.

    The half-open bands of :func:`average_memorization_score` from a threshold on, so that values at the edges of bands
    differ by the score of the band between: score >= t where larger is closer, score < t where smaller is.

    Args:
        similarities: [samples, members] scores of each sample with each training image, floats.
        thresholds: At least one, in any order.
        closer: ``larger`` for similarities, ``smaller`` for distances.
        pairs: Which pairs count for UMS.
        groups: int64 [members]; training images of one group count once. Null: each counts.

    Returns:
        Average and unique scores, float64 [thresholds] each.

    Raises:
        ValueError: As :func:`unique_memorization_score`, or if there is no threshold or one is not a number.
    """
    bands = threshold_bands(thresholds, closer)
    average = average_memorization_score(similarities, bands, closer=closer)
    unique = unique_memorization_score(similarities, bands, closer=closer, pairs=pairs, groups=groups)
    curves = [torch.tensor([scores[name] for name in bands], dtype=torch.float64) for scores in (average, unique)]
    return curves[0], curves[1]


def in_band(scores: Tensor, band: tuple[float, float]) -> Tensor:
    """Whether each score lies in ``low <= score < high``, the ends rounded to the scores' precision."""
    low, high = (torch.tensor(end, dtype=torch.float64).to(scores) for end in band)
    return (scores >= low) & (scores < high)


def threshold_bands(thresholds: Sequence[float], closer: Closer) -> dict[str, tuple[float, float]]:
    """A band from each threshold to what is closest, named by its place."""
    check_closer(closer)
    if len(thresholds) == 0 or any(math.isnan(threshold) for threshold in thresholds):
        raise ValueError(f"thresholds must be numbers, at least one, got {list(thresholds)}")
    ends = [(float(t), math.inf) if closer == "larger" else (-math.inf, float(t)) for t in thresholds]
    return {str(place): band for place, band in enumerate(ends)}


def check_bands(bands: Bands) -> None:
    """Refuse an empty mapping and a band that does not ascend."""
    if not bands:
        raise ValueError("bands must name at least one band, e.g. {'high': (0.6, math.inf)}, got none")
    for name, (low, high) in bands.items():
        if not low < high:
            raise ValueError(f"band {name!r} must be (low, high) with low < high, got ({low}, {high})")


def check_closer(closer: str) -> None:
    """Refuse another word than ``larger`` and ``smaller``."""
    if closer not in get_args(Closer):
        raise ValueError(f"closer must be one of {', '.join(get_args(Closer))}, got {closer!r}")


def check_pairs(pairs: str) -> None:
    """Refuse another word than ``any`` and ``nearest``."""
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs must be one of {', '.join(get_args(Pairs))}, got {pairs!r}")


def checked_similarities(similarities: Rows, closer: str) -> Tensor:
    """Scores as a tensor [samples >= 1, members >= 1] of finite floats; infinite ones name no image and are refused."""
    check_closer(closer)
    rows = torch.as_tensor(similarities).detach()
    if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise ValueError(
            f"similarities must be floats [samples >= 1, members >= 1], got {rows.dtype} {tuple(rows.shape)}"
        )
    if not torch.isfinite(rows).all():
        row = int((~torch.isfinite(rows)).nonzero()[0, 0])
        raise ValueError(f"row {row} holds a score that is not finite: draw that sample again, do not drop it")
    return rows


def numbered_groups(groups: Rows | None, members: int) -> Tensor:
    """int64 [members] on the CPU, groups numbered from 0; each its own where none are given."""
    if groups is None:
        return torch.arange(members)
    given = torch.as_tensor(groups)
    if given.shape != (members,) or given.is_floating_point() or given.is_complex():
        raise ValueError(
            f"groups must be int64 [{members}], one per training image, got {given.dtype} {tuple(given.shape)}: "
            "duplicate_groups(bank) makes them"
        )
    return given.cpu().unique(return_inverse=True)[1]
