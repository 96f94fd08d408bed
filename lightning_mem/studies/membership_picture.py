"""What the study of membership shows: AUC along training by number of members, and a table of the last checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mem.records import Record

HEADINGS = ("members", "attack", "attacker", "t", "auc", "tpr at 0.01", "balanced accuracy", "copied")


def membership_table(records: Sequence[Record]) -> str:
    """Markdown: one row an attack, attacker and number of members, of the last checkpoints; empty without attacks."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    copied = {r.definition["num_members"]: r for r in records if r.name == "memorization/ratio"}
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        about = record.definition
        if record.name.startswith("attack/") and about.get("attacker") in ("fixed", "calibrated"):
            _, attack, name = record.name.split("/", 2)
            key = about["num_members"], about.get("protection"), attack, about["attacker"], about.get("t", "")
            if name != "auc_curve":
                groups.setdefault(key, {})[name] = record
    for (size, protection, attack, attacker, t), own in groups.items():
        word = attack if protection in (None, "none") else f"{attack}, {protection}"
        cells = [_cell(own.get(name)) for name in ("auc", "tpr_at_0.01", "balanced_accuracy")]
        lines.append("| " + " | ".join([str(size), word, attacker, str(t), *cells, _cell(copied.get(size))]) + " |")
    return "\n".join(lines) + "\n" if groups else ""


def _cell(record: Record | None) -> str:
    if record is None or record.value is None:
        return ""
    if record.low is None or record.high is None:
        return f"{record.value:.3f}"
    return f"{record.value:.3f} [{record.low:.3f}, {record.high:.3f}]"


def draw_membership(records: Sequence[Record], path: Path) -> None:
    """AUC of every fixed attacker by optimizer step, a panel for each number of members.

    Args:
        records: Pooled; their ``auc_curve`` is drawn.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    points = [r for r in records if r.name.endswith("/auc_curve") and r.definition.get("protection") in (None, "none")]
    sizes = sorted({record.definition["num_members"] for record in points})
    if not sizes:
        return
    figure = Figure((3.2 * len(sizes) + 0.6, 2.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        lines: dict[tuple[str, int], list[Record]] = {}
        for record in (record for record in points if record.definition["num_members"] == size):
            lines.setdefault((record.name.split("/")[1], record.definition["t"]), []).append(record)
        for (attack, t), own in sorted(lines.items()):
            own.sort(key=lambda record: record.step)
            steps, values = [record.step for record in own], [record.value or 0.0 for record in own]
            (line,) = axes.plot(steps, values, marker=".", lw=1.2, label=f"{attack}, t = {t}")
            if all(record.low is not None and record.high is not None for record in own):
                ends = ([record.low or 0.0 for record in own], [record.high or 0.0 for record in own])
                axes.fill_between(steps, *ends, color=line.get_color(), alpha=0.15, lw=0)
        axes.axhline(0.5, color="0.6", lw=0.8, ls=":")
        axes.set_title(f"{size} members", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylim(0.4, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("AUC, members against held-out")
    panels[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
