"""Which training image was copied, how often, and by which samples: ``ledger.csv``."""

import csv
import math
from collections import defaultdict
from pathlib import Path

from lightning_mem.evaluation.measure import Measurement
from lightning_mem.evaluation.reference import Reference
from lightning_mem.records import atomic_write
from lightning_mem.types import SampleSet

COLUMNS = ("step", "weights", "index", "copies", "nearest", "samples", "file")
"""Optimizer step, weights, place in the source, number of copying samples, smallest RMS-L2, their addresses, and the
file where images are files."""


def read_ledger(path: str | Path) -> list[dict[str, str]]:
    """Rows of a ledger; an absent file has none."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def drop_ledger_rows(path: str | Path, after_step: int) -> None:
    """Remove rows past a step; a resumed run writes them again."""
    rows = read_ledger(path)
    kept = [row for row in rows if int(row["step"]) <= after_step]
    if len(kept) < len(rows):
        _write(Path(path), kept)


def ledger_rows(samples: SampleSet, reference: Reference, measurement: Measurement, step: int) -> list[dict[str, str]]:
    """One row per copied training image, the most copied first."""
    copies: dict[int, list[int]] = defaultdict(list)
    for place in measurement.memorized.nonzero().flatten().tolist():
        member = int(reference.owners[measurement.nearest[place]])
        copies[int(reference.indices[member])].append(place)
    scale = math.sqrt(samples.images[0].numel())
    rows = [
        {
            "step": str(step),
            "weights": samples.weights,
            "index": str(index),
            "copies": str(len(places)),
            "nearest": f"{float(measurement.distances[places, 0].min()) / scale:.6f}",
            "samples": " ".join(str(int(samples.addresses[place])) for place in places),
            "file": reference.file_of(index),
        }
        for index, places in copies.items()
    ]
    return sorted(rows, key=lambda row: (-int(row["copies"]), int(row["index"])))


def update_ledger(
    path: str | Path, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
) -> None:
    """Write the rows of one measurement; those of the same step and weights are replaced."""
    kept = [row for row in read_ledger(path) if (row["step"], row["weights"]) != (str(step), samples.weights)]
    _write(Path(path), kept + ledger_rows(samples, reference, measurement, step))
