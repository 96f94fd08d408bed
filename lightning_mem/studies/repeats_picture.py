"""What repeats do: the share of images that samples give back, by how often they were trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mem.records import Record
from lightning_mem.studies.shown import in_words

BY_REPEATS = "attack/extraction/images_by_repeats"


def _lines(records: Sequence[Record]) -> dict[tuple[str, str, float], list[Record]]:
    """Shares by repeats, ascending, of every protection, rule and cut."""
    found: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        about: Any = record.definition
        if record.name == BY_REPEATS:
            found.setdefault((about["protection"], about["rule"], about["cut"]), []).append(record)
    return {key: sorted(own, key=lambda record: int(record.definition["repeats"])) for key, own in found.items()}


def repeats_table(records: Sequence[Record]) -> str:
    """Markdown: one row a protection and rule, one column a number of repeats; empty where nothing repeats."""
    lines = _lines(records)
    if not lines:
        return ""
    times = sorted({int(record.definition["repeats"]) for own in lines.values() for record in own})
    head = ["protection", "rule", *(f"{number} times" for number in times)]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (protection, rule, cut), own in lines.items():
        by = {int(record.definition["repeats"]): record for record in own}
        cells = [in_words(by[number]) if number in by else "" for number in times]
        rows.append("| " + " | ".join([protection, f"{rule} {cut:g}", *cells]) + " |")
    return "\n".join(rows) + "\n"


def draw_repeats(records: Sequence[Record], path: Path) -> None:
    """Share of the images extracted by repeats, a panel a rule, a line a protection; nothing where nothing repeats.

    Args:
        records: Pooled; their ``images_by_repeats`` is drawn.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    lines = _lines(records)
    rules = list(dict.fromkeys((rule, cut) for _, rule, cut in lines))
    if not rules:
        return
    figure = Figure((3.2 * len(rules) + 0.6, 2.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axes, (rule, cut) in zip(panels, rules, strict=True):
        for (protection, *about), own in lines.items():
            if about != [rule, cut]:
                continue
            times = [int(record.definition["repeats"]) for record in own]
            shares = [record.value or 0.0 for record in own]
            label = "no protection" if protection == "none" else protection
            (line,) = axes.plot(times, shares, marker=".", lw=1.2, label=label)
            ends = [(record.low, record.high) for record in own if record.low is not None and record.high is not None]
            if len(ends) == len(own):
                axes.fill_between(times, *zip(*ends, strict=True), color=line.get_color(), alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{'normalized L2 <' if rule == 'normalized_l2' else 'RMS-L2 at most'} {cut:g}", fontsize=9)
        axes.set_xlabel("times in a pass")
        axes.set_ylim(-0.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of images extracted")
    panels[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
