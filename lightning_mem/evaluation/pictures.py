"""Pictures: sheets of samples, and each sample beside its nearest training image."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.evaluation.measure import Measurement
from lightning_mem.evaluation.reference import Reference
from lightning_mem.types import SampleSet


def pixels(image: Tensor) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8 for drawing."""
    array = image.permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def tile(images: Tensor, columns: int | None = None, gap: int = 1) -> Tensor:
    """A sheet of images, uint8 [C, H', W'] with a light gap between them.

    Args:
        images: uint8 [N, C, H, W].
        columns: Images in a row; null for about a square.
        gap: Pixels between them.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = images.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 160)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def draw_samples_sheet(samples: SampleSet, title: str, path: Path, count: int = 64) -> None:
    """Write a PNG with the first samples."""
    figure = Figure(figsize=(5, 5.3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(pixels(tile(samples.images[:count])), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def closest_pairs(measurement: Measurement, count: int) -> Tensor:
    """Places of the samples nearest to being copies: smallest ratio of nearest to second nearest first."""
    ratio = measurement.distances[:, 0] / measurement.distances[:, 1]
    return ratio.argsort(stable=True)[:count]


def draw_pairs(
    samples: SampleSet,
    reference: Reference,
    measurement: Measurement,
    places: Tensor,
    title: str,
    path: Path,
    columns: int = 8,
) -> None:
    """Write a PNG of sample | nearest training image, its index, RMS-L2 (ratio to the second nearest); copies red."""
    scale = math.sqrt(samples.images[0].numel())
    height, width = samples.images.shape[2:]
    pairs = [tile(torch.stack([samples.images[p], reference.members[measurement.nearest[p]]]), 2) for p in places]
    margin = torch.nn.ConstantPad2d((width // 4, width // 4, height // 2, height // 8), 255)
    cells = torch.stack([margin(pair) for pair in pairs])
    rows, cell_height, cell_width = -(-len(cells) // columns), cells.shape[2], cells.shape[3]
    # one picture with text on it: an axis for each pair takes ten times as long to lay out
    figure = Figure(
        figsize=(1.55 * columns, 1.55 * columns * rows * cell_height / (columns * cell_width) + 0.35), dpi=110
    )
    axes = figure.add_axes((0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    axes.imshow(pixels(tile(cells, columns, gap=0)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    for number, place in enumerate(places.tolist()):
        first, second = measurement.distances[place, :2].tolist()
        copied = bool(measurement.memorized[place])
        index = int(reference.indices[reference.owners[measurement.nearest[place]]])
        axes.text(
            (number % columns + 0.5) * cell_width - 0.5,
            number // columns * cell_height + height // 2 - 0.7,
            f"#{index}  {first / scale:.3f}  ({first / second:.2f})",
            fontsize=7,
            color="crimson" if copied else "black",
            fontweight="bold" if copied else "normal",
            ha="center",
            va="bottom",
        )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
