"""Effective model memorization: the memorization ratio of one recipe over the size of its training set."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mem.data import LabelRule
from lightning_mem.data.plan import Row
from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record
from lightning_mem.studies.base import AbstractStudy, Run, Settings
from lightning_mem.studies.emm_picture import draw_emm, emm_table
from lightning_mem.studies.onset import onsets
from lightning_mem.studies.optimum import optimum_ratio
from lightning_mem.studies.pooling import fit_power_law, level_crossing, pooled_share, seeds_interval

RATIO, CONTROL = "memorization/ratio", "memorization/ratio_heldout"

Cells = dict[tuple[str, int], list[Run]]
"""Finished runs by label rule and number of members, in order of both."""


class EffectiveMemorization(AbstractStudy):
    r"""How many images can one recipe copy, do labels change it, and when does copying begin?

    Trains the recipe on several sizes, with label rules and seeds as further factors, for equally many steps. Reports
    the ratio over size at the last step and after equally many passes over the images, the effective model
    memorization

    .. math:: \mathrm{EMM} = \max \{N : R(N) \ge 0.9\}

    by linear interpolation between sizes, the gain by labels at equal size, and the exponent b of
    :math:`\text{onset} \propto N^b`. EMM here is that of a number of steps: where onset grows in proportion to N, more
    steps raise it. Gu et al. compare at equally many passes, Bonnaire et al. at equally many steps.

    Args:
        config: Files of the recipe. Steps should be enough for the smallest size to be copied; a learning rate that
            falls to zero would hide late onsets.
        overrides: Further settings of ``fit`` for every row.
        num_members: Sizes, ascending. Below about 50 the rule of the ratio is less sharp: second neighbours are far.
        labels: Label rules; the first is trained at every size.
        labels_num_members: Sizes of the other rules; null takes every size.
        num_classes: Of the rule ``random``.
        seeds: Each decides network, training and draw of images of one run per cell; at least 3 for intervals.
        level: Where the ratio's curve is crossed, in (0, 1).
        onset_ratio: Second definition of onset: where the ratio first reaches this, by linear interpolation between
            evaluations, in (0, 1). The first is the rule of every run's summary.
        optimum: Also sample the closed-form optimum of the loss, once per label rule.

    Raises:
        ValueError: If sizes or seeds are missing or repeat, or a number is outside its range.

    Source:
        Gu et al., arXiv:2310.02664 (ratio, effective model memorization, labels); Bonnaire et al., arXiv:2505.17638
        (onset grows in proportion to the number of images at equal steps).
    """

    def __init__(
        self,
        config: list[str],
        num_members: list[int],
        overrides: Settings | None = None,
        labels: list[LabelRule] | None = None,
        labels_num_members: list[int] | None = None,
        num_classes: int = 10,
        seeds: list[int] | None = None,
        level: float = 0.9,
        onset_ratio: float = 0.1,
        optimum: bool = True,
    ) -> None:
        super().__init__(config, overrides)
        self.labels: list[LabelRule] = labels or ["none"]
        self.seeds = [0, 1, 2] if seeds is None else seeds
        others = num_members if labels_num_members is None else labels_num_members
        for name, values in (("num_members", num_members), ("labels_num_members", others), ("seeds", self.seeds)):
            if not values or sorted(set(values)) != sorted(values):
                raise ValueError(f"{name} must hold at least one number and none twice, got {values}")
        if min(num_members + others) < 2:
            raise ValueError(f"the ratio needs num_members of at least 2, got {min(num_members + others)}")
        for name, value in (("level", level), ("onset_ratio", onset_ratio)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        self.sizes = {rule: sorted(others if place else num_members) for place, rule in enumerate(self.labels)}
        self.num_classes, self.level, self.onset_ratio, self.optimum = num_classes, level, onset_ratio, optimum

    def rows(self) -> list[Row]:
        """Every cell with the first seed, then with the next."""
        return [self._row(rule, n, seed) for seed in self.seeds for rule in self.labels for n in self.sizes[rule]]

    def _row(self, rule: LabelRule, n: int, seed: int) -> Row:
        data = {"labels": rule, **({"num_classes": self.num_classes} if rule == "random" else {})}
        return Row(f"n{n}_{rule}_seed{seed}", seed=seed, num_members=n, overrides={"data": data})

    # --- pooling -------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool the runs; writes ``emm.png`` and ``emm.md`` and prints the table."""
        cells: Cells = {}
        for rule in self.labels:
            for n in self.sizes[rule]:
                own = [run for run in runs if (run.row.overrides["data"]["labels"], run.row.num_members) == (rule, n)]
                if own:
                    cells[rule, n] = own
        records = [record for cell in cells for record in self._ratios(cells, cell)]
        for pool in (self._equal_passes, self._gain, self._onsets):
            records += [record for cell in cells for record in pool(cells, cell)]
        for rule in self.labels:
            records += self._crossing(cells, rule) + self._slopes(cells, rule)
        if self.optimum:
            records += self._optima(cells)
        curves = {cell: [run.records for run in own] for cell, own in cells.items()}
        draw_emm(records, curves, folder / "emm.png", self.onset_ratio)
        table = emm_table(records)
        (folder / "emm.md").write_text(table)
        print(f"{table}\nopen {folder / 'emm.png'}, {folder / 'emm.md'} and {folder / 'results.jsonl'}")
        return records

    def _pooled(self, of: Record, name: str, runs: Sequence[Run], **changes: Any) -> Record:
        """A record of several runs, made from one of theirs."""
        about = {"seeds": len({run.row.seed for run in runs}), **changes.pop("definition")}
        kept = {key: value for key, value in of.definition.items() if key not in ("bank_size", "interval")}
        own = {"low": None, "high": None, "unit": "fraction", "seconds": 0.0, "data_digest": "", "run": "pooled"}
        return replace(of, name=name, definition={**kept, **about}, **{**own, **changes})

    def _ratios(self, cells: Cells, cell: tuple[str, int]) -> list[Record]:
        """Ratio and control at the last step, and the highest ratio on the way, which Gu et al. report."""
        rule, n = cell
        found = []
        for name, key, reading in (
            (RATIO, RATIO, "last"),
            (CONTROL, CONTROL, "last"),
            ("emm/highest", RATIO, "highest"),
        ):
            curves = [curve(run.records, key) for run in cells[cell]]
            if reading == "last":
                chosen = [rows[-1] for rows in curves]
            else:
                chosen = [max(rows, key=lambda record: record.value or 0.0) for rows in curves]
            if any(record.value is None for record in chosen):
                continue
            mean, low, high = pooled_share([record.value or 0.0 for record in chosen], chosen[0].n)
            how = "union of t over seeds and wilson over samples" if len(chosen) > 1 else "wilson of one seed"
            about = {"num_members": n, "labels": rule, "reading": f"{reading} evaluation", "interval": f"{how} 95%"}
            found.append(
                self._pooled(
                    curves[0][-1], name, cells[cell], value=mean, low=low, high=high,
                    n=sum(record.n for record in chosen), definition=about,
                )
            )  # fmt: skip
        return found

    def _equal_passes(self, cells: Cells, cell: tuple[str, int]) -> list[Record]:
        """The ratio after equally many passes over the members: as many as the largest set has had at its end."""
        rule, n = cell
        curves = [curve(run.records, RATIO) for run in cells[cell]]
        per_image = min(rows[-1].step for rows in curves) / max(size for _, size in cells)
        at = per_image * n
        values = [
            float(np.interp(at, [0, *(row.step for row in rows)], [0.0, *(row.value or 0.0 for row in rows)]))
            for rows in curves
        ]
        mean, low, high = pooled_share(values, curves[0][-1].n)
        about = {
            "num_members": n, "labels": rule, "reading": "linear between evaluations", "steps_per_image": per_image,
            "interval": "as of memorization/ratio",
        }  # fmt: skip
        record = self._pooled(
            curves[0][-1], "emm/equal_passes", cells[cell], value=mean, low=low, high=high,
            n=sum(rows[-1].n for rows in curves), definition=about,
        )  # fmt: skip
        return [replace(record, step=round(at))]

    def _gain(self, cells: Cells, cell: tuple[str, int]) -> list[Record]:
        """Difference to the first label rule at the same size, paired by seed: same images, same starting noise."""
        rule, n = cell
        base = {run.row.seed: _last(run) for run in cells.get((self.labels[0], n), [])}
        pairs = [run for run in cells[cell] if run.row.seed in base]
        if rule == self.labels[0] or not pairs:
            return []
        gains = [(_last(run).value or 0.0) - (base[run.row.seed].value or 0.0) for run in pairs]
        low, high = seeds_interval(gains) if len(gains) > 1 else (None, None)
        about = {"num_members": n, "labels": rule, "against": self.labels[0], "interval": "t over paired seeds 95%"}
        value = sum(gains) / len(gains)
        return [
            self._pooled(
                _last(pairs[0]), "emm/gain", pairs, value=value, low=low, high=high, n=len(gains), definition=about
            )
        ]

    def _crossing(self, cells: Cells, rule: str) -> list[Record]:
        """Where the mean ratio crosses the level; the interval is over the seeds' own crossings."""
        own = {n: runs for (label, n), runs in cells.items() if label == rule}
        if len(own) < 2:
            return []
        means = [sum(_last(run).value or 0.0 for run in runs) / len(runs) for runs in own.values()]
        value = level_crossing(list(own), means, self.level)
        each = []
        for seed in self.seeds:
            points = {n: _last(run).value or 0.0 for n, runs in own.items() for run in runs if run.row.seed == seed}
            if len(points) > 1:
                each.append(level_crossing(list(points), list(points.values()), self.level))
        crossings = [place for place in each if place is not None]
        about: dict[str, Any] = {
            "labels": rule, "level": self.level, "sizes": _words(own), "interpolation": "linear in num_members",
            "seeds_that_cross": len(crossings), "reading": "last evaluation",
        }  # fmt: skip
        low = high = None
        if value is not None and len(crossings) == len(each) > 1:
            low, high = seeds_interval(crossings)
            about["interval"] = "t over the seeds' own crossings 95%"
        runs = [run for runs in own.values() for run in runs]
        return [
            self._pooled(
                _last(runs[0]), "emm/crossing", runs, value=value, low=low, high=high, n=len(runs), unit="images",
                definition=about,
            )
        ]  # fmt: skip

    def _onsets(self, cells: Cells, cell: tuple[str, int]) -> list[Record]:
        """Mean onset of a cell by both definitions; no number where a run never got there."""
        rule, n = cell
        found = []
        for event, steps in onsets([run.records for run in cells[cell]], self.onset_ratio).items():
            happened = [step for step in steps if step is not None]
            about = {"num_members": n, "labels": rule, "event": event, "runs_that_got_there": len(happened)}
            value = sum(happened) / len(happened) if len(happened) == len(steps) else None
            low = high = None
            if value is not None and len(happened) > 1:
                low, high = seeds_interval(happened)
                about["interval"] = "t over seeds 95%"
            found.append(
                self._pooled(
                    _last(cells[cell][0]), "onset/step", cells[cell], value=value, low=low, high=high, n=len(steps),
                    unit="steps", definition=about,
                )
            )  # fmt: skip
        return found

    def _slopes(self, cells: Cells, rule: str) -> list[Record]:
        """Exponent of onset over size, from the sizes at which every run got there."""
        own = {n: runs for (label, n), runs in cells.items() if label == rule}
        events: dict[str, dict[int, list[float]]] = {}
        for n, runs in own.items():
            for event, steps in onsets([run.records for run in runs], self.onset_ratio).items():
                happened = [step for step in steps if step is not None]
                if len(happened) == len(steps):
                    events.setdefault(event, {})[n] = happened
        found = []
        for event, points in events.items():
            places = [(n, step) for n, steps in points.items() for step in steps]
            if len(points) < 2 or len(places) < 3:
                continue
            law = fit_power_law(*zip(*places, strict=True))
            about = {
                "labels": rule, "event": event, "scale": law.scale, "sizes": _words(points),
                "smallest": min(points), "largest": max(points),
                "interval": "t of least squares in log-log 95%",
            }  # fmt: skip
            runs = [run for n in points for run in own[n]]
            found.append(
                self._pooled(
                    _last(runs[0]), "onset/slope", runs, value=law.slope, low=law.low, high=law.high, n=law.points,
                    unit="exponent", definition=about,
                )
            )  # fmt: skip
        return found

    # --- closed form ---------------------------------------------------------------------------------------------

    def _optima(self, cells: Cells) -> list[Record]:
        """Ratio of samples from the closed-form optimum on the largest set of each label rule."""
        largest = {rule: run[0] for (rule, _), run in cells.items()}  # cells ascend in size
        return [record for run in largest.values() if (record := optimum_ratio(run)) is not None]


def _words(sizes: Iterable[int]) -> str:
    """For a definition, whose values are flat."""
    return " ".join(map(str, sizes))


def _last(run: Run) -> Record:
    return curve(run.records, RATIO)[-1]
