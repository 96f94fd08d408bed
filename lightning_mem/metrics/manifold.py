"""Precision, recall, density and coverage: do samples lie where the reference images lie, and do they fill it?"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mem.metrics.features import AbstractExtractor, extract_features
from lightning_mem.metrics.intervals import leave_out_interval, wilson_interval
from lightning_mem.metrics.neighbors import CHUNK_BYTES, Rows, nearest_neighbors
from lightning_mem.metrics.similarities import float64_rows, squared_distances

FEWEST_BALLS = 10
"""Reference balls held, and not held, from which on coverage has an interval: below, its normal theory fails."""


@dataclass(frozen=True, eq=False)  # tensors have no single answer to ==
class ManifoldOverlap:
    r"""Which samples lie in which balls: all that precision, recall, density and coverage are counted from.

    The ball of an image reaches to its k-th nearest other image of the same set, its edge included.

    Args:
        k: Neighbours.
        balls: int64 [samples], how many reference balls hold each sample.
        covered: int64 [blocks, references], how many samples of each block each reference ball holds; sample i is in
            block ``i % blocks``.
        recalled: bool [references], whether a sample's ball holds the reference image.
    """

    k: int
    balls: Tensor
    covered: Tensor
    recalled: Tensor

    @property
    def precision(self) -> float:
        """Share of samples in at least one reference ball, in [0, 1]."""
        return (self.balls > 0).double().mean().item()

    @property
    def recall(self) -> float:
        """Share of reference images in at least one sample's ball, in [0, 1]."""
        return self.recalled.double().mean().item()

    @property
    def density(self) -> float:
        """Mean number of reference balls that hold a sample, over k; at least 0, may exceed 1."""
        return self.balls.double().mean().item() / self.k

    @property
    def coverage(self) -> float:
        """Share of reference balls that hold at least one sample, in [0, 1]."""
        return (self.covered.sum(0) > 0).double().mean().item()

    def values(self) -> dict[str, float]:
        """The four by name."""
        return {name: getattr(self, name) for name in ("precision", "recall", "density", "coverage")}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Intervals over the draw of the samples, the reference being what it is.

        Precision has Wilson's, density a block jackknife's, coverage too, cut to [0, 1]: it counts distinct images.
        Null where no honest one exists: recall (a sample's ball changes with the others, and not smoothly), density and
        coverage with fewer samples than blocks, coverage with fewer than ``FEWEST_BALLS`` balls held or not held.
        """
        n, blocks = len(self.balls), len(self.covered)
        found: dict[str, tuple[float, float] | None] = dict.fromkeys(("precision", "recall", "density", "coverage"))
        found["precision"] = wilson_interval(int((self.balls > 0).sum()), n, level)
        if n < blocks or blocks < 2:
            return found
        sizes = torch.bincount(torch.arange(n) % blocks, minlength=blocks)
        balls = self.balls.cpu().double()
        per_block = torch.zeros(blocks, dtype=torch.float64).index_add_(0, torch.arange(n) % blocks, balls)
        without = (balls.sum() - per_block) / (n - sizes) / self.k
        low, high = leave_out_interval(self.density, without, level)
        found["density"] = max(0.0, low), high
        held = self.covered > 0
        hit = int(held.any(0).sum())
        if min(hit, held.shape[1] - hit) >= FEWEST_BALLS:
            lost = (held & (held.sum(0) == 1)).sum(1)  # held by this block's samples and no others
            without = self.coverage - lost.cpu().double() / held.shape[1]
            low, high = leave_out_interval(self.coverage, without, level)
            found["coverage"] = max(0.0, low), min(1.0, high)
        return found


def neighborhood_radii(features: Rows, k: int = 5, *, chunk_bytes: int | None = None) -> Tensor:
    """Distance of each row to its k-th nearest other row of the same set.

    Args:
        features: [N, d], N above k.
        k: At least 1. Equal rows are neighbours at distance 0: with k of them the radius is 0.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Returns:
        float32 [N].

    Raises:
        ValueError: If k is below 1, there are too few rows, or a value is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(features) <= k:
        raise ValueError(f"{k} nearest others need at least {k + 1} rows, got {len(features)}: draw more or lower k")
    return nearest_neighbors(features, features, k + 1, chunk_bytes=chunk_bytes)[0][:, k]  # itself comes first


@torch.no_grad()
def manifold_overlap(
    samples: Rows,
    reference: Rows,
    k: int = 5,
    *,
    radii: Tensor | None = None,
    blocks: int = 20,
    chunk_bytes: int | None = None,
) -> ManifoldOverlap:
    """Which samples lie in which balls around reference features, and the other way round.

    Exact: distances are compared as :func:`nearest_neighbors` gives them (float64, rounded to float32), so a sample
    that equals a reference image lies on the edge of a ball where that image does, and edges belong to the balls.

    Args:
        samples: [n, d] features of samples, n above k.
        reference: [m, d] features of reference images, m above k.
        k: Neighbours, at least 1.
        radii: :func:`neighborhood_radii` of the reference at this k. Null: they are computed.
        blocks: Blocks of samples that intervals leave out in turn, at least 1.
        chunk_bytes: Working memory in bytes; the n x m matrix is never held. Null: 512 MiB.

    Returns:
        The counts, from which all four numbers follow.

    Raises:
        ValueError: If widths differ, a side has too few rows, a value is not finite, or a number is outside its range.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"samples and reference must be [n, d] features of one width, got {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}: extract both with one extractor"
        )
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    own = neighborhood_radii(samples, k, chunk_bytes=chunk_bytes)
    device = own.device
    radii = neighborhood_radii(reference, k, chunk_bytes=chunk_bytes) if radii is None else radii
    if radii.shape != (len(reference),):
        raise ValueError(f"radii must be [{len(reference)}], one per reference image, got {tuple(radii.shape)}")
    radii = radii.to(device, torch.float32)
    dim = samples.shape[1]
    budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    rows_held = max(1, min(budget // (64 * dim), math.isqrt(budget // 128)))
    block_of = torch.arange(len(samples), device=device) % blocks
    balls = torch.zeros(len(samples), dtype=torch.int64, device=device)
    covered = torch.zeros(blocks, len(reference), dtype=torch.int64, device=device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for start in range(0, len(reference), rows_held):
        at = slice(start, min(start + rows_held, len(reference)))
        chunk = float64_rows("reference", reference, at, device)
        for first in range(0, len(samples), rows_held):
            rows = slice(first, min(first + rows_held, len(samples)))
            part = float64_rows("samples", samples, rows, device)
            distances = _distances(part, chunk, own[rows], radii[at], rows_held)
            inside = distances <= radii[at]
            balls[rows] += inside.sum(1)
            covered[:, at].index_add_(0, block_of[rows], inside.long())
            recalled[at] |= (distances <= own[rows, None]).any(0)
    return ManifoldOverlap(k, balls, covered, recalled)


def prdc(samples: Rows, reference: Rows, k: int = 5, *, chunk_bytes: int | None = None) -> dict[str, float]:
    r"""Precision, recall, density and coverage of samples against reference images, in a feature space.

    With :math:`B_k(y)` the closed ball around y up to its k-th nearest other image of the same set, samples x and
    reference images y,

    .. math:: \text{precision} = \tfrac1n \sum_x 1[x \in \cup_y B_k(y)], \quad
        \text{recall} = \tfrac1m \sum_y 1[y \in \cup_x B_k(x)], \quad
        \text{density} = \tfrac1{kn} \sum_{x,y} 1[x \in B_k(y)], \quad
        \text{coverage} = \tfrac1m \sum_y 1[\exists x \in B_k(y)]

    Args:
        samples: [n, d] features of samples, n above k.
        reference: [m, d] features of reference images, m above k.
        k: Neighbours, at least 1. 3 is used for precision and recall, 5 for density and coverage.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Returns:
        The four by name. Higher is better; density may exceed 1. ``manifold_overlap(...).intervals()`` gives intervals.

    Raises:
        ValueError: As :func:`manifold_overlap`.

    Undefined when:
        Numbers of images or k differ between the values that are compared. Exact duplicates in the reference shrink
        its balls, with k + 1 copies to a point: deduplicate first. Copies of training images score well here: these
        numbers measure quality and variety, not memorization.

    Source:
        Kynkäänniemi et al., arXiv:1904.06991 (precision, recall; edges belong to the ball, as in torch-fidelity);
        Naeem et al., arXiv:2002.09797 (density, coverage; their public code leaves edges out, which differs only where
        distances are equal).
    """
    return manifold_overlap(samples, reference, k, blocks=1, chunk_bytes=chunk_bytes).values()


def precision_recall(
    samples: Rows, reference: Rows, k: int = 3, *, chunk_bytes: int | None = None
) -> tuple[float, float]:
    """Precision and recall (:func:`prdc`, with its arguments, errors and limits) at the k they are published with.

    Returns:
        ``(precision, recall)``, each in [0, 1], higher is better.
    """
    found = manifold_overlap(samples, reference, k, blocks=1, chunk_bytes=chunk_bytes)
    return found.precision, found.recall


class PrecisionRecallDensityCoverage(Metric):
    """Precision, recall, density and coverage of images against a fixed reference (:func:`prdc`).

    Higher is better; precision, recall and coverage in [0, 1]; from k + 1 images on. Compare at equal numbers of
    images. The state holds the features of all samples (float32), which processes gather. The reference is a plain
    attribute.

    Args:
        reference: [m, d] features of the reference images, m above k.
        extractor: The one the reference was extracted with.
        k: Neighbours, at least 1.
        block: Images per call of the network.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Raises:
        ValueError: If the reference has too few rows or another width than the extractor's features.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    features: list[Tensor] | Tensor  # one tensor once processes have gathered

    def __init__(
        self,
        reference: Rows,
        extractor: AbstractExtractor,
        k: int = 5,
        *,
        block: int = 64,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if reference.ndim != 2 or extractor.dim not in (None, reference.shape[1]):
            raise ValueError(
                f"reference must be [m, {extractor.dim}] features of {extractor.name}, got {tuple(reference.shape)}"
            )
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.radii = neighborhood_radii(reference, k, chunk_bytes=chunk_bytes)
        self.reference, self.extractor, self.k = reference, extractor, k
        self.block, self.chunk_bytes = block, chunk_bytes
        self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Take in uint8 images [B, C, H, W]."""
        features = extract_features(images, self.extractor, block=self.block)
        if features.shape[1] != self.reference.shape[1]:
            raise ValueError(
                f"reference has {self.reference.shape[1]} features, these images give {features.shape[1]}: "
                "images and reference must have the same shape and extractor"
            )
        cast(list[Tensor], self.features).append(features)

    def sync(self, *given: Any, **options: Any) -> None:
        """Gather the processes' states (torchmetrics' own, which knows no shape where a process saw no image)."""
        if isinstance(self.features, list) and not self.features:
            self.features.append(torch.empty(0, self.reference.shape[1], device=self.device))
        super().sync(*given, **options)

    def overlap(self) -> ManifoldOverlap:
        """The counts over the samples held; its ``intervals`` say how sure the numbers are.

        Raises:
            ValueError: If k images or fewer were given.
        """
        n = len(self.features) if isinstance(self.features, Tensor) else sum(len(part) for part in self.features)
        if n <= self.k:
            raise ValueError(f"{type(self).__name__} needs at least {self.k + 1} images for k = {self.k}, got {n}")
        held = dim_zero_cat(self.features)
        return manifold_overlap(held, self.reference, self.k, radii=self.radii, chunk_bytes=self.chunk_bytes)

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density`` and ``coverage``, float64 scalars."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.overlap().values().items()}


def _distances(queries: Tensor, bank: Tensor, own: Tensor, radii: Tensor, pairs_held: int) -> Tensor:
    """float32 [q, n] distances that compare with both sides' radii as direct differences do."""
    squares = squared_distances(queries, bank)
    # the bound of a product's rounding, as in neighbors; within it, and within float32's, a pair is looked at again
    norms = queries.square().sum(1).sqrt()[:, None] + bank.square().sum(1).sqrt()
    error = (queries.shape[1] + 8) * torch.finfo(torch.float64).eps * norms.square_()
    doubtful = torch.zeros(squares.shape, dtype=torch.bool, device=squares.device)
    for edge in (own.double().square()[:, None], radii.double().square()):
        doubtful |= (squares - edge).abs_() <= error + edge * 2.0**-21 + 1e-80
    distances = squares.clamp_(min=0).sqrt_().float()
    pairs = doubtful.nonzero()
    for start in range(0, len(pairs), pairs_held):
        q, b = pairs[start : start + pairs_held].unbind(1)
        distances[q, b] = (queries[q] - bank[b]).square_().sum(1).sqrt_().float()
    return distances
