"""One setting of SIDE over some values and seeds: how much it extracts, and how much of that is distinct."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_mem.data.plan import Row, merge
from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record
from lightning_mem.studies.base import QUIET, AbstractStudy, Run, Settings
from lightning_mem.studies.pooling import pooled_ratio, pooled_record, pooled_share, seeds_interval
from lightning_mem.studies.side_picture import UNGUIDED, arms_of, draw_sweep, sweep_table

PREFIX = "attack/side/"
AMS, UMS, HITS, UNIQUE = f"{PREFIX}ams/", f"{PREFIX}ums/", f"{PREFIX}hits", f"{PREFIX}unique_share"
CONTROL = "_heldout"
Value = int | float | str | list[int] | dict[str, int | float | str | bool | None] | None
"""Of a swept setting: a list is an interval of timesteps, a mapping sets several keys, null switches it off."""

Part = Literal["target", "surrogate", "attack"]

BASELINE = "time_independent"


class SideSweep(AbstractStudy):
    """What does one setting of SIDE change, on the same targets, from the same starting noise?

    A chain per seed: a target, trained once for all values and shared with other studies; where a surrogate is to be
    trained, one for each value that its training depends on; and an attack per value. Every arm that the attack's
    settings ask for is reported: hits with their held-out control, AMS and UMS per band, share of distinct images, each
    with an interval over seeds; against the unguided arm of the same seed and value; and two shapes, paired by seed:
    the last value against the first, and the peak between them against the higher of both, where the peak's place is
    the one that the *other* seeds show.

    Args:
        config: Files of ``fit`` that train the target.
        attack: Files of ``attack``; they are laid over the target's own configuration.
        num_members: Images of the target.
        parameter: The setting in words, for picture and records.
        values: In the order of the picture.
        sets: Dotted settings that take the value, by part: ``target``, ``surrogate`` or ``attack``.
        surrogate: Files of ``fit`` that train the surrogate; the attack takes its pseudo-labels. Null: none is trained,
            the attack makes its own pseudo-labels and has closed-form arms only, and a value costs its attack alone.
        time_independent: Train the baseline too, from the same files on hard labels and without time.
        seeds: Each decides one target, its surrogates and the attacks on it; at least 3 for intervals.
        overrides: Further settings of ``fit`` for the target.
        surrogate_overrides: Of ``fit`` for the surrogate.
        attack_overrides: Of ``attack``.
        logarithmic: Draw the values on a logarithmic axis; all must be positive numbers.

    Raises:
        ValueError: If values or seeds are missing or repeat, no setting or one of an untrained surrogate takes the
            value, the baseline is asked for without files of a surrogate, or a file does not exist.

    Source:
        SIDE, arXiv:2410.02467 v7, figures 6 to 10 (its sweeps have one seed and no control).
    """

    def __init__(
        self,
        config: list[str],
        attack: list[str],
        num_members: int,
        parameter: str,
        values: list[Value],
        sets: dict[Part, list[str]],
        surrogate: list[str] | None = None,
        time_independent: bool = False,
        seeds: list[int] | None = None,
        overrides: Settings | None = None,
        surrogate_overrides: Settings | None = None,
        attack_overrides: Settings | None = None,
        logarithmic: bool = False,
    ) -> None:
        super().__init__(config, overrides)
        self.seeds = [0, 1, 2] if seeds is None else seeds
        self.recipes = {"target": config, "surrogate": surrogate or [], "attack": attack}
        self.recipes[BASELINE] = self.recipes["surrogate"]
        missing = [file for files in self.recipes.values() for file in files if not Path(file).is_file()]
        if missing or not attack:
            raise ValueError(f"attack must name at least one file, and all must exist; missing: {missing}")
        names = [_word(value) for value in values]
        for what, given in (("values", names), ("seeds", self.seeds)):
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{what} must hold at least one and none twice, got {given}")
        if not any(sets.values()) or (("surrogate" in sets or time_independent) and not surrogate):
            raise ValueError(
                "sets must name a setting that takes the value; one of the surrogate, and time_independent, need its "
                f"files, got sets {sets} and surrogate {surrogate}"
            )
        if logarithmic and not all(isinstance(value, int | float) and value > 0 for value in values):
            raise ValueError(f"a logarithmic axis needs positive numbers, got {values}")
        self.parameter, self.values, self.logarithmic = parameter, dict(zip(names, values, strict=True)), logarithmic
        self.sets, self.num_members, self.time_independent = sets, num_members, time_independent
        further = {"surrogate": surrogate_overrides, "attack": attack_overrides}
        self.further = {part: {} if given is None else given.values for part, given in further.items()}

    # --- rows ----------------------------------------------------------------------------------------------------

    def files(self, row: Row) -> list[str]:
        """By kind of row."""
        return self.recipes[row.kind]

    def rows(self) -> list[Row]:
        """The whole chain of the first seed, then of the next."""
        rows: dict[str, Row] = {}
        for seed in self.seeds:
            for word in self.values:
                target = self._row("target", word, seed)
                chain = [target]
                if self.recipes["surrogate"]:
                    chain.append(self._row("surrogate", word, seed, (target.name,)))
                if self.time_independent:
                    chain.append(self._row("surrogate", word, seed, (target.name,), BASELINE))
                chain.append(self._row("attack", word, seed, tuple(row.name for row in chain)))
                rows |= {row.name: row for row in chain}
        return list(rows.values())

    def _row(self, kind: Part, word: str, seed: int, needs: tuple[str, ...] = (), name: str = "") -> Row:
        """A row; two values share it where no setting of its part, or of one it builds on, takes the value."""
        chain: list[Part] = ["target", "surrogate", "attack"]
        depends = any(self.sets.get(part) for part in chain[: chain.index(kind) + 1])
        own: dict[str, Any] = {}
        for key in self.sets.get(kind, []):
            own = merge(own, _nested(key, self.values[word]))
        if kind == "target":
            own = merge(self.overrides, own)
        if name == BASELINE:
            own = merge(own, {"model": {"init_args": {"time_dependent": False, "labels_as": "hard"}}})
        name = name or kind
        return Row(
            f"{name}_{word}_seed{seed}" if depends else f"{name}_seed{seed}",
            seed=seed,
            num_members=self.num_members if kind == "target" else None,
            overrides=merge(self.further.get(kind, {}), own),
            verb="attack" if kind == "attack" else "fit",
            needs=needs,
            kind=name,
        )

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """Of the target, or of a row on top of it: with the folders of what it builds on in their places."""
        places = [str(needed[name]) for name in row.needs]
        parents: dict[str, Any] = {}
        if row.kind in ("surrogate", BASELINE):
            parents = {
                "model": {"init_args": {"target": places[0]}},
                "data": {"source": {"init_args": {"target": places[0], "seed": row.seed}}},
            }
        elif row.kind == "attack":
            classifiers = dict(zip(("surrogate", BASELINE), places[1:], strict=False))
            own: dict[str, Any] = {**classifiers} or {"pseudo_labels": {"init_args": {"seed": row.seed}}}
            parents = {"trainer": {"default_root_dir": places[0]}, "attack": {"init_args": own}}
        return merge(merge(QUIET, row.settings(folder)), parents)

    # --- pooling -------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool the attacks; writes ``sweep.png`` and ``sweep.md`` and prints the table."""
        cells = {
            word: [run for run in runs if run.row.kind == "attack" and self._word_of(run) == word]
            for word in self.values
        }
        cells = {word: own for word, own in cells.items() if own}
        records = self._targets([run for run in runs if run.row.kind == "target"])
        for word, own in cells.items():
            for arm in arms_of([record for run in own for record in run.records]):
                records += self._measures(own, word, arm) + self._gains(own, word, arm)
        for arm in arms_of(records):
            records += self._shapes(cells, arm)
        if not cells:
            return records
        each = {
            (word, run.row.seed): [record for record in run.records if record.name.startswith(PREFIX)]
            for word, own in cells.items()
            for run in own
        }
        draw_sweep(records, each, folder / "sweep.png", self.parameter, list(cells), self._places(list(cells)))
        table = sweep_table(records, self.parameter, list(cells))
        (folder / "sweep.md").write_text(table)
        print(f"{table}\nopen {folder / 'sweep.png'}, {folder / 'sweep.md'} and {folder / 'results.jsonl'}")
        return records

    def _word_of(self, run: Run) -> str:
        return run.row.name.removeprefix("attack_").rpartition("_seed")[0]

    def _places(self, words: Sequence[str]) -> list[float] | None:
        """Where values stand on the axis; null where only their order means something."""
        values = [self.values[word] for word in words]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        return numbers if self.logarithmic and len(numbers) == len(values) else None

    def _targets(self, runs: Sequence[Run]) -> list[Record]:
        """Ratio of the targets themselves, as their training measured it last."""
        last = [rows[-1] for run in runs if (rows := curve(run.records, "memorization/ratio"))]
        if not last or any(self.sets.get("target", [])):
            return []
        mean, low, high = pooled_share([record.value or 0.0 for record in last], last[0].n)
        about = {"num_members": self.num_members, "parameter": self.parameter}
        return [pooled_record(last, mean, low, high, sum(record.n for record in last), about)]

    def _measures(self, runs: Sequence[Run], word: str, arm: str) -> list[Record]:
        """Every number of the attack, pooled over the seeds that have it."""
        names = dict.fromkeys(r.name for run in runs for r in run.records if r.name.startswith(PREFIX))
        found = []
        for name in names:
            own = [record for run in runs if (record := of_arm(run.records, name, arm)) is not None]
            values = [record.value for record in own if record.value is not None]
            if not values or len(values) < len(own):
                continue
            about = {**self._about(word, arm), "seeds": len(own)}
            mean, low, high = _mean(name, values, own)
            found.append(pooled_record(own, mean, low, high, sum(record.n for record in own), about))
        return found

    def _gains(self, runs: Sequence[Run], word: str, arm: str) -> list[Record]:
        """Difference to the unguided arm of the same seed: same target, same starting noise."""
        found = []
        for name in _shaped(runs) if arm != UNGUIDED else ():
            pairs = [(of_arm(run.records, name, arm), of_arm(run.records, name, UNGUIDED)) for run in runs]
            both = [(a, b) for a, b in pairs if a is not None and b is not None and None not in (a.value, b.value)]
            gains = [(a.value or 0.0) - (b.value or 0.0) for a, b in both]
            if gains:
                about = {**self._about(word, arm), "of": name.removeprefix(PREFIX), "seeds": len(gains)}
                found.append(self._difference("sweep/gain", [a for a, _ in both], gains, about))
        return found

    def _shapes(self, cells: Mapping[str, Sequence[Run]], arm: str) -> list[Record]:
        """Ends and peak of each measure over the values, from the seeds that have all of them."""
        words, found = list(cells), []
        for name in _shaped([run for runs in cells.values() for run in runs]):
            curves: dict[int, list[float]] = {}
            like: list[Record] = []
            for seed in self.seeds:
                own = [
                    of_arm(run.records, name, arm) for runs in cells.values() for run in runs if run.row.seed == seed
                ]
                rows = [record for record in own if record is not None and record.value is not None]
                if len(rows) == len(words):
                    curves[seed] = [record.value or 0.0 for record in rows]
                    like.append(rows[-1])
            about = {
                "surrogate": arm, "parameter": self.parameter, "of": name.removeprefix(PREFIX),
                "values": " ".join(words), "seeds": len(curves),
            }  # fmt: skip
            if curves and len(words) > 1:
                ends = [values[-1] - values[0] for values in curves.values()]
                found.append(self._difference("sweep/ends", like, ends, about))
            if len(curves) > 1 and len(words) > 2:
                peaks = [
                    peak_over_ends(values, [v for s, v in curves.items() if s != seed])
                    for seed, values in curves.items()
                ]
                found.append(self._difference("sweep/peak", like, peaks, about))
        return found

    def _about(self, word: str, arm: str) -> dict[str, Any]:
        return {"surrogate": arm, "parameter": self.parameter, "value": word}

    def _difference(self, name: str, of: Sequence[Record], values: Sequence[float], about: Mapping[str, Any]) -> Record:
        """A record of a mean over paired seeds."""
        low, high = seeds_interval(values) if len(values) > 1 else (None, None)
        about = {**about, "interval": "t over paired seeds 95%"}
        return replace(pooled_record(of, sum(values) / len(values), low, high, len(values), about), name=name)


