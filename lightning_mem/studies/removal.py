"""Counterfactual removal: does a sample change when the images that an attribution names are not trained on?"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from lightning_mem.data.plan import Row, merge
from lightning_mem.data.split import read_indices
from lightning_mem.diffusion import Target, sample
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.metrics import bootstrap_interval
from lightning_mem.modules import load_target
from lightning_mem.records import Record, atomic_write
from lightning_mem.studies.base import AbstractStudy, Run, Settings
from lightning_mem.studies.removal_picture import draw_removal, removal_table
from lightning_mem.types import SampleSet, Weights

CHANCE = "random"
"""The method that all others are held against."""


class RemovalStudy(AbstractStudy):
    r"""Does a sample change when the first images by an attribution are removed and the model is trained again?

    For every query and method a model of the target's recipe and seed, without the ``remove`` images that the method
    ranks first; then the query is drawn again from its own noise. Records of every method:
    ``attribution/<name>/removal_distance``, the mean RMS-L2 on [0, 1] between a query and what is drawn instead, and
    ``attribution/<name>/removal_gain`` by how much this is above that of the method ``random``, paired over queries.
    Training without some images draws another order of batches, so removing images by chance moves samples too.

    Args:
        target: Run folder of the model that drew the queries; its configuration is the recipe.
        explained: Folder of results of ``lightning_mem.attribution.Attributions`` on it (queries of kind ``model``).
        remove: Images that are removed, at least 1 and fewer than there are.
        num_queries: Queries, the first of their order, at least 2.
        methods: Names of methods; null for all that were asked. ``random`` must be among them.
        config: Further files of ``fit`` laid over the recipe.
        weights: ``ema`` takes averaged weights where there are any.
        overrides: Further settings of ``fit`` for every row.

    Raises:
        ValueError: If a folder or method is missing, a number is out of range, or the queries are not of the target.

    Source:
        Zheng et al., arXiv:2311.00500, section 4.3 (there 1000 of 5000 images, L2 and CLIP).
    """

    def __init__(
        self,
        target: str,
        explained: str,
        remove: int = 8,
        num_queries: int = 4,
        methods: list[str] | None = None,
        config: list[str] | None = None,
        weights: Weights = "ema",
        overrides: Settings | None = None,
    ) -> None:
        super().__init__([f"{target}/config.yaml", *(config or [])], overrides)
        self.target, self.explained = Path(target), Path(explained)
        files = self.explained / "scores.npz", self.explained / "samples" / "queries.npz", self.target / "members.json"
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"explained must be the results of attributions of samples of the target; missing: {missing}"
            )
        names = [name for name in self._scores if name not in ("addresses", "indices")]
        self.methods = names if methods is None else methods
        unknown = sorted(set(self.methods) - set(names))
        if unknown or CHANCE not in self.methods:
            raise ValueError(f"methods must be among {names}, and {CHANCE} among them, got {self.methods}")
        queries, images = len(self._scores["addresses"]), len(self._scores["indices"])
        if not 1 <= remove < images or not 2 <= num_queries <= queries:
            raise ValueError(
                f"remove must lie in 1 .. {images - 1} and num_queries in 2 .. {queries}, got {remove} and "
                f"{num_queries}"
            )
        self.remove, self.num_queries, self.weights = remove, num_queries, weights

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        with (self.explained / "scores.npz").open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive.files}

    @cached_property
    def queries(self) -> SampleSet:
        """The samples that were explained."""
        return SampleSet.load(self.explained / "samples" / "queries.npz")

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return yaml.safe_load((self.target / "config.yaml").read_text())

    def removed(self, query: int, method: str) -> list[int]:
        """Source indices that a method ranks first for a query; of equal scores the earlier ones."""
        order = np.argsort(-self._scores[method][query], kind="stable")[: self.remove]
        return [int(index) for index in self._scores["indices"][order]]

    def rows(self) -> list[Row]:
        """All methods on the first query, then on the next."""
        seed = int(self._recipe["seed_everything"])
        return [
            Row(name, seed, members=f"kept/{name}.json", overrides=self.overrides, kind=method)
            for query in range(self.num_queries)
            for method in self.methods
            for name in [self._name(query, method)]
        ]

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """With the file of the images that are left, which is written here."""
        query = next(q for q in range(self.num_queries) if row.name == self._name(q, row.kind))
        gone = set(self.removed(query, row.kind))
        kept = [int(index) for index in read_indices(self.target / "members.json", "members") if int(index) not in gone]
        file = self.place(folder) / str(row.members)
        with atomic_write(file) as out:
            json.dump(kept, out)
        own = super().settings(row, folder, needed)
        data = {"members": str(file), "num_members": None, "seed": self._recipe["data"]["seed"], "split_seed": None}
        return merge(own, {"data": data})

    def _name(self, query: int, method: str) -> str:
        return f"query{int(self._scores['addresses'][query]):03d}_{method}"

    # --- report --------------------------------------------------------------------------------------------------

    def redraw(self, target: Target, query: int) -> Tensor:
        """What a model draws at the noise of a query, uint8 [C, H, W]."""
        about = self.queries.settings
        address = self.queries.addresses[query : query + 1]
        seed = int(about["sample_seed"])
        condition = None if target.num_classes is None else draw_labels(target.num_classes, address, seed)
        return sample(
            target, address, seed=seed, num_steps=int(about["num_steps"]), sampler=about["sampler"],
            eta=float(about["eta"]), condition=condition, block=int(about["block"]),
        )[0]  # fmt: skip

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Distances over the queries whose rows are all there; writes ``removal.md`` and ``removal.png``."""
        by_name = {run.row.name: run for run in runs}
        names = {q: [self._name(q, method) for method in self.methods] for q in range(self.num_queries)}
        whole = [query for query, own in names.items() if by_name.keys() >= set(own)]
        own = load_target(self.target, self.weights)
        if not torch.equal(self.redraw(own, 0), self.queries.images[0]):
            raise ValueError(f"{self.explained} holds other samples than {self.target} draws: explain it again")
        if len(whole) < 2:
            print(f"{len(whole)} queries are complete; distances need two")
            return []
        drawn = torch.stack([
            torch.stack([self.redraw(load_target(by_name[name].folder, own.weights), query) for name in names[query]])
            for query in whole
        ])  # fmt: skip
        before = self.queries.images[whole]
        distances = rms(drawn, before[:, None])
        records = self._records(distances)
        table = removal_table(records)
        (folder / "removal.md").write_text(table)
        draw_removal(before, drawn, distances, self.methods, folder / "removal.png", self.remove)
        print(f"{table}\nopen {folder / 'removal.png'}, removal.md and results.jsonl there")
        return records

    def _records(self, distances: Tensor) -> list[Record]:
        """Means over queries, and paired differences to chance."""
        about: dict[str, Any] = {
            "remove": self.remove, "num_members": len(self._scores["indices"]), "queries": "model",
            "distance": "rms-l2", "sampler": self.queries.settings["sampler"],
            "num_steps": self.queries.settings["num_steps"], "trainings": distances.numel(),
        }  # fmt: skip
        step = int(self._recipe["trainer"]["max_steps"])
        chance = distances[:, self.methods.index(CHANCE)]
        found = []

        def record(name: str, values: Tensor, **said: Any) -> Record:
            low, high = bootstrap_interval(torch.mean, values)
            definition = {**about, **said, "interval": "bootstrap over queries 95%"}
            return Record(
                f"attribution/{name}", float(values.mean()), len(values), step, low, high, self.weights,
                int(self._recipe["seed_everything"]), "rms-l2", 0.0, definition, run=self.target.name,
            )  # fmt: skip

        for method, own in zip(self.methods, distances.T, strict=True):
            found.append(record(f"{method}/removal_distance", own))
            if method != CHANCE:
                gain = record(f"{method}/removal_gain", own - chance, other=CHANCE)
                gain.definition["claimed"] = bool((gain.low or 0) > 0 or (gain.high or 0) < 0)
                found.append(gain)
        return found


def rms(one: Tensor, other: Tensor) -> Tensor:
    """RMS-L2 on [0, 1] of uint8 images [..., C, H, W], float64 [...]."""
    return ((one.double() - other.double()) / 255).square().flatten(-3).mean(-1).sqrt()
