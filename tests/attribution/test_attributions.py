"""Attributions side by side: planted truth with known ranks, the ledger's words, scores that are kept, bad input."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_denoiser import images, scene_of, target_of
from rich.console import Console
from torch import Tensor

from lightning_mem.attribution import (
    DTRAK,
    AbstractAttribution,
    Attributions,
    PixelSimilarity,
    Queries,
    QueryOptions,
    RandomScores,
)
from lightning_mem.diffusion import EmpiricalDenoiser, Target
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.metrics import wilson_interval
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

TARGET = target_of(torch.eye(16), (1, 4, 4))
MEMBERS = images(12, 1, side=4)
COPIES = [3, 7, 0, 11]


class Fixed(AbstractAttribution):
    """Scores that were written down."""

    def __init__(self, values: Tensor, name: str = "fixed") -> None:
        self.values, self.name, self.calls = values, name, 0

    def identity(self, target: Target, path: str, home: Path) -> str:
        return f"{float(self.values.sum())}"

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        self.calls += 1
        return self.values

    def cost(self) -> dict[str, float]:
        return {"gradients": 5.0}


def given(extra: int = 2) -> str:
    """A file of copies of four members, a grey level off at one pixel, and images of nothing."""
    copies = MEMBERS[COPIES].clone()
    copies[:, 0, 0, 0] ^= 1
    stack = torch.cat([copies, images(extra, 9, side=4)])
    SampleSet(stack, torch.arange(len(stack))).save("queries.npz")
    return "queries.npz"


def explain(
    tmp_path: Path, methods: list[AbstractAttribution], members: Tensor = MEMBERS, **options: Any
) -> list[Record]:
    verb = Attributions(methods, QueryOptions("given", 6, given()), **{"pictures": 0, **options})
    scene = scene_of(TARGET, members, tmp_path)
    verb.identity(TARGET, "last.ckpt", tmp_path)
    records = verb.run(scene)
    console = Console(width=100, record=True)
    console.print(verb.table(records))
    assert "4 are copies" in " ".join(console.export_text().split())
    return records


def value(records: list[Record], name: str) -> Record:
    (found,) = (record for record in records if record.name == f"attribution/{name}")
    return found


def ranked(ranks: list[int], count: int = 12) -> Tensor:
    """Scores by which the source of copy q has rank ``ranks[q]``."""
    values = torch.arange(count, 0, -1, dtype=torch.float64).repeat(6, 1)
    for query, (source, rank) in enumerate(zip(COPIES, ranks, strict=True)):
        others = [place for place in range(count) if place != source]
        order = [*others[: rank - 1], source, *others[rank - 1 :]]
        values[query, order] = torch.arange(count, 0, -1, dtype=torch.float64)
    return values


def test_planted_sources_have_the_ranks_they_were_given(tmp_path: Path) -> None:
    found = explain(tmp_path, [Fixed(ranked([1, 5, 6, 2])), PixelSimilarity(), RandomScores()])
    first, five = value(found, "fixed/source_first"), value(found, "fixed/source_first_five")
    assert (first.value, first.n, first.low, first.high) == (0.25, 4, *wilson_interval(1, 4))
    assert (five.value, five.low, five.high) == (0.75, *wilson_interval(3, 4))
    assert value(found, "fixed/source_rank").value == 3.5  # the median of 1, 2, 5, 6
    assert first.definition["chance"] == pytest.approx(1 / 12)
    assert five.definition["chance"] == pytest.approx(5 / 12)
    assert first.definition["score"] == "fixed"
    assert (first.definition["queries"], first.definition["num_queries"]) == ("given", 6)
    assert value(found, "pixels_l2/source_first").value == 1
    assert value(found, "fixed/gradients").value == 5
    assert value(found, "random/seconds").unit == "seconds"
    turned = explain(tmp_path / "turned", [Fixed(-ranked([1, 1, 1, 2]))])
    assert value(turned, "fixed/source_rank").value == 12  # larger is more


def test_who_ties_with_the_source_is_put_before_it_and_twins_count_as_one(tmp_path: Path) -> None:
    flat = explain(tmp_path / "flat", [Fixed(torch.zeros(6, 12, dtype=torch.float64))])
    assert value(flat, "fixed/source_rank").value == 12
    twins = torch.cat([MEMBERS, MEMBERS[3:4]])  # the first copy has two sources
    scores = torch.cat([ranked([2, 1, 1, 1]), torch.full((6, 1), 100.0, dtype=torch.float64)], 1)
    found = explain(tmp_path / "twins", [Fixed(scores)], members=twins)
    first = value(found, "fixed/source_first")
    assert first.value == 0.25  # the twin comes first; for the other copies it stands before the source
    assert first.definition["chance"] == pytest.approx((2 + 3) / 13 / 4)


def test_tables_and_scores_name_images_and_join_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    row = "step,weights,index,copies,nearest,samples,file\n0,raw,7,3,0.010000,1 2 4,\n9,raw,7,8,0.5,1,\n"
    (tmp_path / "run" / "ledger.csv").write_text(row)
    explain(tmp_path, [Fixed(ranked([1, 1, 1, 1])), PixelSimilarity()], top=2, pictures=1)
    with (tmp_path / "tables" / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 2
    second = rows[2]
    assert (second["query"], second["copy"], second["method"], second["rank"], second["index"]) == (
        *("1", "1", "fixed", "1", "7"),
    )
    assert (second["copies"], second["nearest"], second["rank_by_l2"]) == ("3", "0.010000", "1")  # of this step alone
    assert float(second["rms_l2"]) == pytest.approx(1 / 255 / 4, abs=1e-6)
    with (tmp_path / "tables" / "attribution_images.csv").open() as file:
        by_image = {row["index"]: row for row in csv.DictReader(file)}
    assert len(by_image) == 12
    assert {index: by_image[index]["fixed_first"] for index in ("3", "7", "0", "11", "5")} == {
        "3": "1", "7": "1", "0": "3", "11": "1", "5": "0",
    }  # fmt: skip
    assert (by_image["7"]["copies"], by_image["5"]["copies"]) == ("3", "0")
    scores = np.load(tmp_path / "scores.npz")
    np.testing.assert_array_equal(scores["fixed"], ranked([1, 1, 1, 1]).float().numpy())
    assert scores["indices"].tolist() == list(range(12))
    assert (tmp_path / "images" / "attribution.png").stat().st_size > 1000


def test_finished_scores_are_read_again_and_those_of_other_settings_are_not(tmp_path: Path) -> None:
    method = Fixed(ranked([1, 2, 3, 4]))
    before = explain(tmp_path, [method])
    again = explain(tmp_path, [method, RandomScores()])
    assert method.calls == 1
    assert value(again, "fixed/source_rank").value == value(before, "fixed/source_rank").value
    assert value(again, "fixed/gradients").value == 5  # what it took is kept with the scores
    changed = Fixed(ranked([1, 1, 1, 1]))
    changed.values[5, 5] += 1
    assert value(explain(tmp_path, [changed]), "fixed/source_first").value == 1
    assert changed.calls == 1


def test_queries_without_a_copy_say_so_and_held_out_ones_need_images(tmp_path: Path) -> None:
    heldout = images(5, 4, side=4)
    reference = Reference.from_images(MEMBERS, heldout)
    scene = Scene(TARGET, tmp_path, tmp_path, lambda *a, **k: None, lambda: reference)  # type: ignore[arg-type,return-value]
    for count in (5, 6):
        verb = Attributions([PixelSimilarity()], QueryOptions("heldout", count), pictures=0)
        verb.identity(TARGET, "", tmp_path)
        if count == 6:
            with pytest.raises(ValueError, match="6 held-out queries were asked for, but there are 5 held-out images"):
                verb.run(scene)
        else:
            (first,) = (r for r in verb.run(scene) if r.name.endswith("source_first"))
            assert (first.value, first.definition["undefined"]) == (None, "none of the 5 queries is a copy")


def test_bad_input_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no two of one name, got \['pixels_l2', 'pixels_l2'\]"):
        Attributions([PixelSimilarity(), PixelSimilarity()])
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        Attributions([PixelSimilarity()], top=0)
    with pytest.raises(ValueError, match="name lightning_mem.attribution.EnsembleAblation"):
        Attributions([PixelSimilarity()], QueryOptions("ensemble"))
    with pytest.raises(ValueError, match="queries.path names the images of the kind given"):
        QueryOptions("given")
    SampleSet(images(2, 0), torch.arange(2)).save("small.npz")
    verb = Attributions([PixelSimilarity()], QueryOptions("given", 2, "small.npz"))
    with pytest.raises(ValueError, match=r"queries are \(1, 2, 2\) .* training images are \(1, 4, 4\)"):
        verb.identity(TARGET, "", tmp_path)
    closed = EmpiricalDenoiser(MEMBERS, TARGET.process).target()
    with pytest.raises(ValueError, match="gradients need a target with a network"):
        Attributions([DTRAK()]).identity(closed, "", tmp_path)
    for values, words in (
        (torch.zeros(6, 11, dtype=torch.float64), r"fixed gave scores \(6, 11\), not .* \(6, 12\)"),
        (torch.full((6, 12), torch.nan, dtype=torch.float64), "72 of 72 scores of fixed are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            explain(tmp_path / "bad", [Fixed(values)])
