"""The certificates of a protected draw as a file: one row a sample, beside the samples."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mem.defenses.amg import AMG
from lightning_mem.defenses.certificates import final_confidence
from lightning_mem.defenses.cpsample import CPSample
from lightning_mem.defenses.rejection import NoCopy, Undecided
from lightning_mem.diffusion import Codec, ScoreTerm, Target
from lightning_mem.diffusion.additions import AllAccept, Judge
from lightning_mem.diffusion.guidance import Classifier
from lightning_mem.evaluation import Accepted, run_data
from lightning_mem.metrics import nearest_neighbors
from lightning_mem.records import atomic_write

COLUMNS = ("address", "gate_rate", "final_confidence", "nearest", "accepted", "tries")
"""``gate_rate``: share of the steps at which the gate was open; ``final_confidence``: q of the finished image at t = 0,
the largest over classifiers; ``nearest``: RMS-L2 on [0, 1] to the nearest training image; ``accepted``: 1, or 0 where
no try was; ``tries``: draws it took. What cannot be said is empty."""

Protection = CPSample | AMG | Undecided | NoCopy


def protections_of(terms: Sequence[ScoreTerm], judge: Judge | None) -> list[Protection]:
    """The protections among score terms and judges; guidance is none."""
    judges = judge.judges if isinstance(judge, AllAccept) else (judge,)
    return [part for part in (*terms, *judges) if isinstance(part, Protection)]


def certify(
    file: Path, drawn: Accepted, terms: Sequence[ScoreTerm], judge: Judge | None, target: Target, path: str
) -> None:
    """Write ``<samples>_certificates.csv`` beside the samples of a draw; nothing where it was not protected.

    The nearest training image is looked for among the target's members, read from its run folder, else in the bank
    that a protection was given, else not at all.

    Args:
        file: The samples.
        drawn: What is in it.
        terms: Score terms of the draw.
        judge: Of the draw.
        target: What was drawn from.
        path: Where that came from.
    """
    table, protections = file.with_name(f"{file.stem}_certificates.csv"), protections_of(terms, judge)
    table.unlink(missing_ok=True)  # of another draw
    if not protections:
        return
    bank: Tensor | None
    try:
        bank = run_data(path).bank()[0]
    except (ValueError, OSError, RuntimeError) as error:
        banks = [part.bank for part in protections if isinstance(part, NoCopy)]
        banks += [part.images for part in protections if isinstance(part, AMG)]
        bank = banks[0] if banks else None
        if bank is None:
            rank_zero_info(f"certificates name no nearest training image: {error}")
    write_certificates(table, drawn, protections, bank, target.codec)
    rank_zero_info(f"certificates in {table}")


def write_certificates(
    file: Path,
    drawn: Accepted,
    protections: Sequence[Protection],
    bank: Tensor | None,
    codec: Codec | None = None,
) -> None:
    """Write what can be said of every sample, in ``COLUMNS``.

    Args:
        file: The table.
        drawn: The samples; of a draw without a judge all are accepted at the first try.
        protections: What they were drawn under, see :func:`protections_of`.
        bank: uint8 [M, C, H, W], the training images; null where they cannot be read.
        codec: Between pixels and the space of classifiers; null for pixels.
    """
    samples = drawn.samples
    columns: dict[str, Tensor] = {"address": samples.addresses, "accepted": drawn.accepted.int(), "tries": drawn.tries}
    if samples.gate_rate is not None:
        columns["gate_rate"] = samples.gate_rate
    confidences = [final_confidence(own, samples.images, codec) for own in _classifiers(protections)]
    if confidences:
        columns["final_confidence"] = torch.stack(confidences).amax(0)
    if bank is not None:
        near = nearest_neighbors(samples.images, bank, 1)[0][:, 0].double()
        columns["nearest"] = near / math.sqrt(samples.images[0].numel())
    with atomic_write(file) as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in range(len(samples)):
            values = {name: values[row].item() for name, values in columns.items()}
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in values.items()})


def _classifiers(protections: Sequence[Protection]) -> Iterator[Classifier]:
    """Each random-label classifier once."""
    known: set[str] = set()
    for part in protections:
        if isinstance(part, CPSample | Undecided):
            identity = str(getattr(part.classifier, "digest", id(part.classifier)))
            if identity not in known:
                known.add(identity)
                yield part.classifier
