"""The curve of a run: memorization ratio beside its control, and Fréchet distances, over optimizer steps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mem.records import Record

COLORS = ("#c1272d", "#0b63a5", "#2e7d32", "#8e5ea2", "#b8860b")


def curve(records: Sequence[Record], name: str) -> list[Record]:
    """Records of one key in order of steps."""
    return sorted((record for record in records if record.name == name), key=lambda record: record.step)


def onset(records: Sequence[Record]) -> int | None:
    """First step at which copying is beyond doubt.

    The first evaluation whose ``memorization/ratio`` has its lower end above the upper end of
    ``memorization/ratio_heldout``, and the next one too; compared at equal n only.

    Args:
        records: Of one run; others are passed over.

    Returns:
        The step; null where it did not happen, or there is no control.
    """
    control = {(r.step, r.n): r for r in curve(records, "memorization/ratio_heldout") if r.high is not None}
    ratios = curve(records, "memorization/ratio")
    usual = Counter(record.n for record in ratios).most_common(1)  # a last `test` with more samples is no "next one"
    above = []
    for record in ratios:
        null = control.get((record.step, record.n))
        if null is None or null.high is None or record.low is None or record.n != usual[0][0]:
            continue
        above.append((record.step, record.low > null.high))
    for (step, now), (_, then) in pairwise(above):
        if now and then:
            return step
    return None


def _draw(axes: Axes, records: Sequence[Record], name: str, label: str, color: str, style: str = "-") -> None:
    rows = [record for record in curve(records, name) if record.value is not None]
    steps = [record.step for record in rows]
    axes.plot(
        steps, [record.value or 0.0 for record in rows], style, color=color, label=label, marker="o", markersize=3
    )
    low = [record.low for record in rows if record.low is not None]
    high = [record.high for record in rows if record.high is not None]
    if len(low) == len(high) == len(rows):
        axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


def draw_curves(runs: Mapping[str, Sequence[Record]], path: Path, title: str = "") -> None:
    """Write a PNG with two panels: ratio and held-out control with 95 % bands; Fréchet distance to held-out images.

    Args:
        runs: Records of each run by the name it is shown under.
        path: Of the picture.
        title: Above both panels.
    """
    figure = Figure(figsize=(9.5, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (label, records) in zip(COLORS, runs.items(), strict=False):
        prefix = f"{label}: " if len(runs) > 1 else ""
        _draw(left, records, "memorization/ratio", f"{prefix}members", color)
        _draw(left, records, "memorization/ratio_heldout", f"{prefix}held-out control", color, ":")
        start = onset(records)
        if start is not None:
            left.axvline(start, color=color, lw=0.8, ls="--")
            left.annotate(f"onset {start}", (start, 1.0), color=color, fontsize=7, ha="right", va="top", rotation=90)
        names = sorted({r.name for r in records if r.name.startswith("frechet/") and r.name.endswith("/heldout")})
        for name in names[:1]:
            extractor = name.split("/", 1)[1].rsplit("/", 1)[0]
            _draw(right, records, name, f"{prefix}to held-out ({extractor})", color)
            _draw(right, records, f"frechet/{extractor}/train", f"{prefix}to members", color, ":")
    left.set(ylim=(-0.03, 1.03), xlabel="optimizer step", ylabel="memorization ratio (share of samples)")
    right.set(xlabel="optimizer step", ylabel="Fréchet distance", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
