"""The picture of attributions: a block a query, a line a method, its first training images from left to right."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_mem.evaluation.pictures import pixels

if TYPE_CHECKING:
    from lightning_mem.attribution.attributions_report import Explained

ACROSS = 3
"""Queries beside each other."""

CELL, GAP, LABEL = 1.25, 0.6, 3.4
"""Of a tile's side: from one tile to the next, between blocks, and the width that names of methods take."""


def draw_explained(found: "Explained", top: int, count: int, path: Path) -> None:
    """Write a PNG of the first queries, copies first; a red frame is what the query is nearest to.

    Args:
        found: Queries and scores.
        top: Training images of a line.
        count: Queries.
        path: The file.
    """
    order = (~found.copied).long().argsort(stable=True)[:count].tolist()
    lines: dict[str, Tensor] = {"nearest (RMS-L2)": -found.rms}
    lines |= {name: own.values for name, own in found.scores.items()}
    top = min(top, len(found.groups))
    block = 1 + len(lines), max(top, 3)  # lines and tiles of a query's block
    bands = -(-len(order) // ACROSS)
    across = min(ACROSS, len(order))
    width = LABEL + across * (block[1] * CELL + GAP)
    height = bands * (block[0] * (CELL + 0.25) + GAP)
    figure = Figure(figsize=(0.36 * width, 0.36 * height + 0.55), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    for number, query in enumerate(order):
        band, column = divmod(number, across)
        left = LABEL + column * (block[1] * CELL + GAP)
        y = band * (block[0] * (CELL + 0.25) + GAP) + 0.2
        _tile(axes, found.queries.images[query], left, y)
        words = f"query {int(found.queries.addresses[query])}"
        words += f"\ncopy of #{_index(found, int(found.source[query]))}" if found.copied[query] else "\nno copy"
        axes.text(left + CELL, y + 0.5, f"{words}, ratio {float(found.ratio[query]):.2f}", fontsize=7, va="center")
        for line, (name, scores) in enumerate(lines.items(), start=1):
            down = y + line * (CELL + 0.25)
            if column == 0:
                axes.text(
                    LABEL - 0.25, down + 0.5, "\n".join(textwrap.wrap(name, 16)), fontsize=7, ha="right", va="center"
                )
            for rank, place in enumerate(scores[query].argsort(descending=True, stable=True)[:top].tolist()):
                right = left + rank * CELL
                _tile(axes, found.reference.members[place], right, down)
                said = f"{float(found.rms[query, place]):.3f}" if line == 1 else f"#{_index(found, place)}"
                axes.text(right + 0.5, down + 1.06, said, fontsize=5, ha="center", va="top", color="dimgray")
                if found.groups[place] == found.groups[found.source[query]]:
                    frame = Rectangle((right, down), 1, 1, fill=False, edgecolor="crimson", linewidth=2)
                    axes.add_patch(frame)
    kinds = {
        "model": "samples of the model", "heldout": "images it never saw", "ensemble": "samples of the ensemble",
        "given": "given images",
    }  # fmt: skip
    figure.suptitle(
        f"{kinds[found.queries.kind]}: first training images by each method; red: the nearest training image "
        f"({int(found.copied.sum())} of {len(found.queries)} queries are copies)",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _index(found: "Explained", place: int) -> int:
    return int(found.reference.indices[place])


def _tile(axes: Axes, image: Tensor, left: float, top: float) -> None:
    axes.imshow(
        pixels(image.to(torch.uint8)), cmap="gray", vmin=0, vmax=255, interpolation="nearest",
        extent=(left, left + 1, top + 1, top), aspect="equal",
    )  # fmt: skip
