"""Every metric on one set of samples, beside its held-out control: the plain function under callback and verb."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor
from tqdm import tqdm

from lightning_mem.evaluation import authentic, bands, copies, phases, quality
from lightning_mem.evaluation.comparison import Banks, Comparison, Rules
from lightning_mem.evaluation.numbers import Number
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.workers import Workers
from lightning_mem.metrics import build_extractor, memorized
from lightning_mem.records import Record, digest
from lightning_mem.types import SampleSet

MetricName = Literal[
    "ratio", "copied_images", "normalized_l2", "extracted", "phases", "scores", "authenticity", "data_copying",
    "frechet", "frechet_infinity", "prdc", "kernel", "mifid", "duplicates",
]  # fmt: skip
"""Families of numbers that can be asked for."""

FAMILIES: dict[MetricName, Callable[[Comparison], list[Number]]] = {
    "ratio": copies.ratio,
    "copied_images": copies.copied_images,
    "normalized_l2": copies.normalized,
    "extracted": copies.extracted,
    "phases": phases.phases,
    "scores": bands.scores,
    "authenticity": authentic.authenticity,
    "data_copying": authentic.copying,
    "frechet": quality.frechet,
    "frechet_infinity": quality.infinite,
    "prdc": quality.prdc,
    "kernel": quality.kernel,
    "mifid": quality.mifid,
    "duplicates": copies.duplicates,
}

WHILE_TRAINING: tuple[MetricName, ...] = (
    "ratio", "copied_images", "normalized_l2", "extracted", "phases", "frechet", "prdc", "duplicates",
)  # fmt: skip
"""What ``fit`` measures when nothing is named: cheap beside the sampling, and a curve worth watching."""

EVERY: tuple[MetricName, ...] = get_args(MetricName)
"""What ``evaluate`` measures when nothing is named."""


@dataclass
class Measurement:
    """What one set of samples gave.

    Args:
        records: Every number, with its interval and definition.
        distances: float32 [N, 2], plain L2 to the nearest and second nearest member groups.
        nearest: int64 [N], row of the nearest member in the reference's bank.
        memorized: bool [N].
        seconds: What measuring took.
    """

    records: list[Record]
    distances: Tensor
    nearest: Tensor
    memorized: Tensor
    seconds: float = 0.0

    def values(self) -> dict[str, float]:
        """Logged keys and numbers; interval ends as ``<key>_low`` and ``<key>_high``."""
        found: dict[str, float] = {}
        for record in self.records:
            parts = {"": record.value, "_low": record.low, "_high": record.high}
            found |= {record.name + end: value for end, value in parts.items() if value is not None}
        return found


class Measure:
    """Every metric on a set of samples against one reference; what depends on the reference alone is kept.

    Args:
        reference: Members and held-out images.
        extractors: Feature spaces by name: ``pixels``, ``inception``, ``inception-64``, ``timm/<model>``, ``sscd``.
        extractor_weights: Local weight file per extractor name.
        threshold: Of the memorization ratio, in (0, 1).
        workers: How the work is dealt out.
        metrics: Families of numbers; null for what ``fit`` measures. The ratio is always among them.
        delta: RMS-L2 up to which a training image counts as extracted.
        cache_dir: Folder where features of reference images are kept; null for none.

    Raises:
        ValueError: If a metric or extractor is unknown, a number is out of range, or the members are all equal.
    """

    def __init__(
        self,
        reference: Reference,
        extractors: Sequence[str] = ("pixels",),
        extractor_weights: dict[str, str] | None = None,
        threshold: float = 1 / 3,
        workers: Workers | None = None,
        metrics: Sequence[MetricName] | None = None,
        delta: float = 0.15,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.rules = Rules(threshold, delta)
        chosen = WHILE_TRAINING if metrics is None else metrics
        unknown = [name for name in chosen if name not in FAMILIES]
        if unknown:
            raise ValueError(f"metrics must be some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
        self.metrics = [name for name in FAMILIES if name in chosen or name == "ratio"]
        self.reference, self.workers = reference, workers or Workers()
        paths, device = extractor_weights or {}, self.workers.device
        self.extractors = [build_extractor(name, paths.get(name), device=device) for name in dict.fromkeys(extractors)]
        self.banks = Banks(reference, self.extractors, self.workers, cache_dir)
        self._wide = copies.NEIGHBORS if {"normalized_l2", "extracted", "phases"} & set(self.metrics) else 2

    @property
    def digest(self) -> str:
        """Identity: equal digests put the same questions to the same reference."""
        spaces = [(extractor.name, extractor.digest) for extractor in self.extractors]
        banks = (self.reference.members_digest, self.reference.heldout_digest)
        return digest(self.metrics, self.rules.threshold, self.rules.delta, spaces, banks)

    def __call__(
        self,
        samples: SampleSet,
        *,
        step: int = 0,
        prefix: str = "",
        config_digest: str = "",
        run: str = "",
        seed: int = 0,
    ) -> Measurement:
        """Measure.

        Args:
            samples: The generated images.
            step: Optimizer steps of the network they came from.
            prefix: Put before every key (``raw/``).
            config_digest: Of the run.
            run: Name of the run folder.
            seed: Seed of the draw.

        Raises:
            ValueError: If there are no samples, shapes do not fit, or there are not two different training images.
        """
        start = time.perf_counter()
        reference = self.reference
        if len(samples) == 0:
            raise ValueError("there are no samples to measure")
        if samples.images.shape[1:] != reference.members.shape[1:]:
            raise ValueError(
                f"samples are {tuple(samples.images.shape[1:])}, "
                f"the training images {tuple(reference.members.shape[1:])}"
            )
        if self.banks.distinct("members") < 2:
            found = self.banks.distinct("members")
            raise ValueError(f"the memorization ratio needs two different training images, got {found}")
        comparison = Comparison(samples, self.banks, self.rules, self._wide)
        numbers = []
        # a bar where someone waits for long
        for name in tqdm(self.metrics, "measuring", leave=False, delay=5, disable=self.workers.rank != 0 or None):
            numbers += FAMILIES[name](comparison)
        digests = {"heldout": reference.heldout_digest, "members": reference.members_digest}
        seconds = time.perf_counter() - start
        records = [
            Record(
                name=prefix + number.name,
                value=number.value,
                low=None if number.interval is None else float(number.interval[0]),
                high=None if number.interval is None else float(number.interval[1]),
                n=number.n,
                step=step,
                weights=samples.weights,
                seed=seed,
                unit=number.unit,
                seconds=round(seconds, 3),
                definition=number.definition,
                data_digest=digests[number.definition.get("bank", "members")],
                config_digest=config_digest,
                run=run,
            )
            for number in numbers
        ]
        distances, nearest = comparison.nearest("members")
        return Measurement(records, distances, nearest[:, 0], memorized(distances, self.rules.threshold), seconds)
