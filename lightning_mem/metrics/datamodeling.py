"""The linear datamodeling score: does the sum of a subset's attribution scores foresee the model trained on it?"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from lightning_mem.metrics.intervals import check_level
from lightning_mem.randomness import generator

CHUNK = 1 << 21
"""Ranks that are made at once while resampling."""

BOOTSTRAP = "bootstrap over subsets and queries 95%"
"""The interval, as it stands in a definition."""


def subset_predictions(scores: Tensor | np.ndarray, masks: Tensor | np.ndarray) -> Tensor:
    r"""What scores foresee for models trained on subsets: :math:`g_q(S) = \sum_{i \in S} \tau_{q i}`.

    Args:
        scores: :math:`\tau` [Q, N], ``attribution_score`` of every training image for every query.
        masks: bool [M, N]; row m names the images of subset m.

    Returns:
        float64 [M, Q].

    Raises:
        ValueError: If the shapes disagree, the masks are not bool, or a score is not finite.
    """
    tau, inside = torch.as_tensor(scores), torch.as_tensor(masks)
    if inside.dtype != torch.bool:
        raise ValueError(f"masks must be bool [M, N], got {inside.dtype} {tuple(inside.shape)}")
    if tau.ndim != 2 or inside.ndim != 2 or tau.shape[1] != inside.shape[1]:
        raise ValueError(
            f"scores must be [queries, images] and masks [subsets, images] of the same images, got "
            f"{tuple(tau.shape)} and {tuple(inside.shape)}"
        )
    _check_finite(tau, "scores")
    return inside.double() @ tau.double().T


def linear_datamodeling_score(
    scores: Tensor | np.ndarray, masks: Tensor | np.ndarray, outputs: Tensor | np.ndarray
) -> Tensor:
    r"""Spearman's correlation, over subsets, of what the scores foresee and of what the trained models do.

    .. math:: \mathrm{LDS}_q = \rho_S\Big(\Big\{\sum_{i \in S_m} \tau_{q i}\Big\}_m,\ \{f_q(S_m)\}_m\Big)

    Ties get the mean of their ranks.

    Args:
        scores: :math:`\tau` [Q, N], ``attribution_score``: larger = the image helps the query.
        masks: bool [M, N], M >= 2; row m names the images that model m was trained on.
        outputs: f [M, Q], of model m on query q, larger = better: the *negative* of a loss.

    Returns:
        float64 [Q] in [-1, 1]; NaN for a query whose predictions or outputs are the same for all subsets.

    Raises:
        ValueError: If the shapes disagree, the masks are not bool, there are fewer than 2 subsets, or a number is not
            finite.

    Undefined when:
        All subsets are of one kind (NaN), or each model saw its own noise when its output was taken.

    Source:
        Park et al., arXiv:2303.14186; for diffusion models Zheng et al., arXiv:2311.00500.

    Example:
        >>> masks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.bool)
        >>> linear_datamodeling_score([[0.1, 0.2, 0.3]], masks, torch.tensor([[1.0], [2.0], [3.0]])).tolist()
        [1.0]
    """
    return rank_correlation(subset_predictions(scores, masks), torch.as_tensor(outputs))


def rank_correlation(predictions: Tensor, outputs: Tensor) -> Tensor:
    """Spearman's correlation of each column of two float [M, Q], over the M >= 2 rows; NaN for a constant column.

    Raises:
        ValueError: If the shapes disagree, there are fewer than 2 rows, or a number is not finite.
    """
    if predictions.ndim != 2 or predictions.shape != outputs.shape or len(predictions) < 2:
        raise ValueError(
            "predictions and outputs must both be [subsets, queries] with at least 2 subsets, got "
            f"{tuple(predictions.shape)} and {tuple(outputs.shape)}"
        )
    _check_finite(predictions, "predictions")
    _check_finite(outputs, "outputs")
    return _spearman(predictions.double().T.contiguous(), outputs.double().T.contiguous())


@dataclass(frozen=True)
class DatamodelingComparison:
    """Several ways to foresee the same models, each with its score, on the same resamples.

    Args:
        scores: Mean score over the queries, by name.
        resampled: float64 [R] by name: the same of every resample; place r is the same resample for all.
        tail: Share of the resamples below the lower end of an interval, and above its upper end.
    """

    scores: Mapping[str, float]
    resampled: Mapping[str, Tensor]
    tail: float

    def interval(self, name: str) -> tuple[float, float]:
        """Of one score."""
        return self._ends(self.resampled[name])

    def difference(self, name: str, other: str) -> tuple[float, float, float]:
        """By how much the first is above the second, paired: ``(difference, low, high)``."""
        low, high = self._ends(self.resampled[name] - self.resampled[other])
        return self.scores[name] - self.scores[other], low, high

    def _ends(self, values: Tensor) -> tuple[float, float]:
        ends = torch.tensor([self.tail, 1 - self.tail], dtype=torch.float64)
        low, high = values[~values.isnan()].quantile(ends).tolist()
        return low, high


def compare_datamodeling_scores(
    predictions: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor] | Tensor,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> DatamodelingComparison:
    r"""Mean scores over queries, with a percentile bootstrap that draws subsets *and* queries again, both at once.

    Queries alone would say how another draw of queries changes the score of *these* models; most of the doubt is in the
    models, which all queries share (Owen). Percentiles of few rows are too narrow: with n the smaller of both numbers,
    the tails are (Hesterberg)

    .. math:: \Phi\big(-\sqrt{n / (n - 1)}\; t_{n - 1, (1 + \text{level}) / 2}\big)

    Args:
        predictions: [M, Q] by name; see :func:`subset_predictions`.
        outputs: [M, Q], larger = better; or, by name, those that each is held against.
        level: Of confidence, in (0, 1).
        resamples: How many draws, at least 20.
        seed: Of the draws; they come from ``generator(seed, "datamodeling")``.

    Raises:
        ValueError: If a number is outside its range, the shapes disagree, or a score of a single query does not exist
            (it says how many).

    Undefined when:
        There are fewer than about 8 subsets: few resamples have a score then.

    Source:
        Owen, The pigeonhole bootstrap, arXiv:0712.1111; Hesterberg, What teachers should know about the bootstrap,
        arXiv:1411.5279 (the expanded percentile interval).
    """
    check_level(level)
    if resamples < 20:
        raise ValueError(f"resamples must be at least 20, got {resamples}")
    held = {name: outputs if isinstance(outputs, Tensor) else outputs[name] for name in predictions}
    shapes = {tuple(part.shape) for part in (*predictions.values(), *held.values())}
    if len(shapes) != 1:
        raise ValueError(f"all predictions and outputs must have one shape [subsets, queries], got {sorted(shapes)}")
    scores = {}
    for name, own in predictions.items():
        found = rank_correlation(own, held[name])
        if found.isnan().any():
            raise ValueError(
                f"{int(found.isnan().sum())} of {len(found)} queries have no score by {name}: its predictions, or the "
                "outputs, are the same for all subsets"
            )
        scores[name] = float(found.mean())
    ((subsets, queries),) = shapes
    draw = generator(seed, "datamodeling")
    rows = torch.randint(subsets, (resamples, subsets), generator=draw)
    columns = torch.randint(queries, (resamples, queries), generator=draw)
    resampled = {
        name: _resampled(own.double(), held[name].double(), rows, columns) for name, own in predictions.items()
    }
    return DatamodelingComparison(scores, resampled, _tail(min(subsets, queries), level))


def _tail(n: int, level: float) -> float:
    """Of an expanded percentile interval."""
    from scipy.stats import t  # half a second to import; needed nowhere else

    if n < 2:
        return (1 - level) / 2
    return NormalDist().cdf(-((n / (n - 1)) ** 0.5) * float(t.ppf((1 + level) / 2, n - 1)))


def _resampled(predictions: Tensor, outputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean score of every resample, float64 [R]; over the queries that have one, NaN where none has."""
    found = []
    size = max(1, CHUNK // predictions.numel())
    for own, chosen in zip(rows.split(size), columns.split(size), strict=True):
        pairs = (part[own].transpose(1, 2).contiguous() for part in (predictions, outputs))
        found.append(_spearman(*pairs).gather(1, chosen).nanmean(1))
    return torch.cat(found)


def _spearman(one: Tensor, other: Tensor) -> Tensor:
    """Of the last dimension of two float64 [..., M]; NaN where one is constant."""
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_ranks(one), _ranks(other)))
    scale = a.square().sum(-1) * b.square().sum(-1)
    return ((a * b).sum(-1) / scale.sqrt()).clamp(-1, 1)


def _ranks(values: Tensor) -> Tensor:
    """Twice the ranks of the last dimension, ties at their mean: whole numbers, so that sums of them are exact."""
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True)).double()


def _check_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {values.numel()} {what} are not finite")
