"""What every metric asks for, computed once: neighbours in both banks, features of samples and of reference images."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from tqdm import tqdm

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.workers import Workers
from lightning_mem.metrics import AbstractExtractor, cached_features, duplicate_groups, nearest_neighbors
from lightning_mem.types import SampleSet

Bank = Literal["members", "heldout"]
"""Which images samples are compared with: those trained on, or the control's."""

BANKS: tuple[Bank, ...] = ("members", "heldout")

T = TypeVar("T")


@dataclass(frozen=True)
class Rules:
    """Where the rules cut.

    Args:
        threshold: Of the memorization ratio, in (0, 1); the literature uses 1/3.
        delta: RMS-L2 on [0, 1] up to which a training image counts as extracted, positive; the literature uses 0.15.

    Raises:
        ValueError: If one is outside its range.
    """

    threshold: float = 1 / 3
    delta: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {self.threshold}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")


def cache_folder(option: str | None) -> Path | None:
    """Where features of reference images are kept.

    Args:
        option: A folder; ``auto`` for the environment's LIGHTNING_MEM_CACHE, else ``~/.cache/lightning_mem``; null for
            none.
    """
    if option != "auto":
        return None if option is None else Path(option).expanduser()
    return Path(os.environ.get("LIGHTNING_MEM_CACHE") or "~/.cache/lightning_mem").expanduser()


class Banks:
    """Both banks of a reference, and what depends on them alone: kept from one set of samples to the next.

    Args:
        reference: Members and held-out images.
        extractors: Feature spaces.
        workers: How the work is dealt out.
        cache_dir: Folder where features of reference images are kept; null for none.
    """

    def __init__(
        self,
        reference: Reference,
        extractors: list[AbstractExtractor],
        workers: Workers,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.reference, self.extractors, self.workers, self.cache_dir = reference, extractors, workers, cache_dir
        self.groups = {bank: duplicate_groups(self.images(bank), mirror=reference.mirror) for bank in BANKS}
        self._kept: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, the first time only."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def images(self, bank: Bank) -> Tensor:
        """uint8 [N, C, H, W]."""
        return self.reference.members if bank == "members" else self.reference.heldout

    def distinct(self, bank: Bank) -> int:
        """Number of different images; a copy's ratio needs two."""
        return self.once(("distinct", bank), lambda: len(self.groups[bank].unique()))

    def rows(self, bank: Bank, at_most: int | None = None) -> Tensor:
        """Rows of a bank cut to the smaller one's size, and to ``at_most``: for what depends on the bank's size."""
        return self.once(("rows", bank, at_most), lambda: self.reference.cut(self.images(bank), bank, at_most))

    def describe(self, bank: Bank) -> dict[str, Any]:
        """What a definition says about a bank."""
        groups = "exact duplicates and mirror images" if self.reference.mirror else "exact duplicates"
        return {"bank": bank, "bank_size": len(self.images(bank)), "groups": groups}

    def search(self, images: Tensor, bank: Bank, k: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(distances [N, k], bank rows [N, k]), dealt out over the processes; fewer columns in a smaller bank."""
        stack, groups = self.images(bank), self.groups[bank]
        if rows is not None:
            stack, groups = stack[rows], groups[rows]
        distances, indices = self._search(images, stack, min(k, len(groups.unique())), groups)
        return distances, indices if rows is None else rows[indices]

    def among(self, images: Tensor, crowd: int, k: int) -> tuple[Tensor, Tensor]:
        """(distances [N, k], indices [N, k]) among the first ``crowd`` of the images themselves."""
        return self._search(images, images[:crowd], k, None)

    def _search(self, images: Tensor, stack: Tensor, k: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        device = self.workers.device
        groups = None if groups is None else groups.to(device)
        # one call for all rows of a process: a search prepares its bank once
        own, together = self.workers.share(len(images))
        self.workers.pause()
        found = nearest_neighbors(images[own].to(device), stack.to(device), k, groups=groups)
        distances, indices = (together(part).cpu() for part in found)
        return distances, indices

    def extract(self, images: Tensor, extractor: AbstractExtractor) -> Tensor:
        """Features float32 [N, d] on the measuring device, dealt out over the processes."""
        device = self.workers.device
        return self.workers.in_blocks(
            len(images), lambda rows: extractor(images[rows].to(device)), label=f"{extractor.name} of samples"
        )

    def features(self, bank: Bank, extractor: AbstractExtractor) -> Tensor:
        """Features of reference images, from the disk where they are there."""
        return self.once(("features", bank, extractor.name), lambda: self._reference_features(bank, extractor))

    def _reference_features(self, bank: Bank, extractor: AbstractExtractor) -> Tensor:
        images = self.images(bank)
        if self.cache_dir is None or extractor.name == "pixels":
            return self.extract(images, extractor)
        # every process keeps the blocks that fall to it: nobody waits for another, and no file has two writers
        own, together = self.workers.share(len(images))
        hidden = None if self.workers.rank == 0 else True
        with tqdm(total=len(own), desc=f"{extractor.name} of {bank}", leave=False, delay=2, disable=hidden) as bar:
            found = cached_features(images[own], _Watched(extractor, bar), self.cache_dir, block=BLOCK)
        return together(found.to(self.workers.device))


class _Watched(AbstractExtractor):
    """An extractor that moves a bar."""

    def __init__(self, extractor: AbstractExtractor, bar: tqdm) -> None:
        self.name, self.dim, self.digest = extractor.name, extractor.dim, extractor.digest
        self.resize, self.device = extractor.resize, extractor.device
        self._extractor, self._bar = extractor, bar

    def _features(self, images: Tensor) -> Tensor:
        self._bar.update(len(images))
        return self._extractor._features(images)


@dataclass
class Comparison:
    """One set of samples against both banks.

    Args:
        samples: The generated images.
        banks: What they are compared with.
        rules: Where the rules cut.
        wide: Neighbours that some metric of this measurement will ask for.
    """

    samples: SampleSet
    banks: Banks
    rules: Rules
    wide: int = 2
    _kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def common(self) -> dict[str, Any]:
        """What every definition says."""
        return {"num_samples": len(self.samples), **self.samples.settings}

    def describe(self, bank: Bank) -> dict[str, Any]:
        """What the definition of a number on this bank says."""
        return {**self.common, **self.banks.describe(bank)}

    def nearest(self, bank: Bank, k: int = 2, *, cut: bool = False) -> tuple[Tensor, Tensor]:
        """(distances [N, k], bank rows [N, k]) in pixels; ``cut``: in the bank cut to the smaller one's size."""
        rows = self.banks.rows(bank)
        whole = len(rows) == len(self.banks.images(bank))
        key = ("nearest", bank, cut and not whole)
        if key not in self._kept:
            # one search feeds every rule on this bank
            most = self.wide if cut or whole else 2
            self._kept[key] = self.banks.search(
                self.samples.images, bank, max(k, most), None if whole or not cut else rows
            )
        distances, indices = self._kept[key]
        return distances[:, :k], indices[:, :k]

    def features(self, extractor: AbstractExtractor) -> Tensor:
        """Features of the samples, float32 [N, d] on the measuring device."""
        key = ("features", extractor.name)
        if key not in self._kept:
            self._kept[key] = self.banks.extract(self.samples.images, extractor)
        return self._kept[key]
