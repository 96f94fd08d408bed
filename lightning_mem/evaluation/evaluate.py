"""Every metric on samples of any generator, against any training set: no model needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lightning_mem.evaluation.inputs import check_shape, is_run, read_samples, samples_file, written_digests
from lightning_mem.evaluation.ledger import ledger_rows, update_ledger
from lightning_mem.evaluation.measure import Measure, Measurement
from lightning_mem.evaluation.pictures import closest_pairs, draw_pairs, draw_samples_sheet
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.table import records_table
from lightning_mem.records import Record, read_records, write_records
from lightning_mem.types import SampleSet

Compared = Literal["value", "low"]
"""Which end of a number a limit is compared with: the number itself, or the lower end of its interval."""


@dataclass(frozen=True)
class Source:
    """Samples, and where what is said of them goes.

    Args:
        samples: The images.
        name: Short, for titles and file names.
        out: Folder of records, ledger and pictures.
        step: Optimizer steps of the network they came from; 0 where there is none.
        run: Run folder whose last evaluation they are; null for all others.
        generator: What drew them, for the records; null for ``name``.
    """

    samples: SampleSet
    name: str
    out: Path
    step: int = 0
    run: Path | None = None
    generator: str | None = None


def find_sources(
    paths: Sequence[str], reference: Reference, *, resize: bool = False, out: str | None = None, step: int | None = None
) -> list[Source]:
    """Read and check the samples.

    Args:
        paths: Run folders, ``.npz`` or ``.npy`` files, folders of images.
        reference: What they will be compared with.
        resize: Make images of another size or number of channels fit.
        out: Folder of the results; null for the run folder where the samples are its last evaluation's, else
            ``<samples>_evaluation`` beside them. With several sets each gets a folder of its own in it.
        step: Optimizer steps of the network; null for the run's last where the samples are its last evaluation's.

    Raises:
        ValueError: If samples cannot be read or do not fit, or two sets would write to one folder.
        FileNotFoundError: If there is nothing at a path.
    """
    found = []
    for given in paths:
        path = Path(given)
        file = samples_file(path) if path.is_dir() and is_run(path) else path
        samples = read_samples(file, tuple(reference.members.shape[1:]) if resize else None)
        check_shape(samples.images, reference.members, str(file))
        run = file.parent.parent if file.name == "last.npz" and is_own(file.parent.parent, reference) else None
        name = run.name if run is not None else file.stem if file.suffix else file.name
        if out is not None:
            folder = Path(out) / name if len(paths) > 1 else Path(out)
        else:
            folder = run if run is not None else file.parent / f"{name}_evaluation"
        steps = [r.step for r in read_records(run / "results.jsonl") if r.weights == samples.weights] if run else []
        if run is None:  # the run's own evaluation names them by their settings; others by what they are
            settings = {"samples": file.name, "samples_digest": samples.digest, **samples.settings}
            samples = replace(samples, settings=settings)
        found.append(Source(samples, name, folder, max(steps, default=0) if step is None else step, run))
    folders = [source.out for source in found]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two sets of samples would write to one folder of {sorted(map(str, folders))}: rename one")
    return found


def is_own(folder: Path, reference: Reference) -> bool:
    """Whether a folder is that of a run with these very members and held-out images."""
    own = {"members": reference.members_digest, "heldout": reference.heldout_digest}
    return is_run(folder) and written_digests(folder) == own


def measure_source(source: Source, measure: Measure, pairs: int = 32) -> Measurement:
    """Measure one set; write ``results.jsonl``, ``ledger.csv`` and pictures into its folder."""
    samples, step = source.samples, source.step
    known = [record for record in read_records(source.out / "results.jsonl") if record.run] if source.run else []
    measurement = measure(
        samples,
        step=step,
        config_digest=known[-1].config_digest if known else "",
        run=source.generator or source.name,
        seed=int(samples.settings.get("sample_seed", 0)),
    )
    update_ledger(source.out / "ledger.csv", samples, measure.reference, measurement, step)
    ending = f"step{step:06d}" if source.run is not None or step else source.name
    copies = int(measurement.memorized.sum())
    title = (
        f"{source.name}: sample | nearest training image: #index, RMS-L2 (ratio to the second nearest); "
        f"red: copies ({copies} of {len(samples)})"
    )
    places = closest_pairs(measurement, pairs)
    images = source.out / "images"
    draw_pairs(samples, measure.reference, measurement, places, title, images / f"pairs_{ending}.png")
    draw_samples_sheet(samples, f"{source.name}: {len(samples)} samples", images / f"samples_{ending}.png")
    write_records(source.out / "results.jsonl", measurement.records)  # last: they say that the rest is there
    return measurement


def print_measurement(source: Source, measure: Measure, measurement: Measurement, console: Console) -> None:
    """The table on the screen, the most copied images, and what was written."""
    reference, n = measure.reference, len(source.samples)
    repeated = next((r.value or 0.0 for r in measurement.records if r.name == "samples/duplicates"), 0.0)
    title = f"{source.name}: {n} samples" + (f" ({round(repeated * n)} repeat another)" if repeated else "")
    title += f", {len(reference.indices)} training images, {len(reference.heldout)} held out"
    console.print(records_table(measurement.records, title))
    copied = ledger_rows(source.samples, reference, measurement, source.step)
    if copied:
        console.print(f"{len(copied)} training images copied, most often (times, smallest RMS-L2):")
        for row in copied[:5]:
            named = f"#{row['index']} {row['file']}".strip()
            console.print(f"  {named}  {row['copies']}  {float(row['nearest']):.3f}", soft_wrap=True, highlight=False)
    if len(reference.heldout) == 0:
        console.print("no held-out images: nothing says what these numbers read by chance (--heldout)")
    console.print(f"results.jsonl, ledger.csv and images/ in {source.out}\n")


def parse_limits(limits: Sequence[str]) -> dict[str, float]:
    """``key=number`` pairs.

    Raises:
        ValueError: If one is not of that form.
    """
    found = {}
    for limit in limits:
        key, separator, number = limit.rpartition("=")
        try:
            found[key.strip()] = float(number)
        except ValueError:
            separator = ""
        if not separator or not key.strip() or found[key.strip()] != found[key.strip()]:
            raise ValueError(f"a limit is KEY=NUMBER, e.g. memorization/ratio=0.01, got {limit!r}")
    return found


def exceeded(records: Sequence[Record], limits: Mapping[str, float], compared: Compared = "value") -> list[str]:
    """What lies above its limit, in words.

    Args:
        records: Of one measurement.
        limits: Key to number.
        compared: ``value``, or ``low``: the lower end of the interval, above which the truth lies with 97.5 %
            confidence, so that chance alone seldom fails a model.

    Raises:
        ValueError: If a key is unknown (the known ones are listed), has no value, or no interval where one is compared.
    """
    by_name = {record.name: record for record in records}
    unknown = sorted(limits.keys() - by_name.keys())
    if unknown:
        raise ValueError(f"no such key: {', '.join(unknown)}; known are {', '.join(sorted(by_name))}")
    found = []
    for key, limit in limits.items():
        record = by_name[key]
        number: Any = record.value if compared == "value" else record.low
        if number is None:
            lacks = "has no value" if record.value is None else "has no interval (compare its value instead)"
            raise ValueError(f"{key} {lacks}: {record.definition.get('undefined', 'it cannot be limited')}")
        if number > limit:
            end = "" if compared == "value" else "lower end of "
            found.append(f"{end}{key} is {number:.4g}, above the limit {limit:g}")
    return found


def best_device(device: str) -> torch.device:
    """``auto`` takes a GPU where there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
