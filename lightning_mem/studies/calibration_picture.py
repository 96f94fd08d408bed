"""The frontier of a calibration: how many times fewer copies, and what that costs in quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from lightning_mem.attacks.protection_picture import MARKS
from lightning_mem.evaluation.curves import COLORS
from lightning_mem.records import Record

if TYPE_CHECKING:
    from lightning_mem.studies.calibration import Point


def draw_calibration(
    points: Sequence["Point"], grid: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, str], path: Path
) -> None:
    """Write a PNG: times fewer copies against the Fréchet ratio, a line for each family of the grid over its scales.

    Args:
        points: Pooled; those that are not in the grid stand alone.
        grid: Settings by name.
        chosen: Names of picked settings by what they were picked for.
        path: Of the picture.
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[Point]] = {}
    for point in points:
        own = {key: value for key, value in grid.get(point.name, {"": point.name}).items() if key != "scale"}
        word = ", ".join(f"{key} {value}".strip() for key, value in own.items())
        families.setdefault(word, []).append(point)
    places: list[tuple[float, float]] = []
    alone = 0
    for place, (word, members) in enumerate(families.items()):
        color = COLORS[place % len(COLORS)]
        row = sorted(members, key=lambda point: float(grid.get(point.name, {}).get("scale", 0)))
        x = [float(point.frechet.value or 0.0) for point in row]
        y = [float(point.reduction.value or 0.0) for point in row]
        inside = row[0].name in grid
        alone += not inside
        color = color if inside else "#000000"
        axes.plot(x, y, "o-" if inside else MARKS[alone % len(MARKS)], color=color, ms=4, lw=1, label=word)
        places += zip(x, y, strict=True)
        for point, at, up in zip(row, x, y, strict=True):
            bars = ((_ends(point.frechet), [up, up]), ([at, at], _ends(point.reduction)))
            for across, along in bars:
                if across and along:
                    axes.plot(across, along, color=color, lw=0.5, alpha=0.5)
            if "scale" in grid.get(point.name, {}):
                axes.annotate(f"{grid[point.name]['scale']:g}", (at, up), fontsize=6, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
    for word, name in chosen.items():
        best = next(point for point in points if point.name == name)
        axes.plot([best.frechet.value or 0.0], [best.reduction.value or 0.0], "o", mfc="none", mec="black", ms=11,
                  label=f"picked for {word}", mew=1.5 if word == "copies" else 0.8)  # fmt: skip
    axes.set(xlabel="Fréchet distance to held-out images over that without protection",
             ylabel="times fewer copies", yscale="log")  # fmt: skip
    axes.axvline(1, color="#777777", lw=0.8, ls=":")
    # an interval over few seeds is wide: the points decide what is seen, bars run out of the picture
    (left, right), (low, high) = ((min(part), max(part)) for part in zip(*places, (1.0, 1.0), strict=True))
    axes.set_xlim(left - 0.08 * (right - left) - 0.01, right + 0.08 * (right - left) + 0.01)
    axes.set_ylim(low / 1.3, high * 1.6)
    axes.set_title("numbers: scale; bars: 95 % intervals over seeds", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _ends(record: Record) -> list[float]:
    """The ends of its interval; empty where it has none."""
    return [] if record.low is None or record.high is None else [record.low, record.high]
