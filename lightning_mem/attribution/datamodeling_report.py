"""What is shown of datamodeling scores: numbers with paired differences, a table of queries, and a picture."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_mem.attribution.costs import COSTS, cost_numbers, rounded, shortly
from lightning_mem.evaluation import Number
from lightning_mem.evaluation.table import LOOK
from lightning_mem.metrics import DatamodelingComparison, rank_correlation
from lightning_mem.metrics.datamodeling import BOOTSTRAP
from lightning_mem.records import Record, atomic_write


@dataclass(frozen=True)
class Judged:
    """All methods on the queries of one kind.

    Args:
        kind: ``model`` or ``heldout``.
        num_queries: Of them.
        compared: Scores and resamples, of the methods and of ``retrained``.
        predictions: [M, Q] by name.
        outputs: What each is held against, [M, Q] by name.
        costs: By method.
        lams: Chosen on other queries, by method.
    """

    kind: str
    num_queries: int
    compared: DatamodelingComparison
    predictions: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    costs: Mapping[str, Mapping[str, float]]
    lams: Mapping[str, float]

    @property
    def methods(self) -> list[str]:
        """Names, the highest score first."""
        return sorted(self.costs, key=lambda name: -self.compared.scores[name])

    def numbers(self, about: Mapping[str, Any]) -> list[Number]:
        """Scores, differences, ceiling and costs, with what they mean."""
        common = {"queries": self.kind, **about}
        return [
            *(number for name in self.methods for number in self._numbers(name, common)),
            *self._retrained(common),
            *(number for name in self.methods for number in cost_numbers(name, self.costs[name], common)),
        ]

    def _numbers(self, name: str, common: Mapping[str, Any]) -> list[Number]:
        value, interval = self.compared.scores[name], self.compared.interval(name)
        lam = {"lam": self.lams[name], "lam_chosen_on": "other queries"} if name in self.lams else {}
        definition = {**common, **lam, "interval": BOOTSTRAP}
        found = [Number(f"{name}/lds", value, self.num_queries, definition, interval, "correlation")]
        best = next((other for other in self.methods if other != name), None)
        others = dict.fromkeys(other for other in (best, "random") if other not in (None, name))
        for other in others:
            if other not in self.costs:
                continue
            difference, low, high = self.compared.difference(name, str(other))
            said = {**common, **lam, "other": other, "claimed": low > 0 or high < 0, "interval": f"paired {BOOTSTRAP}"}
            ends = (low, high)
            found.append(Number(f"{name}/lds_difference", difference, self.num_queries, said, ends, "correlation"))
        return found

    def _retrained(self, common: Mapping[str, Any]) -> list[Number]:
        """How well other trainings foresee the first, and about what a perfect attribution reaches against the mean."""
        name = "retrained"
        if name not in self.predictions:
            return []
        value, interval = self.compared.scores[name], self.compared.interval(name)
        said = {**common, "against": "mean of the other trainings", "interval": BOOTSTRAP}
        found = [Number(f"{name}/lds", value, self.num_queries, said, interval, "correlation")]
        trainings = int(common["trainings"])
        if trainings == 2 and value > 0:
            ends = tuple(ceiling(end) for end in interval)
            rule = {**common, "rule": "sqrt(2 r / (1 + r)), r of one training and the other", "interval": BOOTSTRAP}
            top = Number(
                f"{name}/lds_ceiling", ceiling(value), self.num_queries, rule, (ends[0], ends[1]), "correlation"
            )
            found.append(top)
        return found


def ceiling(reliability: float) -> float:
    r"""Correlation of what is true of a subset with the mean of two trainings, :math:`\sqrt{2 r / (1 + r)}`.

    Args:
        reliability: r, the correlation of the two trainings; below 0 counts as 0.

    Undefined when:
        Correlations are of ranks: then it holds about.

    Source:
        Spearman (1910) and Brown (1910): the reliability of a mean of two is 2 r / (1 + r).
    """
    r = max(0.0, reliability)
    return math.sqrt(2 * r / (1 + r))


def write_datamodeling(folder: Path, judged: Sequence[Judged]) -> None:
    """``tables/datamodeling.csv``, the score of every method for every query, and ``images/datamodeling.png``."""
    with atomic_write(folder / "tables" / "datamodeling.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["queries", "query", "method", "lds"])
        for own in judged:
            for name in own.predictions:
                found = rank_correlation(own.predictions[name], own.outputs[name]).tolist()
                writer.writerows([own.kind, query, name, f"{value:.6f}"] for query, value in enumerate(found))
    draw_datamodeling(judged, folder / "images" / "datamodeling.png")


def draw_datamodeling(judged: Sequence[Judged], path: Path) -> None:
    """Write a PNG: one panel a kind of queries, one point a method with its interval, the best first."""
    most = max(len(own.methods) for own in judged)
    figure = Figure(figsize=(4.2 * len(judged) + 0.6, 0.34 * most + 1.5), dpi=120, layout="constrained")
    for axes, own in zip(figure.subplots(1, len(judged), squeeze=False)[0], judged, strict=True):
        names = own.methods
        for place, name in enumerate(reversed(names)):
            low, high = own.compared.interval(name)
            value = own.compared.scores[name]
            color = "gray" if name == "random" else "C0"
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot(value, place, "o", color=color)
            axes.annotate(f"{value:.2f}", (value, place), (0, 5), textcoords="offset points", fontsize=7, ha="center")
        axes.axvline(0, color="black", linewidth=0.8)
        again = own.compared.scores.get("retrained")
        if again is not None and again > 0:
            top = ceiling(again)
            axes.axvline(top, color="crimson", linestyle="--", linewidth=1)
            axes.text(
                top, len(names) - 0.45, f"ceiling {top:.2f}", color="crimson", fontsize=7, ha="right", va="bottom"
            )
        axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.2)
        word = {"model": "samples of the model", "heldout": "images it never saw"}.get(own.kind, own.kind)
        axes.set_title(f"{own.num_queries} {word}", fontsize=9)
        axes.set_xlabel("linear datamodeling score, 95 %", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def datamodeling_table(records: Sequence[Record]) -> Table:
    """One row a method and kind of queries, the best first."""
    caption = (
        "lds: rank correlation, over the subsets, of what the scores foresee and of what the models on subsets do; "
        "intervals over subsets and queries. Differences are paired, * where their interval excludes 0; "
        "retrained: the same subsets trained once more"
    )
    table = Table(title="linear datamodeling score", title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    headings, rows = _cells(records)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def datamodeling_lines(records: Sequence[Record]) -> str:
    """The same table in Markdown."""
    headings, rows = _cells(records)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        _, method, what = record.name.split("/", 2)
        if what == "lds_difference":
            what = "to random" if record.definition["other"] == "random" else "to best"
        found.setdefault((str(record.definition["queries"]), method), {})[what] = record
    costs = [(kind, word, unit) for kind, word, unit in COSTS if any(kind in own for own in found.values())]
    rows = []
    for (kind, method), own in found.items():
        if "lds" in own:
            chance = own.get("to random")
            differences = [_difference(one) for one in (own.get("to best", chance), chance)]
            spent = [rounded(own.get(cost), unit) for cost, _, unit in costs]
            rows.append([kind, method, shortly(own["lds"]), *differences, *spent])
        if "lds_ceiling" in own:
            rows.append([kind, "ceiling, about", shortly(own["lds_ceiling"]), *[""] * (2 + len(costs))])
    return ["queries", "method", "lds", "to best", "to random", *(word for _, word, _ in costs)], rows


def _difference(record: Record | None) -> str:
    return "" if record is None else f"{record.value:+.2f}{'*' if record.definition['claimed'] else ''}"
