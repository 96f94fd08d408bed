"""The picture and the table of the study of effective model memorization, from its records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mem.evaluation.curves import COLORS, curve
from lightning_mem.records import Record

Curves = Mapping[tuple[str, int], Sequence[Sequence[Record]]]
"""Records of each run by label rule and number of members."""

WORDS = {"none": "no labels", "true": "true labels", "random": "random labels", "unique": "one label per image",
         "binary": "two random labels"}  # fmt: skip


def _select(records: Sequence[Record], name: str, **definition: object) -> list[Record]:
    wanted = definition.items()
    return [r for r in records if r.name == name and all(r.definition.get(key) == value for key, value in wanted)]


def _about(record: Record, digits: int = 3) -> str:
    if record.value is None:
        return "none"
    form = f".{digits}f"
    ends = "" if record.low is None or record.high is None else f" [{record.low:{form}}, {record.high:{form}}]"
    return f"{record.value:{form}}{ends}"


def draw_emm(records: Sequence[Record], curves: Curves, path: Path) -> None:
    """Write a PNG with three panels: ratio over size, onset over size, and all curves over steps per image.

    Args:
        records: Pooled ones of the study.
        curves: The runs behind them.
        path: Of the picture.
    """
    figure = Figure(figsize=(13.5, 4.0), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rules = list(dict.fromkeys(rule for rule, _ in curves))
    _draw_ratios(left, records, curves, rules)
    _draw_onsets(middle, records, rules[0])
    _draw_collapse(right, {n: runs for (rule, n), runs in curves.items() if rule == rules[0]})
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_ratios(axes: Axes, records: Sequence[Record], curves: Curves, rules: Sequence[str]) -> None:
    step = max(record.step for record in records)
    for place, (color, rule) in enumerate(zip(COLORS, rules, strict=False)):
        rows = _select(records, "memorization/ratio", labels=rule)
        if not rows:
            continue
        shift = 1 + 0.03 * place  # bars of several rules at one size stand side by side
        sizes = [row.definition["num_members"] * shift for row in rows]
        values = [row.value or 0.0 for row in rows]
        low = [row.low or 0.0 for row in rows]
        high = [row.high or 0.0 for row in rows]
        style = "o-" if len(rows) > 1 else "o"
        axes.plot(sizes, values, style, color=color, ms=5, label=WORDS.get(rule, rule))
        if len(rows) > 1:
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, lw=0)
        else:
            axes.vlines(sizes, low, high, color=color, lw=2, alpha=0.5)
        for row, size in zip(rows, sizes, strict=True):
            runs = curves[rule, row.definition["num_members"]]
            seeds = [curve(run, "memorization/ratio")[-1].value or 0.0 for run in runs]
            axes.plot([size] * len(seeds), seeds, ".", color=color, ms=4, alpha=0.6)
    control = _select(records, "memorization/ratio_heldout", labels=rules[0])
    axes.plot(
        [row.definition["num_members"] for row in control], [row.value or 0.0 for row in control],
        ":", color=COLORS[0], lw=1, label="held-out control",
    )  # fmt: skip
    optimum = _select(records, "emm/optimum")
    if optimum:
        places = [row.definition["num_members"] for row in optimum]
        axes.plot(
            places, [row.value or 0.0 for row in optimum], "*", color="#555555", ms=10, label="closed-form optimum",
            clip_on=False, zorder=3,
        )  # fmt: skip
    for crossing in _select(records, "emm/crossing", labels=rules[0]):
        level = crossing.definition["level"]
        axes.axhline(level, color="#888888", lw=0.8, ls="--")
        if crossing.value is not None:
            axes.axvline(crossing.value, color=COLORS[0], lw=0.8, ls="--")
            axes.annotate(
                f"EMM {_about(crossing, 0)}", (crossing.value, 0.02), fontsize=8, color=COLORS[0], rotation=90,
                ha="right", va="bottom", xytext=(-2, 0), textcoords="offset points",
            )  # fmt: skip
    _sizes(axes, sorted({n for _, n in curves}))
    axes.set(ylim=(-0.03, 1.05), ylabel="memorization ratio (share of samples)")
    axes.set_title(f"the same recipe after {step:,} steps", fontsize=10)


def _draw_onsets(axes: Axes, records: Sequence[Record], rule: str) -> None:
    events = list(dict.fromkeys(r.definition["event"] for r in records if r.name == "onset/step"))
    for color, event in zip((COLORS[1], COLORS[3]), events, strict=False):
        rows = [r for r in _select(records, "onset/step", labels=rule, event=event) if r.value is not None]
        if not rows:
            continue
        sizes = [row.definition["num_members"] for row in rows]
        values = [row.value or 0.0 for row in rows]
        slopes = _select(records, "onset/slope", labels=rule, event=event)
        words = f"{event}: slope {_about(slopes[0], 2)}" if slopes else event
        axes.plot(sizes, values, "o", color=color, ms=5, label=words)
        bars = [(size, row) for size, row in zip(sizes, rows, strict=True) if row.low is not None]
        low = [max(row.low or 0.0, 1.0) for _, row in bars]
        high = [max(row.high or 0.0, 1.0) for _, row in bars]
        axes.vlines([size for size, _ in bars], low, high, color=color, lw=2, alpha=0.4)
        if slopes and slopes[0].value is not None:
            ends = [min(sizes), max(sizes)]
            exponent, scale = slopes[0].value, slopes[0].definition["scale"]
            axes.plot(ends, [scale * n**exponent for n in ends], "-", color=color, lw=1)
    axes.set(yscale="log", ylabel="onset of copying (optimizer step)")
    shown = sorted(
        {r.definition["num_members"] for r in _select(records, "onset/step", labels=rule) if r.value is not None}
    )
    if shown:
        _sizes(axes, shown)
        bottom, top = axes.get_ylim()
        values = [r.value for r in _select(records, "onset/step", labels=rule) if r.value is not None]
        guide = [min(values) * n / shown[0] for n in shown]
        axes.plot(shown, guide, ":", color="#888888", lw=1, label="in proportion to the images (slope 1)")
        axes.set_ylim(min(bottom, guide[0]), max(top, guide[-1]))
    axes.set_title("when copying begins", fontsize=10)


def _draw_collapse(axes: Axes, runs: Mapping[int, Sequence[Sequence[Record]]]) -> None:
    shades = [0.25 + 0.75 * place / max(len(runs) - 1, 1) for place in range(len(runs))]
    for shade, (n, own) in zip(shades, runs.items(), strict=True):
        for number, records in enumerate(own):
            rows = curve(records, "memorization/ratio")
            axes.plot(
                [row.step / n for row in rows], [row.value or 0.0 for row in rows], "-", color=COLORS[1], alpha=shade,
                lw=1.2, label=f"{n} images" if number == 0 else None,
            )  # fmt: skip
    axes.set(ylim=(-0.03, 1.05), xlabel="optimizer steps per training image", ylabel="memorization ratio")
    axes.set_title("the curves of all runs without labels", fontsize=10)


def _sizes(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images")


def emm_table(records: Sequence[Record]) -> str:
    """The study in Markdown: one line per cell, then the claims over all cells."""
    events = list(dict.fromkeys(r.definition["event"] for r in records if r.name == "onset/step"))
    heads = ["labels", "images", "seeds", "ratio", "held-out control", "highest ratio"]
    heads += [f"onset: {event}" for event in events]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for ratio in _select(records, "memorization/ratio"):
        cell = {key: ratio.definition[key] for key in ("labels", "num_members")}
        others = [_select(records, name, **cell) for name in ("memorization/ratio_heldout", "emm/highest")]
        steps = [_select(records, "onset/step", event=event, **cell) for event in events]
        shown = [_about(found[0]) if found else "none" for found in others]
        shown += [_about(found[0], 0) if found else "none" for found in steps]
        words = WORDS.get(cell["labels"], cell["labels"])
        parts = [words, f"{cell['num_members']:,}", str(ratio.definition["seeds"]), _about(ratio), *shown]
        lines.append("| " + " | ".join(parts) + " |")
    lines.append("")
    for record in records:
        about = record.definition
        words = WORDS.get(about.get("labels", ""), about.get("labels", ""))
        if record.name == "emm/crossing":
            lines.append(f"* {words}: the ratio crosses {about['level']} at {_about(record, 1)} images")
        elif record.name == "onset/slope":
            lines.append(f"* {words}: onset ({about['event']}) grows as images to the power of {_about(record, 2)}")
        elif record.name == "emm/gain":
            base = WORDS.get(about["against"], about["against"])
            lines.append(f"* {words} at {about['num_members']:,} images: ratio {_about(record)} above {base}")
        elif record.name == "emm/optimum":
            lines.append(f"* {words}: closed-form optimum on {about['num_members']:,} images {_about(record)}")
    return "\n".join(lines) + "\n"
