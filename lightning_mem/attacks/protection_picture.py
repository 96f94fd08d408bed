"""Pictures of protections: the same addresses under every arm, and copies against the distance from real images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.attacks.protection_scores import PREFIX, UNPROTECTED, Scored
from lightning_mem.attacks.report import finish
from lightning_mem.evaluation.curves import COLORS
from lightning_mem.evaluation.pictures import pixels, tile
from lightning_mem.records import Record

COLUMNS = 20
"""Addresses in the gallery."""

FRAME = (193, 39, 45)
"""Colour around a copy."""

MARKS = "osD^vPX*"


def chosen_addresses(copied: Tensor, columns: int = COLUMNS) -> Tensor:
    """Places of a gallery: half of them copies of the unprotected arm, as far as there are any; the first of each kind.

    Args:
        copied: bool [N], of the unprotected arm.
        columns: At most so many.
    """
    copies, others = copied.nonzero().flatten(), (~copied).nonzero().flatten()
    half = max(columns // 2, columns - len(others))
    first = copies[:half]
    return torch.cat([first, others[: columns - len(first)]])


def framed(images: Tensor, copied: Tensor) -> Tensor:
    """RGB images with a margin, red around copies and white around the others; uint8 [N, 3, H', W'].

    Args:
        images: uint8 [N, C, H, W], C 1 or 3.
        copied: bool [N].
    """
    n, _, height, width = images.shape
    margin = max(1, min(height, width) // 16)
    found = torch.full((n, 3, height + 2 * margin, width + 2 * margin), 255, dtype=torch.uint8)
    found[copied] = torch.tensor(FRAME, dtype=torch.uint8)[:, None, None]
    found[:, :, margin:-margin, margin:-margin] = images.expand(n, 3, height, width)
    return found


def draw_gallery(scores: Sequence[Scored], path: Path) -> None:
    """Write a PNG with a row an arm, the same addresses in every row, copies framed.

    Args:
        scores: Of the arms; the first is unguided and unprotected.
        path: Of the picture.
    """
    places = chosen_addresses(scores[0].measurement.memorized)
    rows = [framed(score.arm.drawn.samples.images[places], score.measurement.memorized[places]) for score in scores]
    sheet = tile(torch.cat(rows), len(places))
    height, width = sheet.shape[1:]
    figure = Figure(figsize=(11, 9 * height / width + 0.5), dpi=110)
    axes = figure.add_axes((0.2, 0, 0.8, 1 - 0.3 / figure.get_figheight()))
    axes.imshow(pixels(sheet), interpolation="nearest", aspect="equal")
    step = height / len(rows)
    words = [_word(score.arm.attack, score.arm.protection).replace(", ", "\n") for score in scores]
    axes.set_yticks([step * (place + 0.5) - 0.5 for place in range(len(rows))], words, fontsize=7)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle("the same starting noise in every column; red: copies of a training image", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _word(attack: str, protection: str) -> str:
    return f"{attack}, {'no protection' if protection == UNPROTECTED else protection}"


def draw_frontier(records: Sequence[Record], path: Path) -> None:
    """Write a PNG of copies (log, with a place for zero) against Fréchet distance to held-out images, and both floors.

    Args:
        records: Of all arms, of the first extractor where there are several.
        path: Of the picture.
    """
    ratios = [record for record in records if record.name.endswith("/ratio") and record.value is not None]
    distances = {
        _arm(record): record
        for record in reversed(records)
        if record.name.startswith(PREFIX) and "/frechet/" in record.name and record.name.endswith("/heldout")
        and record.value is not None
    }  # fmt: skip
    ratios = [record for record in ratios if _arm(record) in distances]
    if not ratios:
        return
    figure = Figure(figsize=(6.8, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    zero = min(0.4 / record.n for record in ratios)
    attacks = list(dict.fromkeys(str(record.definition["attack"]) for record in ratios))
    names = list(dict.fromkeys(str(record.definition["protection"]) for record in ratios))
    shown = {names[0]: "#777777"} | {name: COLORS[place % len(COLORS)] for place, name in enumerate(names[1:])}
    for record in ratios:
        attack, name = _arm(record)
        distance = distances[attack, name]
        x, y = float(distance.value or 0.0), max(float(record.value or 0.0), zero)
        if record.low is not None and record.high is not None:
            axes.plot([x, x], [max(record.low, zero), max(record.high, zero)], color=shown[name], lw=0.8)
        if distance.low is not None and distance.high is not None:
            axes.plot([distance.low, distance.high], [y, y], color=shown[name], lw=0.8)
        mark = MARKS[attacks.index(attack) % len(MARKS)]
        filled = shown[name] if record.value else "white"
        axes.plot([x], [y], mark, color=shown[name], mfc=filled, ms=6, label=_word(attack, name))
    extractor = next(iter(distances.values())).definition["extractor"]
    for record, style in zip(
        [r for r in records if r.name.startswith(f"{PREFIX}floor/") and r.definition["extractor"] == extractor],
        ("--", ":"), strict=False,
    ):  # fmt: skip
        if record.value is not None:
            axes.axvline(record.value, color="black", ls=style, lw=0.9, label=record.definition["queries"])
    axes.set(xlabel=f"Fréchet distance to held-out images ({extractor})", ylabel="share of samples that are copies")
    axes.set_yscale("log")
    low = zero / 1.6
    axes.set_ylim(low, 1.3)
    ticks = [10.0**power for power in range(-4, 1) if 10.0**power > 1.5 * zero]
    axes.set_yticks([zero, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axes.minorticks_off()
    axes.set_title("hollow: no copy seen; bars: 95 % intervals", fontsize=9)
    finish(figure, path)


def _arm(record: Record) -> tuple[str, str]:
    return str(record.definition.get("attack", "")), str(record.definition.get("protection", ""))
