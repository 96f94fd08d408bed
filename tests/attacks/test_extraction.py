"""Generate-and-filter: its counts by brute force, repeats, the control, parts, and a stop."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import Extraction, extraction
from lightning_mem.diffusion import DiffusionProcess, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition, AllAccept, Judge
from lightning_mem.evaluation import Scene
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

ONCE, REPEATED, HELDOUT = patterns(30), patterns(6, 1), patterns(36, 2)
MEMBERS = torch.cat([ONCE, REPEATED.repeat_interleave(8, 0)])
OPTIONS: dict[str, Any] = {"num_samples": 70, "num_steps": 8, "neighbors": 10, "sample_seed": 3, "pictures": 5}


def kept_scene(members: Tensor, heldout: Tensor, folder: Path = Path("results")) -> Scene:
    """A scene whose draws are in files, as the verb's are."""
    scene = scene_of(planted_mixture(members, DiffusionProcess("linear")), members, heldout, folder)
    draw = scene.blocks

    def blocks(file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[Any]) -> SampleSet:
        found = SampleSet.load(file) if file.is_file() else draw(file, first, count, settings, guidance)
        found.save(file)
        return found

    return dataclasses.replace(scene, blocks=blocks)


def by_name(records: list[Record], **about: Any) -> dict[str, Record]:
    chosen = [r for r in records if about.items() <= r.definition.items()]
    assert len({r.name + r.definition["bank"] for r in chosen}) == len(chosen)
    return {r.name.removeprefix("attack/extraction/"): r for r in chosen}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return Extraction(part=64, **OPTIONS).run(kept_scene(MEMBERS, HELDOUT, folder)), folder


def generations(folder: Path) -> np.ndarray:
    parts = [SampleSet.load(path).images for path in sorted((folder / "samples").glob("part*.npz"))]
    return torch.cat(parts).flatten(1).numpy() / 255.0


def distances(folder: Path, bank: Tensor) -> np.ndarray:
    rows = bank.flatten(1).numpy() / 255.0
    return np.sqrt(((generations(folder)[:, None] - rows) ** 2).sum(2))


@pytest.mark.parametrize("cut", [1.0, 1.4])
def test_counts_are_those_of_the_definition(whole: tuple[list[Record], Path], cut: float) -> None:
    records, folder = whole
    found = by_name([r for r in records if "repeats" not in r.definition], rule="normalized_l2", cut=cut)
    members = torch.cat([ONCE, REPEATED])  # an image that stands there eight times is one neighbour
    table = distances(folder, members)
    near = np.sort(table, 1)[:, :10]
    hit = near[:, 0] / (0.5 * near.mean(1)) < cut
    assert 10 < hit.sum() < 70
    assert found["generations"].value == hit.mean()
    assert found["images"].value == len(np.unique(table.argmin(1)[hit]))
    assert found["images"].definition["neighbors"] == 10
    control = np.sort(distances(folder, HELDOUT), 1)[:, :10]
    unseen = control[:, 0] / (0.5 * control.mean(1)) < cut
    assert found["generations_equal_heldout"].value == unseen.mean()
    own = found["generations_equal"].value
    assert found["precision"].value == pytest.approx(max(0, 1 - unseen.mean() / own))
    assert found["precision"].value > (0.9 if cut == 1.0 else 0.0)


def test_repeated_images_come_out_more_often_and_their_copies_are_counted(whole: tuple[list[Record], Path]) -> None:
    records, folder = whole
    shares = {
        times: by_name(records, rule="normalized_l2", cut=1.0, repeats=times)["images_by_repeats"] for times in (1, 8)
    }
    assert (shares[1].n, shares[8].n) == (30, 6)
    assert shares[8].value > 0.8 > 0.5 > shares[1].value > 0
    rows = list(csv.DictReader((folder / "tables" / "extracted.csv").read_text().splitlines()))
    assert [int(row["generations_normalized_l2_1"]) for row in rows] == sorted(
        (int(row["generations_normalized_l2_1"]) for row in rows), reverse=True
    )
    table = distances(folder, torch.cat([ONCE, REPEATED]))
    for row in rows:
        index = int(row["index"])
        assert int(row["repeats"]) == int(row["near_copies"]) == (1 if index < 30 else 8)
        place = index if index < 30 else 30 + (index - 30) // 8
        mine = table.argmin(1) == place
        assert float(row["rms_l2"]) == pytest.approx(table[mine, place].min() / 8, rel=1e-4)
        assert mine[int(row["address"])]
    plain = by_name(records, rule="rms_l2", k=1)["eidetic_images"].value
    all_images = by_name(records, rule="rms_l2", k=10)["eidetic_images"].value
    nearest = table.min(1) / 8 <= 0.15
    named = np.unique(table.argmin(1)[nearest])
    assert (plain, all_images) == ((named < 30).sum(), len(named))
    assert all_images - plain >= 5
    assert (folder / "images" / "extracted.png").stat().st_size > 1000


