"""Encoded ensembles: the members trained on the units that their codes name, and what the ensemble then tells."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_mem.attribution.codes import UnitCodes, UnitKind, units_of
from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.deduplicate import Rule
from lightning_mem.data.plan import Row, merge
from lightning_mem.diffusion import Sampler
from lightning_mem.records import Record, atomic_write
from lightning_mem.studies.base import AbstractStudy, Run, Settings
from lightning_mem.studies.recipe import read_data

SEED_STEP = 100
"""Between the seeds of two ensembles' members: none trains two members."""


class EnsembleStudy(AbstractStudy):
    """Which training images made the samples of an ensemble? Leave each out, with all members that saw it.

    Per seed an ensemble: the units of the training images, a code for each, kept in ``codes_seed<seed>.json``, and a
    row for every member, trained on the units whose code has its place set. Then the ensemble's own samples are drawn
    again without every unit in turn; see :class:`lightning_mem.attribution.Landscape`. Pooled over ensembles.

    Args:
        config: Files of ``fit`` that train a member; they name neither members nor their number.
        num_members: Training images of an ensemble; a seed draws those that a run of ``fit`` with it trains on.
        ensemble_size: Members of an ensemble; with n units at least ``minimum_members(n)``.
        units: What is left out as one: ``image``, ``duplicates`` or ``class``.
        duplicates: What a duplicate is: ``exact`` or a distance; see :class:`MemorizationDataModule`.
        seeds: Each decides images, codes and members of one ensemble.
        num_samples: Samples that are explained, of every ensemble.
        sample_seed: Of their noise.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        overrides: Further settings of ``fit`` for every member.

    Raises:
        ValueError: If a number is out of range or a file does not exist; when the rows are made, if there are too few
            members for the units (it says the least number).

    Source:
        Dai and Gifford, arXiv:2306.02174 (encoded ensembles) and arXiv:2406.07908 (counterfactuals).
    """

    def __init__(
        self,
        config: list[str],
        num_members: int = 64,
        ensemble_size: int = 8,
        units: UnitKind = "image",
        duplicates: Rule = "exact",
        seeds: list[int] | None = None,
        num_samples: int = 128,
        sample_seed: int = 0,
        num_steps: int = 25,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        overrides: Settings | None = None,
    ) -> None:
        super().__init__(config, overrides)
        self.seeds = [0] if seeds is None else seeds
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must hold at least one and none twice, got {self.seeds}")
        limits = ("num_members", num_members, 2), ("ensemble_size", ensemble_size, 2), ("num_samples", num_samples, 2)
        for name, value, least in limits:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_members, self.ensemble_size, self.num_samples = num_members, ensemble_size, num_samples
        self.units, self.duplicates = units, duplicates
        self.drawing: dict[str, Any] = {"seed": sample_seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}
        self._data: dict[int, MemorizationDataModule] = {}
        self._aside: Path | None = None

    # --- rows ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All members of the first ensemble, then of the next."""
        return [
            Row(name, SEED_STEP * (seed + 1) + k, members=f"seen/{name}.json", overrides=self.overrides, kind="member")
            for seed in self.seeds
            for k, name in enumerate(self.codes(seed).members)
        ]

    def data(self, seed: int) -> MemorizationDataModule:
        """The training images of an ensemble, read once."""
        if seed not in self._data:
            found: dict[str, Any] = {}
            for file in self.config:
                found = merge(found, yaml.safe_load(Path(file).read_text()))
            own = {"seed": seed, "num_members": self.num_members, "members": None}
            self._data[seed] = read_data({"data": {**merge(found, self.overrides)["data"], **own}})
        return self._data[seed]

    def codes(self, seed: int) -> UnitCodes:
        """Units and codes of an ensemble."""
        data = self.data(seed)
        known = data.source.labels() if self.units == "class" else None
        labels = None if known is None else torch.from_numpy(known)[data.members.indices]
        units = units_of(data.members, self.units, labels, self.duplicates, data.flip)
        names = [f"member{k:02d}_seed{seed}" for k in range(self.ensemble_size)]
        return UnitCodes.drawn(units, self.ensemble_size, seed, self.units, names)

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """With the file of the images that a member sees, which is written here; the manifest beside it."""
        place = self._place(Path(folder))
        for seed in self.seeds:
            codes = self.codes(seed)
            if row.name in codes.members:
                codes.save(place / f"codes_seed{seed}.json")
                with atomic_write(place / str(row.members)) as file:
                    json.dump(codes.seen_by(codes.members.index(row.name)), file)
        own = super().settings(row, folder, needed)
        return merge(own, {"data": {"members": str(place / str(row.members))}})

    def _place(self, folder: Path) -> Path:
        """The study's folder; where there is none yet (a dry run makes none), one that goes with this object."""
        if folder.is_dir():
            return folder
        if self._aside is None:
            self._aside = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._aside, ignore_errors=True)
        return self._aside

    # --- report --------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Explain the ensembles whose members are all there."""
        return []
