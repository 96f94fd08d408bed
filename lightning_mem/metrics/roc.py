"""Telling members from held-out images by a score: the exact step curve, the area under it, and how sure both are."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from lightning_mem.metrics.intervals import check_level, wilson_interval
from lightning_mem.metrics.neighbors import Rows

Point = Literal["at_most", "nearest"]
"""Which point of the curve stands for a false positive rate: the best one that stays within it, or the nearest."""


@dataclass(frozen=True)
class Roc:
    """The curve of "member where score >= threshold" over all thresholds, its points where a score occurs.

    Args:
        thresholds: float64 [P], descending; the first is infinity (nobody is called a member).
        true_positives: int64 [P], members with a score of at least the threshold.
        false_positives: int64 [P], held-out images with a score of at least the threshold.
    """

    thresholds: Tensor
    true_positives: Tensor
    false_positives: Tensor

    @property
    def num_members(self) -> int:
        """How many members."""
        return int(self.true_positives[-1])

    @property
    def num_heldout(self) -> int:
        """How many held-out images."""
        return int(self.false_positives[-1])

    @property
    def tpr(self) -> Tensor:
        """Share of members called members, float64 [P], from 0 to 1."""
        return self.true_positives.double() / self.num_members

    @property
    def fpr(self) -> Tensor:
        """Share of held-out images called members, float64 [P], from 0 to 1."""
        return self.false_positives.double() / self.num_heldout

    @property
    def auc(self) -> float:
        """Probability that a member scores higher than a held-out image, a tie counted half (Mann-Whitney)."""
        members, heldout = self.true_positives.diff(), self.false_positives.diff()
        below = self.num_heldout - self.false_positives[1:]
        return int((members * (2 * below + heldout)).sum()) / (2 * self.num_members * self.num_heldout)

    @property
    def auc_folded(self) -> float:
        """max(AUC, 1 - AUC): what an attacker reaches who knows which way the score leaks."""
        return max(self.auc, 1 - self.auc)

    @property
    def balanced_accuracy(self) -> float:
        """Largest (TPR + 1 - FPR) / 2 over thresholds; chosen on the very scores it is measured on, so too high."""
        return float((self.tpr + 1 - self.fpr).max()) / 2

    def balanced_accuracy_at(self, threshold: float) -> float:
        """(TPR + 1 - FPR) / 2 at a threshold that was chosen elsewhere."""
        place = int((self.thresholds >= threshold).sum()) - 1
        return float(self.tpr[place] + 1 - self.fpr[place]) / 2

    def tpr_at(self, fpr: float, point: Point = "at_most") -> float:
        """Share of members found at a false positive rate.

        Args:
            fpr: In [0, 1].
            point: ``at_most`` takes the largest TPR whose FPR does not exceed ``fpr``; ``nearest`` the point whose FPR
                is nearest (the larger TPR among equals), as SecMI's release does: it may exceed ``fpr``.

        Raises:
            ValueError: If fpr is outside [0, 1] or the point is unknown.

        Undefined when:
            ``fpr`` times the number of held-out images is below 1: the value then is the TPR at no false positive.
        """
        self._check(fpr)
        if point == "at_most":
            return float(self.tpr[self._place(fpr)])
        if point != "nearest":
            raise ValueError(f"point must be at_most or nearest, got {point!r}")
        away = (self.fpr - fpr).abs()
        return float(self.tpr[away == away.min()].max())

    def threshold_at(self, fpr: float) -> float:
        """The smallest threshold whose FPR does not exceed ``fpr``; infinity where none does."""
        self._check(fpr)
        return float(self.thresholds[self._place(fpr)])

    def auc_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Interval of the AUC: DeLong's variance on the logit scale, Newcombe's interval where that variance is 0.

        .. math:: \mathrm{var}\,\hat A = \frac{\mathrm{var}_i\,P(x_i > Y)}{m} + \frac{\mathrm{var}_j\,P(X > y_j)}{n}

        Args:
            level: Of confidence, in (0, 1).

        Returns:
            ``(low, high)`` in [0, 1].

        Raises:
            ValueError: If the level is outside (0, 1).

        Source:
            DeLong et al., Biometrics 44 (1988); logit: Qin and Hotilovac, Stat. Methods Med. Res. 17 (2008);
            perfect separation: Newcombe, Statistics in Medicine 25 (2006) 559, method 5.
        """
        check_level(level)
        z, auc = NormalDist().inv_cdf((1 + level) / 2), self.auc
        members, heldout = self.true_positives.diff(), self.false_positives.diff()
        of_members = (self.num_heldout - self.false_positives[1:] + heldout / 2.0).double() / self.num_heldout
        of_heldout = (self.true_positives[:-1] + members / 2.0).double() / self.num_members
        variance = _variance(of_members, members) / self.num_members + _variance(of_heldout, heldout) / self.num_heldout
        if variance == 0 or not 0 < auc < 1:
            return _newcombe(auc, self.num_members, self.num_heldout, z)
        center, half = math.log(auc / (1 - auc)), z * math.sqrt(variance) / (auc * (1 - auc))
        return _logistic(center - half), _logistic(center + half)

    def auc_folded_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of the AUC, folded at 1/2: from 1/2 on where it holds 1/2."""
        low, high = self.auc_interval(level)
        ends = sorted((max(low, 1 - low), max(high, 1 - high)))
        return (0.5, ends[1]) if low <= 0.5 <= high else (ends[0], ends[1])

    def tpr_interval(self, fpr: float, level: float = 0.95) -> tuple[float, float]:
        """Interval of the TPR at a false positive rate of the *population*, without an assumption on the scores.

        The threshold of that rate lies between two order statistics of the held-out scores (binomial); the TPR falls as
        the threshold rises; its Wilson interval is taken at both. Either step may be wrong with half of 1 - level, so
        the interval is rather too wide. With few held-out images it reaches down to 0, as it should.

        Args:
            fpr: In [0, 1].
            level: Of confidence, in (0, 1).

        Raises:
            ValueError: If fpr is outside [0, 1], or the level outside (0, 1).

        Source:
            Order statistics: David and Nagaraja (2003), section 7.1; the combination is ours.
        """
        self._check(fpr)
        check_level(level)
        from scipy.stats import binom  # half a second to import; needed nowhere else

        half = (1 + level) / 2
        tail = (1 - half) / 2
        fewest, most = int(binom.ppf(tail, self.num_heldout, fpr)), int(binom.ppf(1 - tail, self.num_heldout, fpr))
        # that threshold is below the fewest-th largest held-out score, and not below the (most + 1)-th
        surely = self.true_positives[self.false_positives < fewest]
        low = int(surely[-1]) if len(surely) else 0
        high = int(self.true_positives[self.false_positives <= most][-1])
        return wilson_interval(low, self.num_members, half)[0], wilson_interval(high, self.num_members, half)[1]

    def _place(self, fpr: float) -> int:
        return int((self.false_positives <= math.floor(fpr * self.num_heldout * (1 + 1e-12))).nonzero()[-1])

    def _check(self, fpr: float) -> None:
        if not 0 <= fpr <= 1:
            raise ValueError(f"fpr must lie in [0, 1], a fraction, got {fpr}")


def roc(scores_members: Rows, scores_heldout: Rows) -> Roc:
    """The exact curve of a membership score; equal scores share one point.

    Args:
        scores_members: [m >= 1], larger = more likely a member. Infinities are legal.
        scores_heldout: [n >= 1].

    Raises:
        ValueError: If a side is empty or not one-dimensional, or a score is NaN.

    Undefined when:
        Members and held-out images are of different kinds: the score may then tell the kinds apart.

    Source:
        Mann and Whitney (1947); Fawcett, Pattern Recognition Letters 27 (2006), algorithm 1.

    Example:
        >>> found = roc([0.9, 0.8, 0.3], [0.8, 0.1])
        >>> found.auc, found.tpr_at(0.0), found.tpr_at(0.5)
        (0.75, 0.3333333333333333, 1.0)
    """
    sides = []
    for name, given in (("scores_members", scores_members), ("scores_heldout", scores_heldout)):
        scores = torch.as_tensor(given).detach().cpu().double()
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be a non-empty [N], got {tuple(scores.shape)}")
        if scores.isnan().any():
            raise ValueError(f"{name} holds {int(scores.isnan().sum())} values that are NaN, of {len(scores)}")
        sides.append(scores)
    values, place = torch.cat(sides).unique(return_inverse=True)
    own = place[: len(sides[0])], place[len(sides[0]) :]
    counts = [torch.bincount(rows, minlength=len(values)).flip(0).cumsum(0) for rows in own]
    zero = torch.zeros(1, dtype=torch.int64)
    thresholds = torch.cat([torch.tensor([math.inf], dtype=torch.float64), values.flip(0)])
    return Roc(thresholds, torch.cat([zero, counts[0]]), torch.cat([zero, counts[1]]))


def _variance(values: Tensor, times: Tensor) -> float:
    """Sample variance of values that occur ``times`` each; 0 for a single one."""
    n = int(times.sum())
    if n < 2:
        return 0.0
    mean = (values * times).sum() / n
    return float(((values - mean).square() * times).sum() / (n - 1))


def _newcombe(auc: float, m: int, n: int, z: float) -> tuple[float, float]:
    """The values whose own standard error, were they true, allows the one seen."""

    def excess(truth: float) -> float:
        spread = (1 - truth) / (2 - truth) + truth / (1 + truth)
        variance = truth * (1 - truth) * (1 + ((m + n) / 2 - 1) * spread) / (m * n)
        return (truth - auc) ** 2 - z**2 * variance

    def edge(outer: float) -> float:
        inside, outside = auc, outer
        if excess(outside) <= 0:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
        return inside

    return edge(0.0), edge(1.0)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
