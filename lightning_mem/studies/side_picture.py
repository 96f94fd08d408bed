"""The picture and the table of a sweep of SIDE, from its records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mem.evaluation.curves import COLORS
from lightning_mem.records import Record
from lightning_mem.studies.shown import in_words, select

UNGUIDED = "none"
HITS, CONTROL, UNIQUE = "attack/side/hits", "attack/side/hits_heldout", "attack/side/unique_share"
TIMES = "attack/side/ams_gain"
AMS, UMS = "attack/side/ams/", "attack/side/ums/"

WORDS = {
    "none": "unguided", "trained": "trained surrogate", "closed_form": "closed-form surrogate",
    "time_independent": "time-independent classifier", "selection": "selection only",
    "selection_equal_cost": "selection at equal cost",
}  # fmt: skip
"""Arms of the attack, in the order of pictures and tables."""

Each = Mapping[tuple[str, int], Sequence[Record]]
"""Records of each attack by value and seed."""


def arms_of(records: Sequence[Record]) -> list[str]:
    """Arms that records name: known ones in the order of :data:`WORDS`, then others."""
    found = dict.fromkeys(record.definition["surrogate"] for record in records if "surrogate" in record.definition)
    return [arm for arm in WORDS if arm in found] + [arm for arm in found if arm not in WORDS]


def bands_of(records: Sequence[Record]) -> list[str]:
    """Bands that records name, in their order."""
    names = [record.name.removeprefix(AMS) for record in records if record.name.startswith(AMS)]
    return list(dict.fromkeys(name for name in names if not name.endswith("_heldout")))


def draw_sweep(
    records: Sequence[Record],
    each: Each,
    path: Path,
    parameter: str,
    words: Sequence[str],
    places: Sequence[float] | None,
) -> None:
    """Write a PNG with three panels over the values: hits, AMS and UMS per band, and the share of distinct images.

    Args:
        records: Pooled ones of the sweep.
        each: The attacks behind them: one marker per seed.
        path: Of the picture.
        parameter: Name of the axis.
        words: Values in their order.
        places: Where they stand on a logarithmic axis; null for equal distances.
    """
    figure = Figure(figsize=(13.5, 4.0), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    at = dict(zip(words, range(len(words)) if places is None else places, strict=True))
    arms = arms_of(records)
    for axes, name, title in (
        (left, HITS, "share of samples that copy"),
        (right, UNIQUE, "distinct images per sample"),
    ):
        for arm in arms:
            _draw(axes, records, each, name, arm, at, WORDS.get(arm, arm), *_style(arm))
        axes.set_title(title, fontsize=10)
    controls = [_draw(left, records, {}, CONTROL, arm, at, None, "#000000", ":") for arm in arms]
    if any(controls):
        left.plot([], [], ":", color="#000000", label="held-out control, every arm")
    guided = [arm for arm in arms if arm != UNGUIDED]
    shown = guided[0] if guided else UNGUIDED
    bands = bands_of(records)
    for color, band in zip(COLORS, bands, strict=False):
        _draw(middle, records, each, AMS + band, shown, at, f"AMS {band}", color, "-")
        _draw(middle, records, {}, AMS + band, UNGUIDED, at, None, color, "--")
        _draw(middle, records, {}, UMS + band, shown, at, f"UMS {band}", color, ":")
        _draw(middle, records, {}, f"{AMS}{band}_heldout", shown, at, None, color, "x")
    middle.set_title(f"bands: {WORDS.get(shown, shown)} (dashed: unguided; x: AMS of held-out images)", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=parameter, ylabel="fraction of samples")
        if places is not None:
            axes.set_xscale("log")
        axes.set_xticks(list(at.values()), words, fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _style(arm: str) -> tuple[str, str]:
    """Colour and line of an arm: the unguided one is the zero line."""
    if arm == UNGUIDED:
        return "#777777", "--"
    return COLORS[(list(WORDS).index(arm) - 1) % len(COLORS)] if arm in WORDS else "#000000", "-"


def _draw(
    axes: Axes, records: Sequence[Record], each: Each, name: str, arm: str, at: Mapping[str, float], label: str | None,
    color: str, style: str,
) -> bool:  # fmt: skip
    """One line with its interval and a marker per seed; false where no value has it."""
    rows = [row for row in select(records, name, surrogate=arm) if row.definition["value"] in at]
    if not rows:
        return False
    x = [at[row.definition["value"]] for row in rows]
    marker = "" if style == "x" else "o"
    axes.plot(
        x, [row.value or 0.0 for row in rows], marker + style, color=color, ms=4 if each else 3, label=label
    )  # fmt: skip
    if each and all(row.low is not None for row in rows):
        axes.fill_between(
            x, [row.low or 0.0 for row in rows], [row.high or 0.0 for row in rows], color=color, alpha=0.12, lw=0
        )
    for (word, _), own in each.items():
        for record in select(own, name, surrogate=arm):
            axes.plot([at[word]], [record.value or 0.0], ".", color=color, ms=3, alpha=0.7)
    return True


def sweep_table(records: Sequence[Record], parameter: str, words: Sequence[str]) -> str:
    """The sweep in Markdown: one line per value and arm, then the shapes."""
    bands = bands_of(records)
    heads = [parameter, "arm", "seeds", "hits", "over unguided", "above unguided"]
    heads += ["held-out control", "distinct images"]
    heads += [f"AMS {band}" for band in bands] + [f"UMS {band}" for band in bands]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for word in words:
        for arm in arms_of(records):
            cell = {"value": word, "surrogate": arm}
            rows = [select(records, name, **cell) for name in (HITS, CONTROL, UNIQUE)]
            if not rows[0]:
                continue
            gain = select(records, "sweep/gain", of="hits", **cell)
            rows[1:1] = [select(records, TIMES, **cell), gain]
            rows += [select(records, kind + band, **cell) for kind in (AMS, UMS) for band in bands]
            shown = [in_words(found[0] if found else None) for found in rows]
            lines.append(
                "| " + " | ".join([word, WORDS.get(arm, arm), str(rows[0][0].definition["seeds"]), *shown]) + " |"
            )
    ratios = [r for r in records if r.name == "memorization/ratio"]
    claims = [f"* the targets themselves: memorization ratio {in_words(record)}" for record in ratios]
    claims += [claim for record in records if (claim := _claim(record, words))]
    return "\n".join([*lines, "", *claims]) + "\n"


def _claim(record: Record, words: Sequence[str]) -> str:
    """One line on a shape of hits or distinct images; empty for other records."""
    about = record.definition
    if about.get("of") not in ("hits", "unique_share") or about["surrogate"] == UNGUIDED:
        return ""
    what = f"{WORDS.get(about.get('surrogate', ''), '')}: {str(about.get('of', '')).replace('_', ' ')}"
    if record.name == "sweep/ends":
        return f"* {what} at {words[-1]} {in_words(record)} above {words[0]} ({about['seeds']} seeds)"
    if record.name == "sweep/peak":
        seeds = f"{about['seeds']} seeds, its place from the others"
        return f"* {what} at its peak {in_words(record)} above the higher end ({seeds})"
    return ""
