"""Encoded ensembles: the members trained on the units that their codes name, and what the ensemble then tells."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_mem.attribution.codes import UnitCodes, UnitKind, units_of
from lightning_mem.attribution.counterfactual import Landscape, evaluations, landscape
from lightning_mem.attribution.counterfactual_picture import draw_counterfactuals, top_counterfactuals
from lightning_mem.attribution.counterfactual_report import (
    agreement_numbers,
    copy_numbers,
    radius_numbers,
    source_numbers,
)
from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.attribution.influence import first_order_landscape
from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.data.deduplicate import Rule
from lightning_mem.data.plan import Row, merge
from lightning_mem.diffusion import Sampler
from lightning_mem.evaluation import Number
from lightning_mem.records import Record, atomic_write, digest
from lightning_mem.studies.base import QUIET, AbstractStudy, Run, Settings
from lightning_mem.studies.ensembles_pool import pooled, table
from lightning_mem.studies.recipe import read_data

SEED_STEP = 100
"""Between the seeds of two ensembles' members: none trains two members."""

PICTURES = 8
"""Samples that are shown."""

Make = Callable[..., Landscape]
"""What makes a landscape: leaving out, or derivatives."""


class EnsembleStudy(AbstractStudy):
    """Which training images made the samples of an ensemble? Leave each out, with all members that saw it.

    Per seed an ensemble: the units of the training images, a code for each, kept in ``codes_seed<seed>.json``, and a
    row for every member, trained on the units whose code has its place set. Then the ensemble's own samples are drawn
    again without every unit in turn; see :class:`lightning_mem.attribution.Landscape`. Where ``target`` is given, one
    model is trained on all the images too, and the samples of *that* are explained. Pooled over ensembles.

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
        target: Files of ``fit`` that train one model on all the images (such a run elsewhere is reused); null for none.
        attribution: Files of ``attribute`` that explain the samples of that model
            (``lightning_mem.attribution.Attributions``); the study names the ensemble to its methods.

    Raises:
        ValueError: If a number is out of range, a file does not exist, or only one of target and attribution is given;
            when the rows are made, if there are too few members for the units (it says the least number).

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
        target: list[str] | None = None,
        attribution: list[str] | None = None,
    ) -> None:
        super().__init__(config, overrides)
        self.target, self.attribution = target or [], attribution or []
        missing = [file for file in (*self.target, *self.attribution) if not Path(file).is_file()]
        if missing or bool(target) != bool(attribution):
            raise ValueError(
                f"target and attribution need each other, and all files must exist, got target {target}, attribution "
                f"{attribution}; missing: {missing}"
            )
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

    # --- rows ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All members of the first ensemble and what is explained by them, then of the next."""
        found = []
        for seed in self.seeds:
            members = [
                Row(
                    name,
                    SEED_STEP * (seed + 1) + k,
                    members=f"seen/{name}.json",
                    overrides=self.overrides,
                    kind="member",
                )
                for k, name in enumerate(self.codes(seed).members)
            ]
            found += members
            if self.target:
                whole = Row(f"target_seed{seed}", seed, self.num_members, kind="target")
                needs = [whole.name, *(row.name for row in members)]
                found += [whole, Row(f"explained_seed{seed}", seed, verb="attribute", needs=needs, kind="explained")]
        return found

    def files(self, row: Row) -> list[str]:
        """By kind of row."""
        return {"target": self.target, "explained": self.attribution}.get(row.kind, self.config)

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
        place, alone = self.place(folder), merge(QUIET, row.settings(folder))
        if row.kind == "target":
            return alone
        if row.kind == "explained":
            places = {"trainer": {"default_root_dir": str(needed[row.needs[0]])}}
            asked = {"attribution": {"init_args": {"methods": self._methods(place / f"codes_seed{row.seed}.json")}}}
            return merge(alone, merge(places, asked))
        for seed in self.seeds:
            codes = self.codes(seed)
            if row.name in codes.members:
                codes.save(place / f"codes_seed{seed}.json")
                with atomic_write(place / str(row.members)) as file:
                    json.dump(codes.seen_by(codes.members.index(row.name)), file)
        return merge(super().settings(row, folder, needed), {"data": {"members": str(place / str(row.members))}})

    def _methods(self, codes: Path) -> list[dict[str, Any]]:
        """The methods that explain, with the ensemble in its place."""
        found: dict[str, Any] = {}
        for file in self.attribution:
            found = merge(found, yaml.safe_load(Path(file).read_text()))
        given = found["attribution"]["init_args"]["methods"]
        ensemble = {"init_args": {"ensemble": str(codes)}}
        return [merge(one, ensemble) if one["class_path"].endswith("EnsembleAblation") else one for one in given]

    # --- report --------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Explain the ensembles whose members are all there; writes pictures and landscapes, prints a table."""
        found: list[list[Record]] = []
        for seed in self.seeds:
            own = [run for run in runs if run.row.name in self.codes(seed).members]
            if len(own) == self.ensemble_size:
                found.append(self._explained(seed, folder, own[0]))
            else:
                print(f"{len(own)} of the {self.ensemble_size} members of seed {seed} are trained: not explained yet")
        records = pooled(found)
        for run in (run for run in runs if run.row.kind == "explained"):
            records += run.records
            picture = folder / "images" / f"attribution_{run.row.name.rpartition('_')[2]}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.folder / "images" / "attribution.png", picture)
        if records:
            print(f"{table(records)}\nopen {folder / 'images'} and {folder / 'results.jsonl'}")
        return records

    def _explained(self, seed: int, folder: Path, run: Run) -> list[Record]:
        """The numbers of one ensemble."""
        ensemble = Ensemble.load(folder / f"codes_seed{seed}.json")
        data = self.data(seed)
        images, owners = data.bank()
        units = ensemble.codes.unit_of(data.members.indices[owners])
        identity = digest(ensemble.digest, images, self.num_samples, self.drawing)
        exact, first_order = (
            self._kept(folder / f"{name}_seed{seed}.npz", identity, make, ensemble, images, units)
            for name, make in (("landscape", landscape), ("first_order", first_order_landscape))
        )
        seconds = exact[1]["seconds"], first_order[1]["seconds"]
        about = {
            "num_members": self.num_members, "ensemble_size": self.ensemble_size, "units": self.units,
            "num_units": len(ensemble.codes.units), "num_samples": self.num_samples,
            **{key: value for key, value in self.drawing.items() if key != "seed"}, "block": BLOCK,
            "sample_seed": self.drawing["seed"],
        }  # fmt: skip
        ablated, forward = {**about, "method": "exact ablation"}, {**about, "method": "forward-mode derivative"}
        steps = self.drawing["num_steps"]
        numbers = [
            *source_numbers(exact[0], ablated),
            *source_numbers(first_order[0], forward),
            *radius_numbers(exact[0], ablated),
            *agreement_numbers(exact[0], first_order[0], forward),
            *copy_numbers(ensemble, images, units, self.num_samples, about, **self.drawing),
            Number("trainings", self.ensemble_size, 1, about, None, "count"),
            Number("evaluations", evaluations(ensemble, self.num_samples, steps), 1, ablated, None, "count"),
            Number("seconds", round(seconds[0], 1), 1, ablated, None, "s"),
            Number("seconds", round(seconds[1], 1), 1, forward, None, "s"),
        ]
        self._draw(ensemble, exact[0], images, units, folder / "images" / f"counterfactuals_seed{seed}.png")
        step = int(run.config["trainer"]["max_steps"])
        weights = ensemble.members[0].weights
        records = []
        for number in numbers:
            low, high = number.interval or (None, None)
            records.append(
                Record(
                    f"attribution/ensemble/{number.name}", number.value, number.n, step, low, high, weights, seed,
                    number.unit, 0.0, number.definition, data.members.digest, run=folder.name,
                )
            )  # fmt: skip
        return records

    def _kept(
        self, file: Path, identity: str, make: Make, ensemble: Ensemble, images: Tensor, units: Tensor
    ) -> tuple[Landscape, dict[str, float]]:
        """A landscape, computed once; a report that is asked for again reads it."""
        known = Landscape.load(file, identity)
        if known is None:
            begun = time.monotonic()
            found = make(ensemble, images, units, torch.arange(self.num_samples), **self.drawing)
            known = found, {"seconds": time.monotonic() - begun}
            found.save(file, identity, **known[1])
        return known

    def _draw(self, ensemble: Ensemble, found: Landscape, images: Tensor, units: Tensor, path: Path) -> None:
        shown = range(min(PICTURES, len(found)))
        tops = found.moved_away.argmax(1)[: len(shown)].tolist()
        draw_counterfactuals(
            found, top_counterfactuals(ensemble, tops, shown, **self.drawing), images, units, path, "moved_away"
        )
