"""The linear datamodeling score: does an attribution foresee what models trained on halves of a pool become?"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mem.attribution.datamodeling_report import datamodeling_lines
from lightning_mem.data.plan import Row, merge
from lightning_mem.records import Record
from lightning_mem.studies.base import QUIET, AbstractStudy, Run, Settings
from lightning_mem.studies.shadows import SEED_STEP

TRAINING_STEP = 1_000_000
"""Between the seeds of two trainings on one subset."""


class DatamodelingStudy(AbstractStudy):
    """Which attribution foresees how a model's losses change with the images it is trained on?

    One model is trained on all of a pool, and ``subsets`` models on halves of it, as
    :class:`~lightning_mem.studies.MembershipStudy` trains the shadow models of LiRA: rows of the same recipe and seed
    are the same runs, and are trained once. With two or more ``trainings``, every half is trained on again from
    another seed; how well the losses of one training foresee those of the other is the ceiling of every method. The
    last row asks every method of ``attribution`` about the model of the whole pool and scores them.

    Args:
        config: Files of ``fit``: the recipe.
        pool: Files of ``fit`` laid over ``config`` for the halves: a source of half splits
            (``lightning_mem.data.PoolSource``), and half of it as members and as held-out images.
        subset: Files of ``fit`` laid over both for the models on halves: what is watched less closely.
        whole: Files of ``fit`` laid over ``config`` and ``pool`` for the model of the whole pool: all of it as members,
            and as many passes.
        attribution: Files of ``attribute`` (``lightning_mem.attribution.DatamodelingScores``, subsets left empty).
        subsets: Number of halves, at least 3.
        trainings: Of each half, at least 1; the first is LiRA's shadow model.
        seed: Of the model of the whole pool, and of the halves.
        overrides: Further settings of ``fit`` for every row.

    Raises:
        ValueError: If a number is out of range or a file does not exist.

    Source:
        Park et al., arXiv:2303.14186; for diffusion models: Zheng et al., arXiv:2311.00500.
    """

    def __init__(
        self,
        config: list[str],
        pool: list[str],
        subset: list[str],
        whole: list[str],
        attribution: list[str],
        subsets: int = 32,
        trainings: int = 2,
        seed: int = 0,
        overrides: Settings | None = None,
    ) -> None:
        super().__init__(config, overrides)
        halves = [*config, *pool]
        self.recipes: dict[str, list[str]] = {
            "whole": [*halves, *whole],
            "subset": [*halves, *subset],
            "repeat": [*halves, *subset],
            "attribution": attribution,
        }
        missing = sorted({file for files in self.recipes.values() for file in files if not Path(file).is_file()})
        if missing or not pool or not whole or not attribution:
            raise ValueError(f"pool, whole and attribution must name files, and all must exist; missing: {missing}")
        for word, value, least in (("subsets", subsets, 3), ("trainings", trainings, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{word} must be at least {least}, got {value}")
        self.pool, self.subsets, self.trainings, self.seed = [*config, *pool], subsets, trainings, seed

    def files(self, row: Row) -> list[str]:
        """By kind of row."""
        return self.recipes[row.kind]

    def rows(self) -> list[Row]:
        """The model of the whole pool, all halves once, then again, and the scores."""
        half, whole = (self._size(files) for files in (self.pool, self.recipes["whole"]))
        rows = [Row(f"whole_seed{self.seed}", self.seed, whole, overrides=self.overrides, kind="whole")]
        for training in range(self.trainings):
            for number in range(self.subsets):
                drawn = SEED_STEP * (self.seed + 1) + number
                name = f"subset{number:02d}_seed{self.seed}" + (f"_training{training}" if training else "")
                again = {"data": {"split_seed": drawn}} if training else {}
                over = merge(self.overrides, again)
                kind = "repeat" if training else "subset"
                rows.append(Row(name, drawn + TRAINING_STEP * training, half, overrides=over, kind=kind))
        needs = [row.name for row in rows]
        name = f"scores_seed{self.seed}_{self.subsets}x{self.trainings}"
        return [*rows, Row(name, self.seed, verb="attribute", needs=needs, kind="attribution")]

    @staticmethod
    def _size(files: Sequence[str]) -> int:
        """``data.num_members`` of a recipe."""
        found: dict[str, Any] = {}
        for file in files:
            found = merge(found, yaml.safe_load(Path(file).read_text()))
        return int(found["data"]["num_members"])

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """With the folders of the models in their places."""
        own = merge(QUIET, row.settings(folder))
        if row.verb == "fit":
            return own
        places = [str(needed[name]) for name in row.needs]
        subsets = [places[1 + t * self.subsets : 1 + (t + 1) * self.subsets] for t in range(self.trainings)]
        parents = {"trainer": {"default_root_dir": places[0]}, "attribution": {"init_args": {"subsets": subsets}}}
        return merge(own, parents)

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """The records of the last row, once it is there; writes ``datamodeling.md`` and a picture, prints the table."""
        done = next((run for run in runs if run.row.kind == "attribution"), None)
        if done is None:
            print(f"{len(runs)} models are trained; the scores need all of them")
            return []
        table = datamodeling_lines(done.records)
        (folder / "datamodeling.md").write_text(table)
        shutil.copyfile(done.folder / "images" / "datamodeling.png", folder / "datamodeling.png")
        print(f"{table}\nopen {folder / 'datamodeling.png'}, datamodeling.md and results.jsonl there")
        return done.records
