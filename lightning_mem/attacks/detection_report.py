"""Telling two groups apart by a score, several statistics side by side: numbers, the table, and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.extraction_costs import COSTS, cost_line
from lightning_mem.attacks.report import finish, short
from lightning_mem.evaluation import Number
from lightning_mem.evaluation.curves import COLORS
from lightning_mem.evaluation.table import LOOK
from lightning_mem.metrics import roc
from lightning_mem.records import Record

RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is told."""

BINS = 24
"""Of a histogram."""

Scores = Mapping[str, Tensor]
"""float64 [N] of ``members``, and of ``heldout`` where there are any; larger = member."""


def detection_numbers(scores: Scores, word: str, unit: str, about: Mapping[str, Any]) -> list[Number]:
    """Means of both groups with a normal interval, and what a threshold on the score tells apart.

    Args:
        scores: Of each prompt.
        word: Name of the score.
        unit: Its unit.
        about: What the score is, flat.
    """
    definition = {**about, **{f"num_{kind}": len(own) for kind, own in scores.items()}}
    numbers = []
    for kind, own in scores.items():
        mean, half = float(own.mean()), 1.96 * float(own.std()) / len(own) ** 0.5 if len(own) > 1 else None
        ends = None if half is None else (mean - half, mean + half)
        name = word if kind == "members" else f"{word}_heldout"
        numbers.append(Number(name, mean, len(own), {**definition, "interval": "normal over prompts"}, ends, unit))
    if len(scores) == 2 and min(map(len, scores.values())) > 1:
        curve = roc(scores["members"], scores["heldout"])
        count = curve.num_members + curve.num_heldout
        numbers.append(Number("auc", curve.auc, count, {**definition, "interval": "delong"}, curve.auc_interval()))
        how = {**definition, "interval": "order statistics and wilson"}
        for rate in RATES:
            ends = curve.tpr_interval(rate)
            numbers.append(Number(f"tpr_at_{rate}", curve.tpr_at(rate), curve.num_heldout, how, ends))
    return numbers


def statistics_table(records: Sequence[Record], prefix: str, title: str) -> Table:
    """One column a statistic, one row a number; below it the cost that all share.

    Args:
        records: With ``definition.statistic``, but for shared costs.
        prefix: Of their names.
        title: Of the table.
    """
    told = [record for record in records if "statistic" in record.definition]
    columns = list(dict.fromkeys(record.definition["statistic"] for record in told))
    rows: dict[str, dict[str, Record]] = {}
    for record in told:
        rows.setdefault(record.name.removeprefix(prefix), {})[record.definition["statistic"]] = record
    caption = cost_line([record for record in records if "statistic" not in record.definition], prefix)
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, own in rows.items():
        found = [own.get(column) for column in columns]
        table.add_row(name, *(f"{r.value:.4g}" if r and r.value and name in COSTS else short(r) for r in found))
    return table


def draw_detection(path: Path, found: Mapping[str, Scores], words: Mapping[str, str], unit: str) -> None:
    """Write a PNG: how the scores of both groups spread, a panel a statistic, and the curves of telling them apart.

    Args:
        path: ``.png``.
        found: Scores by statistic.
        words: What each group is called in the legend.
        unit: Below the histograms.
    """
    both = all(len(scores) == 2 for scores in found.values())
    panels = len(found) + both
    figure = Figure(figsize=(3.6 * panels, 3.0), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, (statistic, scores) in zip(axes, found.items(), strict=False):
        _spread(panel, scores, words)
        panel.set(title=statistic, xlabel=unit, ylabel="share of a group")
    if both:
        for color, (statistic, scores) in zip(COLORS[2:], found.items(), strict=False):
            curve = roc(scores["members"], scores["heldout"])
            label = f"{statistic}, auc {curve.auc:.2f}"
            axes[-1].step(curve.fpr, curve.tpr, where="post", color=color, lw=1.5, label=label)
        axes[-1].plot([0, 1], [0, 1], ":", color="#888888", lw=0.8)
        axes[-1].set(
            title="telling them apart", xlabel="false positive rate", ylabel="true positive rate", aspect="equal",
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02),
        )  # fmt: skip
    finish(figure, path)


def _spread(panel: Axes, scores: Scores, words: Mapping[str, str]) -> None:
    """Histograms over common bins, and a tick at every score."""
    everything = torch.cat(list(scores.values()))
    low, high = float(everything.min()), float(everything.max())
    edges = torch.linspace(low, high if high > low else low + 1.0, BINS + 1, dtype=torch.float64)
    highest = 0.0
    for color, (kind, own) in zip(COLORS, scores.items(), strict=False):
        share = [1 / len(own)] * len(own)
        label = f"{words[kind]} ({len(own)})"
        heights, _, _ = panel.hist(own.tolist(), edges.tolist(), weights=share, color=color, alpha=0.5, label=label)
        highest = max(highest, float(max(heights)))
    for place, (color, own) in enumerate(zip(COLORS, scores.values(), strict=False)):
        panel.plot(own, [-0.05 * highest * (place + 1)] * len(own), "|", color=color, ms=5, alpha=0.6)
    panel.set_ylim(-0.15 * highest, 1.35 * highest)  # room for the legend
    panel.set_yticks([tick for tick in panel.get_yticks() if 0 <= tick <= 1.35 * highest])
