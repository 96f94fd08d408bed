"""Counterfactuals to look at: a sample, the same noise without one unit, that unit, and what all units do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.attribution.counterfactual import Landscape, Score
from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import sample
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.evaluation.pictures import pixels


def top_counterfactuals(ensemble: Ensemble, units: Sequence[int], addresses: Sequence[int], **drawing: Any) -> Tensor:
    """The sample of each address without the unit of the same place, uint8 [K, C, H, W]."""
    found = []
    for unit, address in zip(units, addresses, strict=True):
        target, own = ensemble.target([unit]), torch.tensor([address])
        condition = None if target.num_classes is None else draw_labels(target.num_classes, own, drawing["seed"])
        found.append(sample(target, own, condition=condition, block=BLOCK, **drawing)[0])
    return torch.stack(found)


def draw_counterfactuals(
    found: Landscape,
    counterfactuals: Tensor,
    images: Tensor,
    unit_of: Tensor,
    path: Path,
    score: Score = "moved_away",
) -> None:
    """Write a PNG: per sample itself, without its first unit, that unit, its nearest unit, and the landscape.

    Args:
        found: Of at least as many samples as there are counterfactuals.
        counterfactuals: uint8 [K, C, H, W], the first K samples without the unit that the score puts first.
        images: uint8 [N, C, H, W].
        unit_of: int64 [N].
        path: The file.
        score: Whose first unit was left out.
    """
    count = len(counterfactuals)
    figure = Figure(figsize=(9.5, 1.25 * count + 0.7), dpi=110, layout="constrained")
    grid = figure.subplots(count, 5, squeeze=False, width_ratios=[1, 1, 1, 1, 3.4])
    titles = ("sample", "without its first unit", "that unit", "nearest unit", f"{score.replace('_', ' ')}, by unit")
    for column, title in enumerate(titles):
        grid[0, column].set_title(title, fontsize=8)
    tops = found.scores(score).argmax(1)
    for row in range(count):
        top, nearest = int(tops[row]), int(found.nearest[row])
        shown = (found.factual[row], counterfactuals[row], *(_of(unit, images, unit_of) for unit in (top, nearest)))
        labels = ("", f"moved {float(found.displacement[row, top]):.2f}", f"unit {top}", f"unit {nearest}")
        for axes, image, label in zip(grid[row, :4], shown, labels, strict=True):
            axes.imshow(pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(label, fontsize=7, labelpad=2)
        for side in grid[row, 2 if top == nearest else 3].spines.values():
            side.set_color("crimson")
            side.set_linewidth(2)
        _landscape(grid[row, 4], found.scores(score)[row], nearest)
    figure.suptitle("The same noise with a training unit left out; red: the unit nearest to the sample", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _of(unit: int, images: Tensor, unit_of: Tensor) -> Tensor:
    """The first image of a unit."""
    return images[int((unit_of == unit).nonzero()[0, 0])]


def _landscape(axes: Axes, scores: Tensor, nearest: int) -> None:
    """One bar a unit, the largest first; the nearest is red."""
    order = scores.argsort(descending=True, stable=True)
    colors = ["crimson" if unit == nearest else "silver" for unit in order.tolist()]
    axes.bar(range(len(order)), scores[order].tolist(), width=1.0, color=colors)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.tick_params(labelsize=6)
    axes.set_xticks([])
