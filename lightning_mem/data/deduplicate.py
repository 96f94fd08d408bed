"""Deduplication: which images of a set show again what another of it shows, and which of them stays."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_mem.data.random_labels import image_keys
from lightning_mem.data.split import ImageSet, image_digest
from lightning_mem.records import atomic_write

Rule = Literal["exact"] | float
"""``exact``: equal pixel for pixel. A number in (0, 1): at most that far apart, in RMS-L2 on the [0, 1] scale."""

ROWS = 256
"""Images that are compared with the kept ones at a time."""

BYTES = 1 << 27
"""Pixels in float64 that one side of a comparison may take."""

CELLS = 8
"""Side of the grid whose sums tell most pairs apart without a look at their pixels."""


@dataclass(frozen=True)
class DuplicateGroup:
    """An image that stays, and those that it stands for.

    Args:
        kept: Source index of the image that stays, the lowest of the group.
        removed: Source indices of the others, ascending.
        distances: RMS-L2 on [0, 1] of each of these from the one that stays, in the nearer orientation.
    """

    kept: int
    removed: tuple[int, ...]
    distances: tuple[float, ...]


def check_rule(rule: Rule) -> None:
    """Refuse what is no rule.

    Raises:
        ValueError: If it is another word, or a number outside (0, 1).
    """
    if isinstance(rule, str):
        if rule != "exact":
            raise ValueError(f"deduplicate must be exact, a distance in (0, 1), or null, got {rule!r}")
    elif not 0 < rule < 1:
        raise ValueError(f"deduplicate must lie in (0, 1) as a distance (RMS-L2 on [0, 1]), or be exact, got {rule}")


def duplicate_groups(part: ImageSet, rule: Rule, mirror: bool) -> list[DuplicateGroup]:
    r"""Groups of images of which one stays: in the order of the source, an image stays if none that stays is as near.

    .. math:: d(x, y) = \lVert x - y \rVert_2 / (255 \sqrt{D}) \le \delta

    So no two that stay are within delta, each that goes is within delta of the one it goes for (the nearest; of
    equally near ones the lowest index), and neither the order of the set nor the size of a block changes a group. A
    chain, each image near the next, is not one group unless its first is near to all. Distances are sums of integers.

    Args:
        part: The set.
        rule: See :data:`Rule`; ``exact`` is delta 0.
        mirror: A mirror image counts as the image: d is the smaller of both orientations.

    Returns:
        Groups of at least two, ascending by the image that stays.

    Raises:
        ValueError: If the rule is none.

    Source:
        Keeping one of each group is what Carlini et al., arXiv:2301.13188, section 7.1, do to CIFAR-10, by another
        similarity.
    """
    check_rule(rule)
    if len(part) == 0:
        return []
    order = part.indices.argsort()
    stands_for: dict[int, list[tuple[int, float]]] = defaultdict(list)
    found = _equal(part, order, mirror) if rule == "exact" else _near(part.images, order, float(rule), mirror)
    for row, kept, distance in found:
        stands_for[int(part.indices[kept])].append((int(part.indices[row]), distance))
    return [
        DuplicateGroup(kept, *(tuple(column) for column in zip(*sorted(others), strict=True)))
        for kept, others in sorted(stands_for.items())
    ]


def _equal(part: ImageSet, order: Tensor, mirror: bool) -> list[tuple[int, int, float]]:
    """(row, the row it goes for, 0) by content."""
    keys = image_keys(part.images) if mirror else [image_digest(image) for image in part.images.numpy()]
    first: dict[str, int] = {}
    for row in reversed(order.tolist()):
        first[keys[row]] = row
    return [(row, first[keys[row]], 0.0) for row in order.tolist() if first[keys[row]] != row]


def _near(images: Tensor, order: Tensor, delta: float, mirror: bool) -> list[tuple[int, int, float]]:
    """(row, the row it goes for, their distance), each block of rows against those that stay so far and itself."""
    size = images[0].numel()
    limit = (255 * delta) ** 2 * size * (1 + 1e-12)  # a distance that is delta on paper counts
    most = max(1, BYTES // (8 * size))
    sketches = torch.cat([sketch(part) for part in images.split(most)])
    kept, found = torch.empty(0, dtype=torch.int64), []
    blocks = order.split(min(ROWS, most))
    for block in tqdm(blocks, "looking for duplicates", disable=len(order) < 5000, leave=False):
        candidates = torch.cat([kept, block])
        near = _squares(images, sketches, block, candidates, limit, mirror)
        stays = torch.zeros(len(candidates), dtype=torch.bool)
        stays[: len(kept)] = True
        for place, row in enumerate(block.tolist()):
            squares = torch.where(stays, near[place], torch.inf)
            least, column = squares.min(0)  # the first of equal ones: candidates that stay are in source order
            if float(least) <= limit:
                found.append((row, int(candidates[column]), float(least / size) ** 0.5 / 255))
            else:
                stays[len(kept) + place] = True
        kept = candidates[stays]
    return found


def sketch(images: Tensor) -> Tensor:
    r"""Sums over a grid of cells, each over the root of its pixels, float64 [N, cells].

    Two of them are never further apart than their images:
    :math:`(\sum_i a_i - b_i)^2 / n \le \sum_i (a_i - b_i)^2` in a cell of n pixels.

    Args:
        images: uint8 [N, C, H, W].
    """
    sums = images.to(torch.int32)
    counts = torch.ones(1)
    for axis in (2, 3):
        side = images.shape[axis]
        cell = torch.arange(side) * min(CELLS, side) // side
        pooled = torch.zeros(*sums.shape[:axis], min(CELLS, side), *sums.shape[axis + 1 :], dtype=torch.int32)
        sums = pooled.index_add_(axis, cell, sums)
        counts = torch.outer(counts.flatten(), torch.bincount(cell))
    return (sums.double() / counts.double().sqrt()).flatten(1)


def _squares(images: Tensor, sketches: Tensor, rows: Tensor, candidates: Tensor, limit: float, mirror: bool) -> Tensor:
    """Squared distances float64 [rows, candidates] where they may be within the limit; infinite elsewhere."""
    answer = torch.full((len(rows), len(candidates)), torch.inf, dtype=torch.float64)
    both = [images[rows], images[rows].flip(-1)] if mirror else [images[rows]]
    looks = [sketches[rows], sketch(both[1])] if mirror else [sketches[rows]]
    for columns in torch.arange(len(candidates)).split(max(1, BYTES // (8 * images[0].numel()))):
        for values, look in zip(both, looks, strict=True):
            # products of float64 pictures are off by far less than 1, the square of one grey level
            close = _between(look, sketches[candidates[columns]]) <= limit + 1
            some = columns[close.any(0)]
            if len(some):
                exact = _between(values.flatten(1).double(), images[candidates[some]].flatten(1).double())
                answer[:, some] = torch.minimum(answer[:, some], exact)
    return answer


def _between(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of float64 rows; of integers exactly."""
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def write_duplicates(path: Path, groups: Sequence[DuplicateGroup], settings: dict[str, Any]) -> None:
    """Write ``duplicates.json``: the settings, and each group's source indices and distances."""
    content = {
        "settings": settings,
        "distance": "RMS-L2 on [0, 1]",
        "groups": [
            {"kept": group.kept, "removed": list(group.removed), "distances": list(group.distances)} for group in groups
        ],
    }
    with atomic_write(path) as file:
        json.dump(content, file)