def test_parts_change_nothing_and_a_second_run_draws_nothing(
    whole: tuple[list[Record], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, folder = whole
    again = Extraction(part=64, **OPTIONS).run(kept_scene(MEMBERS, HELDOUT, folder))
    assert [(r.name, r.value, r.low) for r in again] == [(r.name, r.value, r.low) for r in records]
    held: list[int] = []
    original = SampleSet.load

    def load(path: Path) -> SampleSet:
        found = original(path)
        held.append(len(found))
        return found

    monkeypatch.setattr(extraction.SampleSet, "load", load)
    small = Extraction(part=16, **{**OPTIONS, "pictures": 0}).run(kept_scene(MEMBERS, HELDOUT))
    assert [(r.name, r.value, r.low) for r in small] == [(r.name, r.value, r.low) for r in records]
    assert max(held) == 16


def test_without_heldout_images_there_is_no_precision() -> None:
    records = Extraction(**{**OPTIONS, "num_samples": 20}).run(kept_scene(ONCE, HELDOUT[:0]))
    found = by_name(records, rule="normalized_l2", cut=1.0)
    assert found["precision"].value is found["generations_equal"].value is None
    assert found["precision"].definition["undefined"] == "there are no held-out images"
    assert "images_by_repeats" not in found
    assert Extraction.threat_model.startswith("Extraction sees samples of the target and nothing else")


def test_what_cannot_be_counted_is_refused() -> None:
    for options, message in (
        ({"cuts": [0.0]}, r"cuts must be different positive numbers, got \[0.0\]"),
        ({"cuts": []}, "cuts must be different positive numbers"),
        ({"neighbors": 1}, "neighbors must be at least 2, got 1"),
        ({"eidetic_k": [0]}, r"eidetic_k must be at least 1 .* got \[0\]"),
        ({"delta": 1.0}, r"delta must lie in \(0, 1\) and alpha be positive, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Extraction(**options)  # type: ignore[arg-type]
    digests = {
        Extraction(**{**OPTIONS, **own}).identity(kept_scene(ONCE, HELDOUT).target, "x", Path("x"))
        for own in ({}, {"cuts": [1.0]}, {"num_samples": 71}, {"sample_seed": 4}, {"neighbors": 9})
    }
    assert len(digests) == 5
    with pytest.raises(ValueError, match="needs two different training images, got 1"):
        Extraction(**{**OPTIONS, "num_samples": 2}).run(kept_scene(ONCE[:1].repeat(2, 1, 1, 1), HELDOUT))


def test_images_repeated_by_the_data_module_count_as_stacked_ones(whole: tuple[list[Record], Path]) -> None:
    scene = kept_scene(MEMBERS, HELDOUT, whole[1])  # the same generations
    images, times = torch.cat([ONCE, REPEATED]), torch.tensor([1] * 30 + [8] * 6)
    once = dataclasses.replace(scene.reference(), members=images, owners=torch.arange(36), repeats=times)
    records = Extraction(part=64, **OPTIONS).run(dataclasses.replace(scene, read=lambda: once, _read=[]))
    for name in ("images_by_repeats", "eidetic_images"):
        values = [[r.value for r in found if r.name.endswith(name)] for found in (records, whole[0])]
        assert values[0] == values[1]
        assert len(values[0]) > 1


class ToNoImage(AbstractAddition):
    """Pushes every sample towards grey, where no image is."""

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        def term(x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor:
            return -30 * x_t

        term.settings = {"guidance": "grey"}  # type: ignore[attr-defined]
        return [term]


def test_a_protected_target_gives_back_fewer_images_and_says_so(
    whole: tuple[list[Record], Path], tmp_path: Path
) -> None:
    attack, plain = Extraction(part=64, protection=ToNoImage(), **OPTIONS), Extraction(part=64, **OPTIONS)
    scene = kept_scene(MEMBERS, HELDOUT, tmp_path)
    assert len({own.identity(scene.target, "", tmp_path) for own in (attack, plain)}) == 2
    found = {
        record.definition["protection"]: record.value
        for record in [*attack.run(scene), *whole[0]]
        if record.name.endswith("/generations") and record.definition["rule"] == "rms_l2"
    }
    assert set(found) == {"none", "grey"}
    assert 0 <= (found["grey"] or 0) < (found["none"] or 0) / 2


def test_a_rejection_is_measured_elsewhere() -> None:
    class Refuses(AbstractAddition):
        def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
            return ()

        def judge(self, target: Target, path: str) -> Judge:
            return AllAccept([])

    with pytest.raises(ValueError, match="draws every sample once"):
        Extraction(protection=Refuses()).identity(
            scene_of(planted_mixture(ONCE, DiffusionProcess("linear")), ONCE, HELDOUT).target, "", Path()
        )
