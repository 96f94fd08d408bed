"""Features of many images on disk, block by block: a stopped run goes on where it stopped."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mem.evaluation import Workers
from lightning_mem.records import atomic_write


class FeatureStore:
    """A table float32 [N, D] in files of ``block`` rows, memory-mapped, with a manifest of what it holds.

    Every file is written in one move and holds what its rows decide, so whoever writes it writes the same bytes: the
    store of a run that was killed and started again equals that of one that was not, with any number of processes.

    Args:
        folder: Of the store; made where it is not there.
        manifest: Flat: digests of target and images, settings. Values that JSON gives back as they are.
        count: N, at least 1.
        width: D, at least 1.
        block: Rows of a file, at least 1.

    Raises:
        ValueError: If the folder holds features of something else (it names what differs), or what is there is no
            store.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], count: int, width: int, block: int = 64) -> None:
        for name, value in (("count", count), ("width", width), ("block", block)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder, self.count, self.width, self.block = folder, count, width, block
        self.manifest = {**manifest, "count": count, "width": width, "block": block}
        self._check()

    @property
    def manifest_file(self) -> Path:
        """Where the manifest is."""
        return self.folder / "manifest.json"

    def _check(self) -> None:
        if not self.manifest_file.is_file():
            if self.folder.is_dir() and any(self.folder.glob("*.npy")):
                raise ValueError(f"{self.folder} holds arrays but no manifest.json, so whose they are is unknown: "
                                 "remove it or name another store")  # fmt: skip
            return
        try:
            found = json.loads(self.manifest_file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.manifest_file} is damaged ({error}): remove {self.folder}") from error
        wrong = [key for key in sorted({*found, *self.manifest}) if found.get(key) != self.manifest.get(key)]
        if wrong:
            there = ", ".join(f"{key} {found.get(key)!r} (here {self.manifest.get(key)!r})" for key in wrong)
            raise ValueError(f"{self.folder} holds other features: {there}; remove it or name another store")

    def file(self, number: int) -> Path:
        """Where a block is."""
        return self.folder / f"{number:08d}.npy"

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.block)

    def fill(
        self,
        compute: Callable[[Tensor], Tensor],
        workers: Workers,
        first: Callable[[Callable[[], None]], None],
        label: str | None = None,
    ) -> None:
        """Compute the blocks that are not there; every process may read all of them afterwards.

        Args:
            compute: Gets rows int64 [block] (the last one repeated where there are fewer), gives features [block, D].
            workers: Deals out blocks.
            first: Calls a function on the first process while the others wait.
            label: Of the progress bar.

        Raises:
            ValueError: If a feature is not finite.
        """

        def write_manifest() -> None:
            if not self.manifest_file.is_file():
                with atomic_write(self.manifest_file) as file:
                    json.dump(self.manifest, file, indent=1)

        def block(rows: Tensor) -> Tensor:
            number = int(rows[0]) // self.block
            if not self.file(number).is_file():
                self._write(number, compute(rows)[: self.count - number * self.block])
            return torch.zeros(len(rows), 1, device=workers.device)

        first(write_manifest)
        workers.in_blocks(self.count, block, self.block, label)

    def _write(self, number: int, features: Tensor) -> None:
        if features.shape[1:] != (self.width,):
            raise ValueError(f"features must be [rows, {self.width}], got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            row = number * self.block + int((~torch.isfinite(features)).nonzero()[0, 0])
            raise ValueError(f"the feature of image {row} is not finite: check the target's weights")
        with atomic_write(self.file(number), "wb") as file:
            np.save(file, features.to(torch.float32).cpu().numpy(), allow_pickle=False)

    def blocks(self) -> Iterator[Tensor]:
        """The features in order, float64 [rows, D] each; one block is held at a time.

        Raises:
            ValueError: If a block is missing, or is not of this store's size.
        """
        for number in range(len(self)):
            yield self.part(number)

    def part(self, number: int) -> Tensor:
        """One block, float64 [rows, D]."""
        path, rows = self.file(number), min(self.block, self.count - number * self.block)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and start again") from error
        if found.shape != (rows, self.width) or found.dtype != np.float32:
            raise ValueError(f"{path} must hold float32 {(rows, self.width)}, found {found.dtype} {found.shape}")
        return torch.from_numpy(np.asarray(found, dtype=np.float64))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self.file(number).stat().st_size for number in range(len(self)) if self.file(number).is_file())
