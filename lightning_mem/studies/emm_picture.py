"""The picture and the table of the study of effective model memorization, from its records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mem.evaluation.curves import COLORS, curve
from lightning_mem.records import Record
from lightning_mem.studies.onset import onsets
from lightning_mem.studies.shown import in_words, select

RATIO, CONTROL = "memorization/ratio", "memorization/ratio_heldout"

Curves = Mapping[tuple[str, int], Sequence[Sequence[Record]]]
"""Records of each run by label rule and number of members."""

WORDS = {"none": "no labels", "true": "true labels", "random": "random labels", "unique": "one label per image",
         "binary": "two random labels"}  # fmt: skip

TICKS = [10**power * digit for power in range(7) for digit in (1, 2, 5)]


def _size(record: Record) -> int:
    return int(record.definition["num_members"])


def _value(record: Record) -> float:
    return record.value or 0.0


def draw_emm(records: Sequence[Record], curves: Curves, path: Path, onset_ratio: float = 0.1) -> None:
    """Write a PNG with three panels: ratio over size, onset over size, and all curves over steps per image.

    Args:
        records: Pooled ones of the study.
        curves: The runs behind them; onsets and curves are shown for the first label rule.
        path: Of the picture.
        onset_ratio: See :func:`lightning_mem.studies.onset.onsets`.
    """
    figure = Figure(figsize=(13.5, 4.0), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rules = list(dict.fromkeys(rule for rule, _ in curves))
    own = {n: runs for (rule, n), runs in curves.items() if rule == rules[0]}
    _draw_ratios(left, records, curves, rules)
    _draw_onsets(middle, select(records, "onset/slope", labels=rules[0]), own, onset_ratio)
    _draw_over_steps(right, own)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_ratios(axes: Axes, records: Sequence[Record], curves: Curves, rules: Sequence[str]) -> None:
    for place, (color, rule) in enumerate(zip(COLORS, rules, strict=False)):
        rows = select(records, RATIO, labels=rule)
        sizes = [_size(row) * (1 + 0.03 * place) for row in rows]  # several rules at one size stand side by side
        low, high = [row.low or 0.0 for row in rows], [row.high or 0.0 for row in rows]
        axes.plot(sizes, [_value(row) for row in rows], "o-", color=color, ms=5, label=WORDS.get(rule, rule))
        if len(rows) > 1:
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, lw=0)
        else:
            axes.vlines(sizes, low, high, color=color, lw=2, alpha=0.5)
        for row, size in zip(rows, sizes, strict=True):
            seeds = [_value(curve(run, RATIO)[-1]) for run in curves[rule, _size(row)]]
            axes.plot([size] * len(seeds), seeds, ".", color=color, ms=3, alpha=0.7)
    control = select(records, CONTROL, labels=rules[0])
    axes.plot(
        [_size(row) for row in control],
        [_value(row) for row in control],
        ":",
        color=COLORS[0],
        label="held-out control",
    )
    optimum = select(records, "emm/optimum")
    if optimum:
        axes.plot(
            [_size(row) for row in optimum], [_value(row) for row in optimum], "*", color="#555555", ms=10,
            label="closed-form optimum", clip_on=False, zorder=3,
        )  # fmt: skip
    for crossing in select(records, "emm/crossing", labels=rules[0]):
        axes.axhline(crossing.definition["level"], color="#888888", lw=0.8, ls="--")
        if crossing.value is not None:
            axes.axvline(crossing.value, color=COLORS[0], lw=0.8, ls="--")
            axes.annotate(
                f"EMM {in_words(crossing, 0)}", (crossing.value, 0.02), fontsize=8, color=COLORS[0], rotation=90,
                ha="right", va="bottom", xytext=(-2, 0), textcoords="offset points",
            )  # fmt: skip
    _name_sizes(axes, sorted({n for _, n in curves}))
    axes.set(ylim=(-0.03, 1.05), ylabel="memorization ratio (share of samples)")
    axes.set_title(f"one recipe after {max(record.step for record in records):,} steps", fontsize=10)


def _draw_onsets(
    axes: Axes, slopes: Sequence[Record], runs: Mapping[int, Sequence[Sequence[Record]]], onset_ratio: float
) -> None:
    axes.set_title("when copying begins, each run", fontsize=10)
    axes.set(yscale="log", ylabel="onset of copying (optimizer step)")
    found = [
        (event, n, step)
        for n, own in runs.items()
        for event, steps in onsets(own, onset_ratio).items()
        for step in steps
        if step is not None
    ]
    if not found:
        return
    for color, event in zip((COLORS[1], COLORS[3]), dict.fromkeys(event for event, _, _ in found), strict=False):
        points = [(n, step) for name, n, step in found if name == event]
        laws = [slope for slope in slopes if slope.definition["event"] == event]
        words = f"{event}: slope {in_words(laws[0], 2)}" if laws else event
        axes.plot([n for n, _ in points], [step for _, step in points], "o", color=color, ms=4, label=words)
        for law in laws:
            ends = [law.definition["smallest"], law.definition["largest"]]
            axes.plot(ends, [law.definition["scale"] * n ** _value(law) for n in ends], "-", color=color, lw=1)
    sizes = sorted({n for _, n, _ in found})
    first = min(step for _, n, step in found if n == sizes[0])
    guide = [first * n / sizes[0] for n in sizes]
    axes.plot(sizes, guide, ":", color="#888888", label="in proportion to the images (slope 1)")
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in TICKS if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom, top * 1.6)  # room for the legend
    _name_sizes(axes, sizes)


def _draw_over_steps(axes: Axes, runs: Mapping[int, Sequence[Sequence[Record]]]) -> None:
    colors = colormaps["viridis_r"]([0.1 + 0.9 * place / max(len(runs) - 1, 1) for place in range(len(runs))])
    for color, (n, own) in zip(colors, runs.items(), strict=True):
        for number, records in enumerate(own):
            rows = curve(records, RATIO)
            label = f"{n:,} images" if number == 0 else None
            axes.plot(
                [row.step / n for row in rows], [_value(row) for row in rows], "-", color=color, lw=1, label=label
            )
    axes.set(ylim=(-0.03, 1.05), xlabel="optimizer steps per training image", ylabel="memorization ratio")
    axes.set_title("every run's curve over steps per image", fontsize=10)


def _name_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images")


def emm_table(records: Sequence[Record]) -> str:
    """The study in Markdown: one line per cell, then the claims over all cells."""
    events = list(dict.fromkeys(r.definition["event"] for r in records if r.name == "onset/step"))
    passes = [record.definition["steps_per_image"] for record in select(records, "emm/equal_passes")]
    heads = ["labels", "images", "seeds", "ratio", "held-out control", "highest ratio"]
    heads += [f"ratio at {passes[0]:g} steps per image"]
    heads += [f"onset: {event}" for event in events]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for ratio in select(records, RATIO):
        cell = {key: ratio.definition[key] for key in ("labels", "num_members")}
        others = [select(records, name, **cell) for name in (CONTROL, "emm/highest", "emm/equal_passes")]
        steps = [select(records, "onset/step", event=event, **cell) for event in events]
        shown = [in_words(found[0]) if found else "none" for found in others]
        shown += [in_words(found[0], 0) if found else "none" for found in steps]
        words = WORDS.get(cell["labels"], cell["labels"])
        parts = [words, f"{cell['num_members']:,}", str(ratio.definition["seeds"]), in_words(ratio), *shown]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join([*lines, "", *(claim for record in records if (claim := _claim(record)))]) + "\n"


def _claim(record: Record) -> str:
    """One line on a record that speaks of more than one cell; empty for the others."""
    about = record.definition
    words = WORDS.get(about.get("labels", ""), about.get("labels", ""))
    if record.name == "emm/crossing":
        return f"* {words}: the ratio crosses {about['level']} at {in_words(record, 1)} images"
    if record.name == "onset/slope":
        return f"* {words}: onset ({about['event']}) grows as images to the power of {in_words(record, 2)}"
    if record.name == "emm/gain":
        base = WORDS.get(about["against"], about["against"])
        return f"* {words} at {about['num_members']:,} images: ratio {in_words(record)} above {base}"
    if record.name == "emm/optimum":
        return f"* {words}: closed-form optimum on {about['num_members']:,} images {in_words(record)}"
    return ""
