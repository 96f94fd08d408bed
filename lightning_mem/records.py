"""Records: every number that is shown is one line of ``results.jsonl``; nothing else is reported from."""

import datetime
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

TIME_FIELDS = ("seconds", "when")
"""The fields of a record that differ between two equal runs."""

RECORDED_PACKAGES = ("lightning-mem", "torch", "lightning", "torchmetrics", "diffusers", "timm", "numpy")


def digest(*parts: Any) -> str:
    """First 16 hex digits of SHA-256 over arrays (dtype, shape, bytes), text, or anything JSON can write.

    Args:
        *parts: Tensors, numpy arrays, bytes, or JSON values (mappings are sorted by key).

    Returns:
        16 hexadecimal digits; equal contents give equal digests in every process.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            for start in range(0, max(len(part), 1) if part.ndim else 1, 4096):  # a memory-mapped array stays on disk
                total.update(np.ascontiguousarray(part[start : start + 4096] if part.ndim else part).tobytes())
        elif isinstance(part, bytes):
            total.update(part)
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
        total.update(b"\0")
    return total.hexdigest()[:16]


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a neighbour of ``path`` for writing and move it there when the block ends well.

    Args:
        path: The file to replace. Its folder is made.
        mode: ``"w"`` for text, ``"wb"`` for bytes.

    Raises:
        OSError: As the file system reports it (e.g. disk full); the file that was there before survives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a number."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> str:
    """The machine in words: accelerator or processor, cores, system."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    else:
        device = "CPU"
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
            device = names[0] if names else device
    return f"{device}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


@dataclass(frozen=True)
class Record:
    """One number with everything needed to read it again.

    Args:
        name: The logged key, e.g. ``memorization/ratio``.
        value: The number; null where it does not exist (a control without held-out images).
        low: Lower end of the 95 % interval; null where no honest interval exists.
        high: Upper end of the interval.
        n: How many samples (or examples) the number rests on.
        step: Optimizer steps of the network it describes.
        weights: ``raw`` or ``ema``.
        seed: Seed of the draw.
        unit: e.g. ``fraction`` or ``rms-l2``.
        seconds: What measuring it took; shared by the records of one measurement.
        definition: Flat: threshold, distance, bank, bank_size, extractor and digest, interval method ...
        data_digest: Of the images it was measured against.
        config_digest: Of the run's configuration.
        run: Name of the run folder.
        versions: Of the packages that matter.
        machine: Device and processor, in words.
        when: UTC time.
    """

    name: str
    value: float | None
    n: int
    step: int
    low: float | None = None
    high: float | None = None
    weights: str = "raw"
    seed: int = 0
    unit: str = "fraction"
    seconds: float = 0.0
    definition: dict[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    config_digest: str = ""
    run: str = ""
    versions: dict[str, str] = field(default_factory=package_versions)
    machine: str = field(default_factory=machine)
    when: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    @property
    def identity(self) -> str:
        """What may occur once in a file: name, step, weights and definition."""
        return digest(self.name, self.step, self.weights, self.definition)

    def to_json(self) -> str:
        """One line of JSON; numbers that JSON cannot hold (NaN, infinity) are refused."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """The record of one line.

        Raises:
            ValueError: If the line is not JSON or lacks a field; it names what is missing.
        """
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError(f"a record is a JSON object, got {line[:40]!r}")
        known = {f.name for f in fields(cls)}
        missing = {"name", "value", "n", "step"} - entry.keys()
        if missing:
            raise ValueError(f"a record needs {sorted(missing)}, got the keys {sorted(entry)}")
        return cls(**{key: value for key, value in entry.items() if key in known})


def read_records(path: str | Path) -> list[Record]:
    """All records of a ``results.jsonl``; an absent file has none.

    Raises:
        ValueError: If a line cannot be read; it names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                records.append(Record.from_json(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Add records to a file; one that is there already (same identity) is replaced where it stands.

    The file is replaced in one move, so a reader or a crash never sees half of it.
    """
    merged = {record.identity: record for record in [*read_records(path), *records]}
    with atomic_write(path) as file:
        file.writelines(record.to_json() + "\n" for record in merged.values())


def drop_records(path: str | Path, after_step: int) -> None:
    """Remove what was recorded past ``after_step`` optimizer steps (a resumed run measures it again)."""
    records = read_records(path)
    kept = [record for record in records if record.step <= after_step]
    if len(kept) < len(records):
        with atomic_write(path) as file:
            file.writelines(record.to_json() + "\n" for record in kept)
