"""What several runs say together: an interval over seeds, a crossing between sizes, a power law."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_mem.metrics import wilson_interval
from lightning_mem.records import Record

OF_ONE_RUN = ("bank_size", "interval_method", "sample_seed", "target")
"""Keys of a definition that speak of one seed's run; so do all digests."""

OVER_SEEDS = "t over seeds, with wilson over samples for shares, 95%"


def seeds_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    r"""Interval of a mean over seeds.

    .. math:: \bar v \pm t_{k-1} \, s / \sqrt k

    Args:
        values: One number per seed, at least 2.
        level: Of confidence, in (0, 1).

    Returns:
        ``(low, high)``; it may leave the range of the values.

    Raises:
        ValueError: If there are fewer than 2 values or the level is outside (0, 1).

    Undefined when:
        The seeds share what makes them differ, e.g. all were trained on one draw of images.
    """
    count = len(values)
    if count < 2 or not 0 < level < 1:
        raise ValueError(f"values must hold at least 2 numbers and level lie in (0, 1), got {count} and {level}")
    from scipy.stats import t  # half a second to import; needed nowhere else

    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count)
    return mean - half, mean + half


def pooled_share(shares: Sequence[float], n: int) -> tuple[float, float, float]:
    """Mean of a share over seeds, with an interval that is never narrower than either source of doubt alone.

    The interval is the union of :func:`seeds_interval` and the Wilson interval of all samples taken together: the
    first covers what another draw of images and another training would change, the second does not shrink to nothing
    where all seeds agree. One seed has the second only.

    Args:
        shares: One per seed, in [0, 1].
        n: Samples behind each of them, at least 1.

    Returns:
        ``(mean, low, high)`` in [0, 1].

    Raises:
        ValueError: If there is no share, or one is outside [0, 1].
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares must lie in [0, 1] and be at least one, got {list(shares)}")
    total = n * len(shares)
    low, high = wilson_interval(round(math.fsum(shares) * n), total)
    if len(shares) > 1:
        below, above = seeds_interval(shares)
        low, high = max(0.0, min(low, below)), min(1.0, max(high, above))
    return math.fsum(shares) / len(shares), low, high


def pooled_ratio(
    ratios: Sequence[float], intervals: Sequence[tuple[float, float]] = ()
) -> tuple[float, float | None, float | None]:
    r"""Geometric mean of a ratio over seeds, with an interval that is never narrower than either source of doubt alone.

    .. math:: \exp\left(\overline{\log r} \pm \max\left(t_{k-1}\,\frac{s}{\sqrt k},\
        1.96\,\frac{\sqrt{\sum_i \sigma_i^2}}{k}\right)\right)

    s is the deviation of the k logarithms, over seeds; :math:`\sigma_i` is the error within a seed, over its samples:
    the width of its 95 % interval on the logarithmic scale over 3.92. One seed has the second only.

    Args:
        ratios: One per seed, at least 0.
        intervals: Of each, over its samples; empty where they are not known.

    Returns:
        ``(mean, low, high)``; the plain mean without ends where a ratio is 0, or where neither doubt is known.

    Raises:
        ValueError: If there is no ratio, one is negative, or the numbers of ratios and intervals differ.
    """
    if not ratios or min(ratios) < 0 or (intervals and len(intervals) != len(ratios)):
        raise ValueError(f"ratios must be at least 0 and one per interval, got {list(ratios)} and {list(intervals)}")
    if min(ratios) == 0:
        return math.fsum(ratios) / len(ratios), None, None
    logs = [math.log(ratio) for ratio in ratios]
    mean, halves = math.fsum(logs) / len(logs), []
    if intervals and all(low > 0 for low, _ in intervals):
        errors = [math.log(high / low) / 3.92 for low, high in intervals]
        halves.append(1.96 * math.sqrt(math.fsum(error**2 for error in errors)) / len(logs))
    if len(logs) > 1:
        halves.append(seeds_interval(logs)[1] - mean)
    if not halves:
        return math.exp(mean), None, None
    return math.exp(mean), math.exp(mean - max(halves)), math.exp(mean + max(halves))


def level_crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    r"""Where a curve over x leaves a level for good, by linear interpolation.

    With i the last point at or above the level,

    .. math:: x_i + (x_{i+1} - x_i) \frac{y_i - \ell}{y_i - y_{i+1}}

    Args:
        x: Ascending.
        y: As many.
        level: :math:`\ell`.

    Returns:
        The place; null where the curve stays below, or ends at or above, the level: then it lies outside the x given.

    Raises:
        ValueError: If the numbers of x and y differ, or x does not ascend.

    Source:
        Gu et al., arXiv:2310.02664 (effective model memorization is the largest size at or above 0.9; interpolation
        between the sizes is ours).

    Example:
        >>> level_crossing([1000, 2000], [0.92, 0.61], 0.9)
        1064.516129032258
    """
    if len(x) != len(y) or any(b <= a for a, b in pairwise(x)):
        raise ValueError(f"x must ascend and have as many numbers as y, got {list(x)} and {list(y)}")
    above = [place for place, value in enumerate(y) if value >= level]
    if not above or above[-1] == len(y) - 1:
        return None
    i = above[-1]
    return x[i] + (x[i + 1] - x[i]) * (y[i] - level) / (y[i] - y[i + 1])


@dataclass(frozen=True)
class PowerLaw:
    """``y = scale * x ** slope``, with the 95 % interval of the slope.

    Args:
        slope: The exponent.
        low: Lower end of its interval.
        high: Upper end.
        scale: y at x = 1.
        points: How many it was fitted to.
    """

    slope: float
    low: float
    high: float
    scale: float
    points: int

    def __call__(self, x: float) -> float:
        """The law at x."""
        return float(self.scale * x**self.slope)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    r"""Least squares in log-log, :math:`\log y = \log a + b \log x`, with Student's interval for b.

    Args:
        x: Positive, at least 3, not all equal.
        y: As many, positive.

    Raises:
        ValueError: If there are too few points, or one is not positive.

    Undefined when:
        Points are left out because of their y, e.g. sizes whose late runs never reached it: leave out the whole size.
    """
    if len(x) != len(y) or len(x) < 3 or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(
            f"a power law needs at least 3 positive points at 2 or more places, got {list(x)} and {list(y)}"
        )
    from scipy.stats import t  # half a second to import; needed nowhere else

    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    centred = log_x - log_x.mean()
    slope = float(centred @ log_y / (centred @ centred))
    left = log_y - log_y.mean() - slope * centred
    error = math.sqrt(float(left @ left) / (len(x) - 2) / float(centred @ centred))
    half = float(t.ppf(0.975, len(x) - 2)) * error
    return PowerLaw(slope, slope - half, slope + half, math.exp(log_y.mean() - slope * log_x.mean()), len(x))


def pooled_record(
    of: Sequence[Record], value: float, low: float | None, high: float | None, n: int, about: Mapping[str, Any]
) -> Record:
    """A record of several runs; its definition keeps what is equal in all of theirs.

    Args:
        of: One record per run, of one name.
        value: What they say together.
        low: Lower end of its interval; null for none.
        high: Upper end.
        n: What it rests on.
        about: What its definition says besides; without an ``interval`` there, one over seeds is named.
    """
    first = of[0].definition
    kept = {
        key: value
        for key, value in first.items()
        if all(record.definition.get(key) == value for record in of) and key not in OF_ONE_RUN and "digest" not in key
    }
    method = "log t over seeds, with samples 95%" if of[0].unit == "ratio" else OVER_SEEDS
    interval = {} if "interval" in about else {"interval": method}
    return replace(
        of[0], value=value, low=low, high=high, n=n, seed=0, seconds=0.0, data_digest="", config_digest="",
        run="pooled", definition={**kept, **interval, **about},
    )  # fmt: skip
