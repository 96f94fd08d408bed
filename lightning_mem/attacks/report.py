"""What reports of attacks share: rows of samples, a number with its interval, how a picture is finished."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_mem.evaluation import Measurement, Reference
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

ROOM = 8
"""Entries of a legend that have room in a picture; more stand beside it."""


def sample_rows(samples: SampleSet, found: Measurement, reference: Reference) -> Iterator[dict[str, Any]]:
    """One row a sample: whether it copies, the training image it is nearest to, nearest over second nearest."""
    for row, address in enumerate(samples.addresses.tolist()):
        first, second = found.distances[row, :2].tolist()
        yield {
            "address": address,
            "hit": int(found.memorized[row]),
            "index": int(reference.indices[reference.owners[found.nearest[row]]]),
            "ratio": f"{first / second:.6f}" if second > 0 else "",
        }


def short(record: Record | None) -> str:
    """``0.63 [.56, .68]``, as far as there is one."""
    if record is None or record.value is None:
        return ""
    if record.low is None or record.high is None:
        return f"{record.value:.2f}"
    low, high = (f"{end:.2f}".removeprefix("0") for end in (record.low, record.high))
    return f"{record.value:.2f} [{low}, {high}]"


def finish(figure: Figure, path: Path) -> None:
    """Legends, no boxes, and the file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        entries = len(axes.get_legend_handles_labels()[0])
        if entries > ROOM:
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        elif entries:
            axes.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
