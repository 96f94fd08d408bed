"""Which setting of CPSample stops enough copies for the least loss of quality? A grid on seeds of its own."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_mem.attacks.protection_scores import UNPROTECTED
from lightning_mem.records import Record, atomic_write
from lightning_mem.studies.base import Run, Settings
from lightning_mem.studies.calibration_picture import draw_calibration
from lightning_mem.studies.protection_pool import of_arm, pooled
from lightning_mem.studies.protection_rows import ProtectionChains
from lightning_mem.studies.shown import in_words

CPSAMPLE = "lightning_mem.defenses.CPSampleProtection"

Value = int | float | str | list[int] | None


@dataclass(frozen=True)
class Point:
    """A setting of the grid and what it gave, pooled over seeds.

    Args:
        name: Of the protection.
        reduction: Copies without protection over those with it.
        frechet: Distance to held-out images over that without protection.
        z: Of the loss attack at the timestep that membership is judged at; null where it was not asked.
    """

    name: str
    reduction: Record
    frechet: Record
    z: Record | None


class ProtectionCalibration(ProtectionChains):
    r"""Picks CPSample's settings on seeds that are not used to report, and draws the frontier.

    Every setting of ``grid`` protects the same targets from the same starting noise, beside ``others``. Two are picked,
    from the numbers pooled over the seeds:

    * ``copies``: the least Fréchet ratio among the settings whose ``copy_reduction`` is at least ``target_reduction``;
      or, with ``max_frechet_ratio``, the largest reduction among those within it (the least Fréchet ratio among equal);
    * ``membership``: the least Fréchet ratio, at most 2, among the settings with \|z\| < 2 at ``membership_t``.

    Where no setting qualifies none is picked: the closest is named (a denoiser that copies everything may leave none).
    Writes ``calibrated.yaml`` (``protections`` as the table's study takes them), ``calibration.md`` and
    ``calibration.png``. Picked on few samples, a setting looks better than it is: report it on other seeds.

    Args:
        config: See :class:`ProtectionTable`.
        random_label: See there.
        attack: See there.
        num_members: See there.
        grid: Settings of ``lightning_mem.defenses.CPSampleProtection`` and their values, such as tol and scale;
            ``random_label`` names classifiers. Every combination is tried.
        classifiers: See there.
        others: Further protections beside the grid, such as rejection; never picked.
        seeds: For calibration only.
        overrides: See there.
        attack_overrides: See there.
        target_reduction: How many times fewer copies ``copies`` must have, at least 1.
        max_frechet_ratio: Pick by this limit instead; null for none.
        membership_t: Training timestep of ``membership``, among the attack's timesteps.

    Raises:
        ValueError: If the grid is empty, a value of it repeats, or a limit is out of range.
    """

    def __init__(
        self,
        config: list[str],
        random_label: list[str],
        attack: list[str],
        num_members: int,
        grid: dict[str, list[Value]],
        classifiers: Settings | None = None,
        others: Settings | None = None,
        seeds: list[int] | None = None,
        overrides: Settings | None = None,
        attack_overrides: Settings | None = None,
        target_reduction: float = 20.0,
        max_frechet_ratio: float | None = None,
        membership_t: int = 200,
    ) -> None:
        if not grid or any(not values for values in grid.values()):
            raise ValueError(f"grid must name settings of CPSampleProtection with values for each, got {grid}")
        if target_reduction < 1 or (max_frechet_ratio is not None and max_frechet_ratio <= 0):
            raise ValueError(
                f"target_reduction must be at least 1 and max_frechet_ratio positive, got {target_reduction} and "
                f"{max_frechet_ratio}"
            )
        given = {} if classifiers is None else classifiers.values
        first = next(iter(given), "random_label")
        self.points: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*grid.values()):
            own = {"random_label": first, **dict(zip(grid, values, strict=True))}
            self.points[_name(own)] = own
        if len(self.points) < len(list(itertools.product(*grid.values()))):
            raise ValueError(f"values of the grid must not repeat, got {grid}")
        protections = {name: {"class_path": CPSAMPLE, "init_args": own} for name, own in self.points.items()}
        beside = {} if others is None else others.values
        super().__init__(
            config, random_label, attack, num_members, Settings({**protections, **beside}), classifiers, seeds=seeds,
            overrides=overrides, attack_overrides=attack_overrides,
        )  # fmt: skip
        self.target_reduction, self.max_frechet_ratio = target_reduction, max_frechet_ratio
        self.membership_t = membership_t

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool the grid, pick and draw; see the class."""
        records = pooled(runs)
        points = self._points(records)
        if not points:
            return records
        by_name = {point.name: point for point in points}
        own = [by_name[name] for name in self.points if name in by_name]
        picked = {"copies": self.pick_copies(own), "membership": self.pick_membership(own)}
        lines = [self._verdict(word, point, own) for word, point in picked.items()]
        chosen = {word: point.name for word, point in picked.items() if point is not None}
        text = self._table(points, records) + "\n" + "\n".join(f"* {line}" for line in lines) + "\n"
        with atomic_write(folder / "calibration.md") as file:
            file.write(text)
        settings = {
            word: {"class_path": CPSAMPLE, "init_args": copy.deepcopy(self.points[name])}
            for word, name in chosen.items()
        }
        with atomic_write(folder / "calibrated.yaml") as file:
            head = (
                f"# Picked on seeds {self.seeds} by the study of {self.config[0]}; random_label names the classifier.\n"
            )
            file.write(head + yaml.safe_dump({"protections": settings}, sort_keys=False))
        draw_calibration(points, self.points, chosen, folder / "calibration.png")
        print(
            f"{text}\nopen {folder / 'calibration.png'}, {folder / 'calibration.md'} and {folder / 'calibrated.yaml'}"
        )
        return records

    def _points(self, records: Sequence[Record]) -> list[Point]:
        found = []
        for name in self.protections:
            reduction, frechet = (of_arm(records, name, what) for what in ("copy_reduction", "frechet_ratio"))
            if reduction is not None and frechet is not None:
                z = of_arm(records, name, "z", attacker="fixed", t=self.membership_t)
                found.append(Point(name, reduction, frechet, z))
        return found

    def pick_copies(self, points: Sequence[Point]) -> Point | None:
        """The setting for copies; null where none qualifies."""
        if self.max_frechet_ratio is not None:
            limit = self.max_frechet_ratio
            fit = [point for point in points if _number(point.frechet) <= limit]
            return max(fit, key=lambda p: (_number(p.reduction), -_number(p.frechet)), default=None)
        fit = [point for point in points if _number(point.reduction) >= self.target_reduction]
        return min(fit, key=lambda p: _number(p.frechet), default=None)

    def pick_membership(self, points: Sequence[Point]) -> Point | None:
        """The setting at which the loss attack sees nothing either way; null where none qualifies."""
        fit = [p for p in points if p.z is not None and abs(_number(p.z)) < 2 and _number(p.frechet) <= 2]
        return min(fit, key=lambda p: _number(p.frechet), default=None)

    def _verdict(self, word: str, point: Point | None, points: Sequence[Point]) -> str:
        """What was picked, or that nothing was and what came closest."""
        if word == "copies":
            asked = (
                f"Fréchet ratio at most {self.max_frechet_ratio:g}"
                if self.max_frechet_ratio is not None
                else f"at least {self.target_reduction:g} times fewer copies"
            )
        else:
            asked = f"|z| < 2 at t = {self.membership_t} within Fréchet ratio 2"
        if point is not None:
            return f"{word} ({asked}): {point.name}, {_told(point)}"
        if not points:
            return f"{word} ({asked}): nothing was tried"
        if word == "membership":
            known = [p for p in points if p.z is not None]
            if not known:
                return f"{word} ({asked}): the loss attack was not asked at this t"
            closest = min(known, key=lambda p: abs(_number(p.z)) if p.z is not None else 0.0)
        elif self.max_frechet_ratio is not None:
            closest = min(points, key=lambda p: _number(p.frechet))
        else:
            closest = max(points, key=lambda p: _number(p.reduction))
        return f"{word} ({asked}): NO SETTING of the grid reaches it; the closest is {closest.name}, {_told(closest)}"

    def _table(self, points: Sequence[Point], records: Sequence[Record]) -> str:
        columns: dict[str, tuple[str, dict[str, Any]]] = {
            "copies": ("ratio", {}), "near copies": ("near_copies", {}), "times fewer": ("copy_reduction", {}),
            "Fréchet ratio": ("frechet_ratio", {}), "gate rate": ("gate_rate", {}), "time": ("time_ratio", {}),
        }  # fmt: skip
        times = sorted({r.definition["t"] for r in records if r.definition.get("attacker") == "fixed"})
        for t in times:
            columns[f"z, t = {t}"] = ("z", {"attacker": "fixed", "t": t})
            columns[f"folded AUC, t = {t}"] = ("auc_folded", {"attacker": "fixed", "t": t})
        lines = ["| setting | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name in (UNPROTECTED, *(point.name for point in points)):
            cells = [of_arm(records, name, what, **about) for what, about in columns.values()]
            lines.append(f"| {name} | " + " | ".join("" if c is None else in_words(c) for c in cells) + " |")
        return "\n".join(lines) + "\n"


def _number(record: Record) -> float:
    return float(record.value if record.value is not None else "nan")


def _told(point: Point) -> str:
    z = "" if point.z is None else f", z {in_words(point.z, 1)}"
    return f"{in_words(point.reduction, 1)} times fewer copies at Fréchet ratio {in_words(point.frechet)}{z}"


def _name(own: dict[str, Any]) -> str:
    """A setting as part of a key: its values, joined."""
    words = ["-".join(map(str, value)) if isinstance(value, list) else str(value) for value in own.values()]
    return "_".join(words)
