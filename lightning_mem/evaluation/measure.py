"""Every metric on one set of samples, beside its held-out control: the plain function under callback and verb."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.workers import Workers
from lightning_mem.metrics import (
    AbstractExtractor,
    build_extractor,
    duplicate_groups,
    frechet_distance_from_features,
    jackknife_interval,
    memorized,
    nearest_neighbors,
    normalized_l2,
    wilson_interval,
)
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

NEIGHBORS = 50
"""Neighbours of the normalized L2 (Carlini et al.); fewer where a bank is smaller."""

INTERVAL_DIM = 512
"""Fréchet intervals (20 solves each) are given up to this feature size; above it they would outlast the sampling."""

Number = tuple[str, float | None, tuple[float, float] | None, int, str, dict[str, Any]]
"""Name, value, interval, n, unit and definition: what a record is made of."""


@dataclass
class Measurement:
    """What one set of samples gave.

    Args:
        records: Every number, with its interval and definition.
        distances: float32 [N, 2], plain L2 to the nearest and second nearest member groups.
        nearest: int64 [N], row of the nearest member in the reference's bank.
        memorized: bool [N].
    """

    records: list[Record]
    distances: Tensor
    nearest: Tensor
    memorized: Tensor

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
        extractors: Names for the Fréchet distance: ``pixels``, ``inception``, ``inception-64``, ``timm/<model>``.
        extractor_weights: Local weight file per extractor name.
        threshold: Of the memorization ratio, in (0, 1).
        workers: How the work is dealt out.
    """

    def __init__(
        self,
        reference: Reference,
        extractors: Sequence[str] = ("pixels",),
        extractor_weights: dict[str, str] | None = None,
        threshold: float = 1 / 3,
        workers: Workers | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.reference, self.threshold = reference, threshold
        self.workers = workers or Workers()
        device = self.workers.device
        paths = extractor_weights or {}
        self.extractors: list[AbstractExtractor] = [
            build_extractor(name, paths.get(name), device=device) for name in extractors
        ]
        self._groups = {
            "members": duplicate_groups(reference.members, mirror=reference.mirror),
            "heldout": duplicate_groups(reference.heldout, mirror=reference.mirror),
        }
        self._features: dict[tuple[str, str], Tensor] = {}
        self._floors: dict[str, float] = {}
        self._unseen: list[Number] | None = None

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
            ValueError: If shapes do not fit, or a bank has fewer than two different images.
        """
        start = time.perf_counter()
        reference = self.reference
        if samples.images.shape[1:] != reference.members.shape[1:]:
            raise ValueError(
                f"samples are {tuple(samples.images.shape[1:])}, "
                f"the training images {tuple(reference.members.shape[1:])}"
            )
        common = {"num_samples": len(samples), **samples.settings}
        numbers: list[Number] = []
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for bank in ("members", "heldout"):
            ending = "" if bank == "members" else "_heldout"
            definition = {**common, **self._bank_definition(bank)}
            rule = {**definition, "threshold": self.threshold, "distance": "l2 uint8", "interval": "wilson 95%"}
            if not self._has_ratio(bank):
                numbers.append((f"memorization/ratio{ending}", None, None, 0, "fraction", rule))
                continue
            found[bank] = self._neighbors(samples.images, bank)
            hits = int(memorized(found[bank][0], self.threshold).sum())
            n, ends = len(samples), wilson_interval(hits, len(samples))
            numbers.append((f"memorization/ratio{ending}", hits / n, ends, n, "fraction", rule))
            numbers += self._equal_banks(samples.images, bank, ending, definition)
        if self._unseen is None:  # what the rules say on real images that were never trained on: measured once
            self._unseen = self._measure_unseen()
        numbers += self._unseen
        for extractor in self.extractors:
            numbers += self._frechet(samples.images, extractor, common)
        digests = {"heldout": reference.heldout_digest, "members": reference.members_digest}
        seconds = time.perf_counter() - start
        records = [
            Record(
                name=prefix + name,
                value=value,
                low=None if ends is None else float(ends[0]),
                high=None if ends is None else float(ends[1]),
                n=n,
                step=step,
                weights=samples.weights,
                seed=seed,
                unit=unit,
                seconds=round(seconds, 3),
                definition=definition,
                data_digest=digests[definition.get("bank", "members")],
                config_digest=config_digest,
                run=run,
            )
            for name, value, ends, n, unit, definition in numbers
        ]
        distances, nearest = found["members"]
        return Measurement(records, distances, nearest[:, 0], memorized(distances, self.threshold))

    def _has_ratio(self, bank: str) -> bool:
        distinct = len(self._groups[bank].unique())
        if bank == "members" and distinct < 2:
            raise ValueError(f"the memorization ratio needs two different training images, got {distinct}")
        return distinct >= 2

    def _bank_definition(self, bank: str) -> dict[str, Any]:
        groups = "exact duplicates and mirror images" if self.reference.mirror else "exact duplicates"
        size = len(self.reference.members if bank == "members" else self.reference.heldout)
        return {"bank": bank, "bank_size": size, "groups": groups}

    def _neighbors(self, images: Tensor, bank: str, k: int = 2, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(distances [N, k], bank rows [N, k]), dealt out over the processes."""
        stack = self.reference.members if bank == "members" else self.reference.heldout
        groups = self._groups[bank]
        if rows is not None:
            stack, groups = stack[rows], groups[rows]
        device = self.workers.device
        bank_images, bank_groups = stack.to(device), groups.to(device)
        k = min(k, len(bank_groups.unique()))

        def search(places: Tensor) -> Tensor:
            distances, indices = nearest_neighbors(images[places].to(device), bank_images, k, groups=bank_groups)
            return torch.stack([distances.double(), indices.double()], dim=-1)

        both = self.workers.in_blocks(len(images), search, block=4 * BLOCK).cpu()
        indices = both[..., 1].to(torch.int64)
        return both[..., 0].float(), indices if rows is None else rows[indices]

    def _equal_banks(self, images: Tensor, bank: str, ending: str, definition: dict[str, Any]) -> list[Number]:
        """Statistics that depend on the size of the bank, on banks cut to the smaller one."""
        stack = self.reference.members if bank == "members" else self.reference.heldout
        rows = self.reference.cut(stack, bank)
        distances, _ = self._neighbors(images, bank, NEIGHBORS, rows)
        n, k = distances.shape
        cut = {**definition, "bank_size": len(rows)}
        close = int((normalized_l2(distances) < 1).sum())
        nearest = distances[:, 0].double() / math.sqrt(images[0].numel())
        mean, error = nearest.mean().item(), nearest.std().item() / math.sqrt(n)
        return [
            (
                f"memorization/normalized_l2{ending}",
                close / n,
                wilson_interval(close, n),
                n,
                "fraction",
                {**cut, "cut": 1.0, "alpha": 0.5, "neighbors": k, "interval": "wilson 95%"},
            ),
            (
                f"memorization/nearest_mean{ending}",
                mean,
                (mean - 1.96 * error, mean + 1.96 * error),
                n,
                "rms-l2",
                {**cut, "interval": "normal 95%"},
            ),
        ]

    def _measure_unseen(self) -> list[Number]:
        """The rules with held-out images as queries: what they say where nothing can have been copied."""
        if len(self.reference.heldout) == 0:
            return []
        images = self.reference.heldout
        n = len(images)
        definition = {"queries": "heldout images", "num_samples": n, **self._bank_definition("members")}
        distances, _ = self._neighbors(images, "members")
        hits = int(memorized(distances, self.threshold).sum())
        rows = self.reference.cut(self.reference.members, "members")
        wide, _ = self._neighbors(images, "members", NEIGHBORS, rows)
        close = int((normalized_l2(wide) < 1).sum())
        about = {**definition, "bank_size": len(rows), "cut": 1.0, "alpha": 0.5, "neighbors": wide.shape[1]}
        rule = {**definition, "threshold": self.threshold}
        return [
            ("memorization/ratio_unseen", hits / n, wilson_interval(hits, n), n, "fraction", rule),
            ("memorization/normalized_l2_unseen", close / n, wilson_interval(close, n), n, "fraction", about),
        ]

    def _extract(self, images: Tensor, extractor: AbstractExtractor) -> Tensor:
        """float32 [N, d] on the measuring device, dealt out over the processes."""
        device = self.workers.device
        return self.workers.in_blocks(len(images), lambda rows: extractor(images[rows].to(device)))

    def _reference_features(self, bank: str, extractor: AbstractExtractor) -> Tensor:
        key = (bank, extractor.name)
        if key not in self._features:
            images = self.reference.members if bank == "members" else self.reference.heldout
            self._features[key] = self._extract(images, extractor)
        return self._features[key]

    def _frechet(self, images: Tensor, extractor: AbstractExtractor, common: dict[str, Any]) -> list[Number]:
        features = self._extract(images, extractor)
        about = {"extractor": extractor.name, "extractor_digest": extractor.digest, "resize": extractor.resize}
        numbers: list[Number] = []
        for bank, ending in (("members", "train"), ("heldout", "heldout")):
            size = len(self.reference.members if bank == "members" else self.reference.heldout)
            name = f"frechet/{extractor.name}/{ending}"
            definition = {**common, **about, "bank": bank, "bank_size": size}
            if size < 2:
                numbers.append((name, None, None, 0, "squared distance", definition))
                continue
            real = self._reference_features(bank, extractor)
            value = frechet_distance_from_features(features, real)
            interval = None
            if features.shape[1] <= INTERVAL_DIM and len(features) >= 40:
                interval = jackknife_interval(partial(_frechet_of_rows, features=features, real=real), len(features))
                definition["interval"] = "block jackknife 95%"
            numbers.append((name, value, interval, len(features), "squared distance", definition))
            if getattr(extractor, "official", False):
                numbers.append((f"fid/{ending}", value, interval, len(features), "squared distance", definition))
        if len(self.reference.heldout) >= 4:
            numbers.append(self._floor(extractor, about))
        return numbers

    def _floor(self, extractor: AbstractExtractor, about: dict[str, Any]) -> Number:
        """What fresh real images score: one half of the held-out images against the other."""
        name = f"frechet/{extractor.name}/floor"
        real = self._reference_features("heldout", extractor)
        half = len(real) // 2
        if name not in self._floors:
            self._floors[name] = frechet_distance_from_features(real[:half], real[half:])
        definition = {**about, "bank": "heldout", "bank_size": len(real) - half, "queries": "heldout images"}
        return (name, self._floors[name], None, half, "squared distance", definition)


def _frechet_of_rows(rows: Tensor, features: Tensor, real: Tensor) -> float:
    return frechet_distance_from_features(features[rows], real)
