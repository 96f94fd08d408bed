"""Intervals that say how sure a number is: Wilson for shares, bootstrap for means, jackknife for the rest."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_mem.metrics.neighbors import Rows
from lightning_mem.randomness import generator


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    r"""Interval of a share that was counted.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        successes: How many counted, in 0 .. n.
        n: Of how many, at least 1.
        level: Of confidence, in (0, 1).

    Returns:
        ``(low, high)`` in [0, 1]; low is 0 for no success and high is 1 for nothing else.

    Raises:
        ValueError: If a number is outside its range.

    Undefined when:
        The n are not independent, e.g. many samples of one prompt.

    Source:
        Wilson, Probable Inference, JASA 22 (1927).

    Example:
        >>> [round(end, 4) for end in wilson_interval(0, 100)]
        [0.0, 0.037]
    """
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 .. n with n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    center = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low = 0.0 if successes == 0 else max(0.0, (center - half) / scale)
    high = 1.0 if successes == n else min(1.0, (center + half) / scale)
    return low, high


def bootstrap_interval(
    statistic: Callable[..., Tensor | float],
    *data: Rows,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval: the statistic on rows drawn again with replacement.

    The same rows are drawn from every array, so arms that share their starting noise stay paired.

    Args:
        statistic: Takes the arrays in the order given and returns a number.
        *data: Arrays or tensors with equally many rows, at least 2.
        level: Of confidence, in (0, 1).
        resamples: How many draws, at least 20.
        seed: Of the draws; they come from ``generator(seed, "bootstrap")``.

    Returns:
        ``(low, high)``.

    Raises:
        ValueError: If rows differ in number, a number is outside its range, or the statistic is not finite.

    Undefined when:
        The statistic counts distinct rows or is a Fréchet distance: a resample repeats rows, which both feel. Use
        :func:`jackknife_interval`.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    check_level(level)
    if resamples < 20:
        raise ValueError(f"resamples must be at least 20, got {resamples}")
    tensors = [torch.as_tensor(rows) for rows in data]
    sizes = [len(rows) for rows in tensors]
    if len(set(sizes)) != 1 or sizes[0] < 2:
        raise ValueError(f"data must be arrays with equally many rows, at least 2, got {sizes} rows")
    draw = generator(seed, "bootstrap")
    values = []
    for _ in range(resamples):
        index = torch.randint(sizes[0], (sizes[0],), generator=draw)
        values.append(_finite(statistic(*(rows[index.to(rows.device)] for rows in tensors)), "a resample"))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return low, high


def jackknife_interval(
    statistic: Callable[[Tensor], Tensor | float], n: int, *, blocks: int = 20, level: float = 0.95
) -> tuple[float, float]:
    r"""Block jackknife interval: the statistic without one block of rows at a time.

    .. math:: \hat\theta \pm t_{B-1} \sqrt{\frac{B-1}{B} \sum_j (\hat\theta_{(j)} - \bar\theta)^2}

    It covers the expectation of the statistic *at this n*: a bias that shrinks with n, as the Fréchet distance has,
    is left in. Right for counts of distinct images and Fréchet distances, where the bootstrap is wrong.

    Args:
        statistic: Takes int64 indices of rows, ascending, and returns a number.
        n: Number of rows, at least ``blocks``.
        blocks: B, at least 2; row i is in block ``i % blocks``, so an order by label does no harm.
        level: Of confidence, in (0, 1).

    Returns:
        ``(low, high)``; it may leave the range of the statistic.

    Raises:
        ValueError: If a number is outside its range or the statistic is not finite.

    Undefined when:
        The statistic is not smooth (a median) or the rows are not independent.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 11.5.
    """
    check_level(level)
    if not 2 <= blocks <= n:
        raise ValueError(f"blocks must lie in 2 .. n = {n}, got {blocks}")
    rows = torch.arange(n)
    whole = _finite(statistic(rows), "all rows")
    without = [_finite(statistic(rows[rows % blocks != block]), f"all but block {block}") for block in range(blocks)]
    return leave_out_interval(whole, torch.tensor(without, dtype=torch.float64), level)


def leave_out_interval(whole: float, without: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The interval of :func:`jackknife_interval`, from the statistic of all rows and of all but each block.

    Args:
        whole: The statistic of all rows.
        without: float64 [B >= 2], the statistic without each block.
        level: Of confidence, in (0, 1).

    Returns:
        ``(low, high)``; it may leave the range of the statistic.

    Raises:
        ValueError: If the level is outside (0, 1) or there are fewer than 2 blocks.
    """
    check_level(level)
    blocks = len(without)
    if blocks < 2:
        raise ValueError(f"without must hold at least 2 blocks, got {blocks}")
    from scipy.stats import t  # half a second to import; needed nowhere else

    error = ((blocks - 1) / blocks * (without - without.mean()).square().sum()).sqrt().item()
    half = float(t.ppf((1 + level) / 2, blocks - 1)) * error
    return whole - half, whole + half


def check_level(level: float) -> None:
    """Refuse a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _finite(value: Tensor | float, where: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the statistic of {where} is {number}: it must be a finite number")
    return number