def _shaped(runs: Sequence[Run]) -> list[str]:
    """What is compared with the unguided arm, and whose ends and peak are looked at: no control."""
    names = dict.fromkeys(record.name for run in runs for record in run.records)
    return [
        name for name in names if name in (HITS, UNIQUE) or (name.startswith((AMS, UMS)) and not name.endswith(CONTROL))
    ]


def peak_over_ends(values: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """How far a curve stands above the higher of its ends, at the place between where other curves are highest.

    Taking the place from other curves keeps the answer from being positive by choice.

    Args:
        values: At least 3.
        others: Curves of as many values, at least one.

    Returns:
        Above 0 for an inverted U.
    """
    means = [sum(column) / len(others) for column in zip(*others, strict=True)]
    place = max(range(1, len(values) - 1), key=lambda at: means[at])
    return values[place] - max(values[0], values[-1])


def of_arm(records: Sequence[Record], name: str, arm: str) -> Record | None:
    """The record of a name and an arm; of several the one with most samples."""
    own = [record for record in records if record.name == name and record.definition.get("surrogate") == arm]
    return max(own, key=lambda record: record.n, default=None)


def _mean(name: str, values: Sequence[float], own: Sequence[Record]) -> tuple[float, float | None, float | None]:
    """Mean over seeds with its interval."""
    if name.startswith(AMS) or name in (HITS, HITS + CONTROL):  # shares of independent samples
        return pooled_share(values, min(record.n for record in own))  # an arm of selection has what was selected
    if own[0].unit == "ratio":
        ends = [(r.low, r.high) for r in own if r.low is not None and r.high is not None]
        return pooled_ratio(values, ends if len(ends) == len(own) else ())
    mean = sum(values) / len(values)
    return (mean, *seeds_interval(values)) if len(values) > 1 else (mean, own[0].low, own[0].high)


def _word(value: Value) -> str:
    """A value as it stands in names, records and pictures.

    A mapping is told by its first value, and by the keys of those that are true; a path by its last part.
    """
    if isinstance(value, dict):
        first, *others = value.items()
        parts = [_word(first[1]), *(key for key, own in others if own is True)]
    elif isinstance(value, list):
        parts = [str(number) for number in value]
    else:
        parts = ["none" if value is None else str(value).rpartition("/")[2]]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _nested(key: str, value: Value) -> dict[str, Any]:
    """``a.b`` -> ``{"a": {"b": value}}``."""
    found: Any = value
    for part in reversed(key.split(".")):
        found = {part: found}
    return found
