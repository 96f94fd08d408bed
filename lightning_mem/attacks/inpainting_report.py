"""What the inpainting attack leaves behind: a row for every image, and images beside their completions."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.attacks.completions import Completions
from lightning_mem.evaluation.pictures import pixels, tile
from lightning_mem.records import atomic_write

SHOWN = 3
"""Completions of an image that are shown, if as many are kept."""

HIDDEN = 128
"""Grey of what is hidden."""


@dataclass(frozen=True)
class Side:
    """One side's images and what their completions came to.

    Args:
        completions: Makes them, always the same.
        rows: int64 [N], places of the images among the members or the held-out images.
        scores: float64 [N, completions, 2], loss and distance of each.
        kept: How many with the lowest loss count.
    """

    completions: Completions
    rows: Tensor
    scores: Tensor
    kept: int

    @property
    def order(self) -> Tensor:
        """int64 [N, kept], the completions with the lowest loss."""
        return self.scores[:, :, 0].argsort(dim=1, stable=True)[:, : self.kept]

    @property
    def best(self) -> Tensor:
        """Mean distance over these, float64 [N]."""
        return self.scores[:, :, 1].gather(1, self.order).mean(1)

    @property
    def every(self) -> Tensor:
        """Mean distance over all, float64 [N]."""
        return self.scores[:, :, 1].mean(1)

    def shown(self, place: int) -> Tensor:
        """uint8 [n, C, H, W]: the image, what is seen of it, its best completions, and the mean of the kept."""
        image, hidden = self.completions.images[place], self.completions.hidden_pixels
        rows = place * self.completions.count + self.order[place]
        drawn = torch.cat([
            self.completions.pixels(self.completions.complete(part), part)
            for part in rows.sort().values.split(int(self.completions.drawing["block"]))
        ])  # fmt: skip
        drawn = drawn[rows.argsort().argsort()]  # the lowest loss first
        mean = drawn.double().mean(0).round().to(torch.uint8)
        return torch.stack([image, image.masked_fill(hidden, HIDDEN), *drawn[:SHOWN], mean])


def write_images(file: Path, sides: Mapping[str, Side]) -> None:
    """One row an image.

    Args:
        file: ``.csv``.
        sides: Members and held-out images.
    """
    with atomic_write(file) as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["set", "row", "distance_best", "distance_all"])
        for kind, side in sides.items():
            columns: Sequence[list[Any]] = (side.rows.tolist(), side.best.tolist(), side.every.tolist())
            writer.writerows([kind, row, f"{a:.6g}", f"{b:.6g}"] for row, a, b in zip(*columns, strict=True))


def draw_completions(path: Path, sides: Mapping[str, Side], count: int) -> None:
    """Write a PNG: members on the left, held-out images on the right, from the best completed one to the worst.

    A row is the image, what is seen of it, the completions with the lowest loss, and the mean of all that were kept.

    Args:
        path: ``.png``.
        sides: Members and held-out images.
        count: Images of a side, evenly spaced in the order of their distance.
    """
    chosen = {kind: _spaced(side.best, count) for kind, side in sides.items()}
    completions = min(SHOWN, next(iter(sides.values())).kept)
    strips = {kind: [tile(side.shown(p), 3 + completions) for p in chosen[kind]] for kind, side in sides.items()}
    rows, some = max(map(len, strips.values())), next(iter(strips.values()))[0]
    height, width = some.shape[1:]
    image_width = (width - 2 - completions) / (3 + completions)
    top, gap = max(1, round(0.25 * image_width)), round(0.6 * image_width)
    sheet = some.new_full((len(some), rows * (height + top), 2 * width + gap), 255)
    wide = 11.0
    figure = Figure(figsize=(wide, wide * sheet.shape[1] / sheet.shape[2] + 0.75), dpi=110)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98 - 0.75 / figure.get_figheight()))
    for side_place, (kind, own) in enumerate(strips.items()):
        left = side_place * (width + gap)
        for row, strip in enumerate(own):
            above = row * (height + top) + top
            sheet[:, above : above + height, left : left + width] = strip
            side, place = sides[kind], chosen[kind][row]
            text = f"#{int(side.rows[place])}   best {float(side.best[place]):.3f}   all {float(side.every[place]):.3f}"
            axes.text(left - 0.5, above - 0.5 - 0.05 * image_width, text, fontsize=7, ha="left", va="bottom")
        heads = ["image", "seen", *["completion"] * completions, f"mean of {sides[kind].kept}"]
        for column, head in enumerate(heads):
            middle = left + (column + 0.5) * (image_width + 1) - 1
            axes.text(middle, -0.5 - 0.05 * image_width, head, fontsize=7, color="#555555", ha="center", va="bottom")
        name = "members" if kind == "members" else "held-out images"
        axes.text(
            left + width / 2, -0.5 - 0.28 * image_width, name, fontsize=9, fontweight="bold", ha="center", va="bottom"
        )
    axes.imshow(pixels(sheet), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    figure.suptitle(
        "From the best completed image to the worst; #row, RMS-L2 of the hidden half: mean over the lowest losses, over"
        " all", fontsize=9,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _spaced(distances: Tensor, count: int) -> list[int]:
    """Places of the smallest distance, the largest, and evenly many between."""
    order = distances.argsort(stable=True)
    at = torch.linspace(0, len(order) - 1, min(count, len(order)), dtype=torch.float64).round().long()
    return order[at].tolist()
