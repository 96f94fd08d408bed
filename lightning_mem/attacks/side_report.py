"""What SIDE leaves beside its records: tables of samples and clusters, and pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.report import finish, sample_rows, short
from lightning_mem.attacks.side_scores import PREFIX, Score
from lightning_mem.attacks.unique_law import expected_unique
from lightning_mem.evaluation import Measure
from lightning_mem.evaluation.bands import SPACES
from lightning_mem.evaluation.copies import NEIGHBORS
from lightning_mem.evaluation.curves import COLORS
from lightning_mem.evaluation.pictures import draw_pairs
from lightning_mem.evaluation.table import LOOK, write_rows
from lightning_mem.metrics import nearest_neighbors, normalized_l2
from lightning_mem.metrics.scores import in_band
from lightning_mem.metrics.similarities import score_blocks
from lightning_mem.records import Record

WORDS = {"none": "unguided", "time_independent": "without time", "selection_equal_cost": "  same cost"}
"""Arms that have other words on the screen."""

UNGUIDED = "#777777"
"""Colour of the arm that the others are compared with, which comes first."""

PAIRS = 16
"""Pairs in a picture of one band."""


def arms_table(records: Sequence[Record]) -> Table:
    """One row an arm: hits and their control, distinct images a sample, ratio to the unguided arm, and what it cost."""
    caption = (
        "hits: share of samples that copy a training image, beside the held-out control; distinct: different images "
        "a sample; gain: hits over unguided hits; per 1000: hits of a thousand network evaluations"
    )
    table = Table(title="SIDE", title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    for heading in ("arm", "n", "hits", "held\nout", "dis-\ntinct", "gain", "per\n1000"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm in dict.fromkeys(str(record.definition["surrogate"]) for record in records):
        own = {r.name.removeprefix(PREFIX): r for r in records if r.definition["surrogate"] == arm}
        numbers = [short(own.get(name)) for name in ("hits", "hits_heldout", "unique_share", "ams_gain")]
        numbers[1:3] = [number.partition(" ")[0] for number in numbers[1:3]]
        cost = own.get("hits_per_evaluation")
        per = "" if cost is None or cost.value is None else f"{1000 * cost.value:.1f}"
        table.add_row(WORDS.get(arm, arm), str(own["hits"].n), *numbers, per)
    return table


def write_report(
    scores: Sequence[Score], measure: Measure, about: dict[str, Any], folder: Path, pictures: bool
) -> None:
    """Write ``tables/`` and ``images/``.

    Args:
        scores: Of the arms, the unguided one first.
        measure: What they were measured with.
        about: Of the labelled images: what is known of each cluster.
        folder: Of the attack.
        pictures: Whether to draw.
    """
    for score in scores:
        if score.measurement is not None:
            write_rows(folder / "tables" / f"samples_{score.arm.name}.csv", _sample_rows(score, measure))
    write_rows(folder / "tables" / "clusters.csv", _cluster_rows(scores, about))
    if not pictures:
        return
    draw_law(scores, folder / "images" / "unique.png")
    draw_arms(scores, folder / "images" / "arms.png")
    for score in scores:
        if score.arm.places is None and score.measurement is not None:
            _draw_bands(score, measure, folder / "images")


def _sample_rows(score: Score, measure: Measure) -> Iterable[dict[str, Any]]:
    """One row a sample: its cluster, and the training image it is nearest to."""
    found, reference = score.measurement, measure.reference
    if found is None:
        return
    for row, told in enumerate(sample_rows(score.arm.samples, found, reference)):
        target = "" if score.arm.targets is None else int(score.arm.targets[row])
        yield {"address": told.pop("address"), "target": target, **told}


def _cluster_rows(scores: Sequence[Score], about: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One row an arm and cluster: what is known of the cluster, and the hits of the samples drawn for it."""
    for score in scores:
        if score.arm.targets is None or score.images is None:
            continue
        for target in range(about["num_targets"]):
            own = score.arm.targets == target
            hits = own & score.hits
            yield {
                "arm": score.arm.name,
                "target": target,
                "cohesion": f"{about['cluster_cohesion'][target]:.6f}",
                "isolation": f"{about['cluster_isolation'][target]:.6f}",
                "size": about["cluster_sizes"][target],
                "samples": int(own.sum()),
                "hits": int(hits.sum()),
                "unique_images": len(score.images[hits].unique()),
            }


