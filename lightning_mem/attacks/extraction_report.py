"""What generate-and-filter leaves behind: the most extracted images, as a table and as pictures."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.attacks.extraction_scores import Extracted, Nearness, near_copies, repeats_of
from lightning_mem.evaluation import Banks
from lightning_mem.evaluation.pictures import pixels, tile
from lightning_mem.records import atomic_write

COLUMNS = 6
"""Triplets in a row of the picture."""


def nearest_of_each(near: Nearness, banks: Banks) -> Tensor:
    """For every training image that some generation is nearest to, the place of its closest generation; best first."""
    groups = banks.groups["members"][near.nearest[:, 0]]
    order = near.normalized_l2.argsort(stable=True)
    seen: dict[int, int] = {}
    for place in order.tolist():
        seen.setdefault(int(groups[place]), place)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


def write_extracted(file: Path, near: Nearness, banks: Banks, found: Sequence[Extracted], delta: float) -> None:
    """One row a training image that was extracted under the loosest rule, the most often extracted first.

    Args:
        file: ``.csv``.
        near: Of all generations.
        banks: Both banks.
        found: Under each rule and cut; their hits are columns.
        delta: For k, the number of near copies among the training images.
    """
    reference, repeats = banks.reference, repeats_of(banks)
    groups = torch.cat([own.images for own in found]).unique()
    place_of = {int(banks.groups["members"][near.nearest[p, 0]]): int(p) for p in nearest_of_each(near, banks)}
    counts = {int(g): int(k) for g, k in zip(groups, near_copies(groups, banks, delta), strict=True)}
    hits = [torch.bincount(own.group[own.hit], minlength=len(repeats)).tolist() for own in found]
    order = sorted(counts, key=lambda g: ([-own[g] for own in hits], g))
    with atomic_write(file) as opened:
        writer = csv.writer(opened, lineterminator="\n")
        names = [f"generations_{own.rule}_{own.cut:g}" for own in found]
        writer.writerow(["index", "repeats", "near_copies", *names, "normalized_l2", "rms_l2", "address", "file"])
        for g in order:
            place, index = place_of[g], int(reference.indices[reference.owners[g]])
            scores = (f"{float(near.normalized_l2[place]):.6g}", f"{float(near.rms_l2[place]):.6g}")
            writer.writerow([
                index, int(repeats[g]), counts[g], *(own[g] for own in hits), *scores, int(near.addresses[place]),
                reference.file_of(index),
            ])  # fmt: skip


def draw_triplets(path: Path, near: Nearness, banks: Banks, image_at: Callable[[int], Tensor], count: int) -> None:
    """Write a PNG of generation | nearest | second nearest training image, the closest of each image first.

    Args:
        path: ``.png``.
        near: Of all generations.
        banks: Both banks.
        image_at: The generation, uint8 [C, H, W], at a place.
        count: How many.
    """
    places = nearest_of_each(near, banks)[:count].tolist()
    members = banks.images("members")
    triplets = torch.stack([
        tile(torch.stack([image_at(place), *members[near.nearest[place]]]), 3) for place in places
    ])  # fmt: skip
    height, width = members.shape[2:]
    cells = torch.nn.ConstantPad2d((width // 4, width // 4, height // 2, height // 8), 255)(triplets)
    columns = min(COLUMNS, len(places))
    rows, cell_height, cell_width = math.ceil(len(places) / columns), cells.shape[2], cells.shape[3]
    wide = max(2.0 * columns, 4.0)
    figure = Figure(figsize=(wide, wide * rows * cell_height / (columns * cell_width) + 0.35), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    axes.imshow(pixels(tile(cells, columns, gap=0)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    reference = banks.reference
    for number, place in enumerate(places):
        index = int(reference.indices[reference.owners[near.nearest[place, 0]]])
        axes.text(
            (number % columns + 0.5) * cell_width - 0.5, number // columns * cell_height + height // 2 - 0.7,
            f"#{index}  {float(near.normalized_l2[place]):.2f}  ({float(near.rms_l2[place]):.3f})",
            fontsize=7, ha="center", va="bottom",
        )  # fmt: skip
    figure.suptitle("generation | nearest | second nearest: #image, normalized L2 (RMS-L2)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
