"""What generate-and-filter leaves behind: the most extracted images, as a table and as pictures."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.extraction_costs import cost_line
from lightning_mem.attacks.extraction_scores import Extracted, Nearness, near_copies, repeats_of
from lightning_mem.attacks.report import short
from lightning_mem.evaluation import Banks
from lightning_mem.evaluation.pictures import pixels, tile
from lightning_mem.evaluation.table import COUNTED, LOOK, shown
from lightning_mem.records import Record, atomic_write

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


def extraction_table(records: Sequence[Record], prefix: str) -> Table:
    """One column a rule and cut; what has no value says why below it, and what a generation costs.

    Args:
        records: Of :class:`~lightning_mem.attacks.Extraction`.
        prefix: Of their names.
    """
    rows: dict[str, dict[tuple[str, float], Record]] = {}
    for record in (record for record in records if "rule" in record.definition):
        about = record.definition
        ends = [f" {end}{about[key]}" for key, end in (("repeats", ""), ("k", "k=")) if key in about]
        row = record.name.removeprefix(prefix) + "".join(ends)
        rows.setdefault(row, {})[about["rule"], about["cut"]] = record
    columns = list(dict.fromkeys(column for own in rows.values() for column in own))
    why = {
        f"{r.name}: {r.definition['undefined']}": 0 for own in rows.values() for r in own.values() if r.value is None
    }
    caption = "\n".join([*why, cost_line(records, prefix)])
    table = Table(title="attack extraction", title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for rule, cut in columns:
        table.add_column(f"{rule}\n{cut:g}", justify="right", no_wrap=True)
    for row, own in rows.items():
        found = [own.get(column) for column in columns]
        table.add_row(row, *(shown(r) if r is None or r.unit in COUNTED else short(r) for r in found))
    return table


def draw_triplets(path: Path, near: Nearness, banks: Banks, images_at: Callable[[Tensor], Tensor], count: int) -> None:
    """Write a PNG of generation | nearest | second nearest training image, the closest of each image first.

    Args:
        path: ``.png``.
        near: Of all generations.
        banks: Both banks.
        images_at: The generations, uint8 [N, C, H, W], at N places.
        count: How many.
    """
    chosen, members = nearest_of_each(near, banks)[:count], banks.images("members")
    places = chosen.tolist()
    triplets = torch.stack([
        tile(torch.stack([generation, *members[near.nearest[place]]]), 3)
        for place, generation in zip(places, images_at(chosen), strict=True)
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