def draw_law(scores: Sequence[Score], path: Path) -> None:
    """Distinct images over samples drawn, beside the law fitted on the first half."""
    figure = Figure(figsize=(5.6, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for color, score in zip((UNGUIDED, *COLORS), scores, strict=False):
        n = len(score.hits)
        if n < 2 or score.images is None:
            continue
        at = torch.linspace(0, n, min(n, 60) + 1).round().long().unique()
        seen = [len(score.counts(int(rows))) for rows in at]
        law = expected_unique(score.counts(n // 2), n // 2, at)
        axes.plot(at, seen, color=color, label=score.arm.name)
        axes.plot(at, law, ":", color=color)
        axes.plot(
            [n // 2], [float(expected_unique(score.counts(n // 2), n // 2, torch.tensor(n // 2)))], "o", color=color
        )
    axes.set(xlabel="samples", ylabel="different training images hit")
    axes.set_title("seen, and (dotted) the law fitted on the samples up to the dot", fontsize=9)
    finish(figure, path)


def draw_arms(scores: Sequence[Score], path: Path) -> None:
    """Hits of each arm with its control, and distinct images a sample, with 95 % intervals."""
    figure = Figure(figsize=(8.4, 3.4), dpi=110, layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("hits", "unique_share"), ("samples that copy", "different images a sample"), strict=True
    ):
        for place, score in enumerate(scores):
            by_name = {record.name.removeprefix(PREFIX): record for record in score.records}
            for record, color, width in (
                (by_name.get(name), COLORS[1], 0.7),
                (by_name.get(f"{name}_heldout"), "black", 0.3),
            ):
                if record is None or record.value is None:
                    continue
                axes.bar(place, record.value, width, color=color)
                if record.low is not None and record.high is not None:
                    axes.plot([place, place], [record.low, record.high], color="black", lw=1)
        words = [score.arm.name.replace("_", "\n") for score in scores]
        axes.set_xticks(range(len(scores)), words, fontsize=7)
        axes.set_title(f"{title} (black bar: held-out control)", fontsize=9)
    finish(figure, path)


def _closest(score: Score, measure: Measure, name: str) -> tuple[Tensor, bool]:
    """Each sample's closest score in a space, [N], and whether larger is closer; by this process alone."""
    images, banks = score.arm.samples.images, measure.banks
    rows = banks.rows("members")
    if SPACES[name][0] == "normalized_l2":
        groups = banks.groups["members"][rows]
        k = min(NEIGHBORS, len(groups.unique()))
        found, _ = nearest_neighbors(images, banks.images("members")[rows], k, groups=groups)
        return normalized_l2(found), False
    extractor = next(extractor for extractor in measure.extractors if extractor.name == name)
    bank = banks.features("members", extractor)[rows]
    best = torch.full((len(images),), -torch.inf)
    features = extractor(images)
    for own, _, found in score_blocks(features, bank, "cosine"):
        best[own] = torch.maximum(best[own], found.amax(1).cpu())
    return best, True


def _draw_bands(score: Score, measure: Measure, folder: Path) -> None:
    """A picture of the closest pairs in each band of each space."""
    if score.measurement is None:
        return
    for extractor in measure.extractors:
        if extractor.name not in SPACES:
            continue
        closest, larger = _closest(score, measure, extractor.name)
        order = closest.argsort(descending=larger, stable=True)
        for band, ends in SPACES[extractor.name][1].items():
            places = order[in_band(closest, ends)[order]]
            if len(places) == 0:
                continue
            title = f"{score.arm.name}, {extractor.name} {band}: {len(places)} of {len(closest)} samples; red: hits"
            path = folder / f"pairs_{score.arm.name}_{extractor.name}_{band}.png"
            draw_pairs(score.arm.samples, measure.reference, score.measurement, places[:PAIRS], title, path)
