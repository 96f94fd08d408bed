"""Are two sets of images of one kind? A permutation test on a kernel, without any classifier."""

import torch
from torch import Tensor

from lightning_mem.metrics.neighbors import Rows
from lightning_mem.metrics.similarities import float64_rows
from lightning_mem.randomness import generator


def two_sample_p_value(
    first: Rows, second: Rows, *, permutations: int = 999, at_most: int = 512, seed: int = 0
) -> float:
    r"""Probability of so large a difference between two sets if both were drawn alike.

    .. math:: p = \frac{1 + \#\{\pi : \mathrm{MMD}^2_\pi \ge \mathrm{MMD}^2\}}{1 + P}, \qquad
        \mathrm{MMD}^2 = \frac{1}{n^2}\sum_{i,j} k(x_i, x_j) + \frac{1}{m^2}\sum_{i,j} k(y_i, y_j)
        - \frac{2}{nm}\sum_{i,j} k(x_i, y_j)

    with k(x, y) = exp(-|x - y|^2 / median of |x - y|^2 over all pairs) and P random exchanges of the two sets. Exact at
    every size: of sets drawn alike a share p comes out at p or below.

    Args:
        first: [n >= 2, ...] images or features.
        second: [m >= 2, ...] of the same trailing shape.
        permutations: P, at least 19.
        at_most: Rows of each side that are looked at, at least 2; more are cut by an addressed draw.
        seed: Of both draws.

    Returns:
        p in (0, 1]; 1 where all rows are equal.

    Raises:
        ValueError: If a side has fewer than 2 rows, row sizes differ, or an option is out of range.

    Undefined when:
        Rows of a side are not drawn independently, e.g. frames of one film.

    Source:
        Gretton et al., A Kernel Two-Sample Test, JMLR 13 (2012), eq. 5 and section 5; the median heuristic is theirs;
        p: Phipson and Smyth (2010).
    """
    if permutations < 19 or at_most < 2:
        raise ValueError(f"permutations must be at least 19 and at_most at least 2, got {permutations} and {at_most}")
    if first.shape[1:] != second.shape[1:] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"both sides need at least 2 rows of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    sides = [_cut(name, rows, at_most, seed) for name, rows in (("first", first), ("second", second))]
    n, m = len(sides[0]), len(sides[1])
    rows = torch.cat(sides)
    lengths = rows.square().sum(1)
    squares = (lengths[:, None] + lengths - 2 * rows @ rows.T).clamp(min=0)
    middle = squares[~torch.eye(n + m, dtype=torch.bool)].median()
    if middle == 0:
        middle = squares.mean()
        if middle == 0:
            return 1.0
    kernel = torch.exp(-squares / middle)
    draw = generator(seed, "two-sample")
    orders = torch.stack([torch.arange(n + m), *(torch.randperm(n + m, generator=draw) for _ in range(permutations))])
    # weights of each row: 1/n on one side, -1/m on the other; the statistic is their quadratic form
    weights = torch.full((n + m, permutations + 1), -1 / m, dtype=torch.float64)
    weights.scatter_(0, orders[:, :n].T, 1 / n)
    values = (weights * (kernel @ weights)).sum(0)
    return (1 + int((values[1:] >= values[0] - 1e-12).sum())) / (1 + permutations)


def _cut(name: str, rows: Rows, at_most: int, seed: int) -> Tensor:
    if len(rows) <= at_most:
        return float64_rows(name, rows, slice(0, len(rows)), torch.device("cpu"))
    chosen = torch.randperm(len(rows), generator=generator(seed, "two-sample", name))[:at_most].sort().values
    part = rows[chosen] if isinstance(rows, Tensor) else rows[chosen.numpy()]
    return float64_rows(name, part, slice(0, at_most), torch.device("cpu"))
