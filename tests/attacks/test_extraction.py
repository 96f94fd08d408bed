"""Generate-and-filter: its counts by brute force, repeats, the control, parts, and a stop."""

import csv
import dataclasses
import io
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from rich.console import Console
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import Extraction
from lightning_mem.attacks.extraction_costs import denoiser_calls
from lightning_mem.attacks.extraction_scores import Nearness
from lightning_mem.data import DigitsSource, MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition, AllAccept, Judge
from lightning_mem.evaluation import Scene
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

ONCE, REPEATED, HELDOUT = patterns(30), patterns(6, 1), patterns(36, 2)
MEMBERS = torch.cat([ONCE, REPEATED.repeat_interleave(8, 0)])
OPTIONS: dict[str, Any] = {"num_samples": 70, "num_steps": 8, "neighbors": 10, "sample_seed": 3, "pictures": 5}


def kept_scene(members: Tensor, heldout: Tensor, folder: Path = Path("results"), target: Target | None = None) -> Scene:
    """A scene whose draws are in files, as the verb's are."""
    target = planted_mixture(members, DiffusionProcess("linear")) if target is None else target
    scene = scene_of(target, members, heldout, folder)
    draw = scene.blocks

    def blocks(file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[Any]) -> SampleSet:
        found = SampleSet.load(file) if file.is_file() else draw(file, first, count, settings, guidance)
        found.save(file)
        return found

    return dataclasses.replace(scene, blocks=blocks)


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    """All but what took time."""
    return [(r.name, r.value, r.low, r.n) for r in records if not r.name.endswith("/seconds_per_image")]


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


def test_a_second_run_gives_the_same_records_with_their_times(whole: tuple[list[Record], Path]) -> None:
    records, folder = whole
    again = Extraction(part=64, **OPTIONS).run(kept_scene(MEMBERS, HELDOUT, folder))
    assert [(r.identity, r.value, r.low, r.high, r.n) for r in again] == [
        (r.identity, r.value, r.low, r.high, r.n) for r in records
    ]


def test_parts_change_nothing_and_no_more_than_one_is_ever_in_memory(
    whole: tuple[list[Record], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[int, int] = {}
    most: list[int] = []
    original = SampleSet.__post_init__

    def watched(self: SampleSet) -> None:
        original(self)
        alive[id(self)] = len(self)
        weakref.finalize(self, alive.pop, id(self))
        most.append(sum(alive.values()))

    monkeypatch.setattr(SampleSet, "__post_init__", watched)
    small = Extraction(part=21, **OPTIONS).run(kept_scene(MEMBERS, HELDOUT))
    assert told(small) == told(whole[0])
    assert len(most) > 2 * 3  # drawn, searched, shown
    assert max(most) == 21


def test_a_stopped_search_goes_on_with_the_part_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "num_samples": 30, "num_steps": 4, "pictures": 0}
    whole = Extraction(**options).run(kept_scene(MEMBERS, HELDOUT, Path("whole")))
    searched: list[int] = []
    power = [False]
    original = Nearness.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Nearness], samples: SampleSet, *args: Any) -> Nearness:
        searched.append(int(samples.addresses[0]))
        if len(searched) == 2 and not power[0]:
            raise RuntimeError("power cut")
        return original(cls, samples, *args)

    def run(**own: Any) -> tuple[list[Record], Record]:
        records = Extraction(part=10, **{**options, **own}).run(kept_scene(MEMBERS, HELDOUT))
        return records, next(r for r in records if r.name.endswith("/seconds_per_image"))

    monkeypatch.setattr(Nearness, "of", classmethod(of))
    with pytest.raises(RuntimeError, match="power cut"):
        run()
    power[0] = True
    records, seconds = run()
    assert searched == [0, 10, 10, 20]
    assert told(records) == told(whole)
    assert seconds.n == 10  # the first part: of the others the drawing was read from the disk
    assert seconds.value > 0
    _, missing = run(neighbors=9)
    assert searched[4:] == [0, 10, 20]  # what another search found is not taken for this one's
    assert (missing.value, missing.n) == (None, 0)
    assert "read from the disk" in missing.definition["undefined"]


class Counting:
    """A denoiser that counts the rows it is asked for."""

    def __init__(self, target: Target) -> None:
        self.denoiser, self.prediction, self.rows = target.denoiser, target.denoiser.prediction, 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.rows += len(x_t)
        return self.denoiser(x_t, t, condition)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 5), ("heun", 5), ("dpm++", 4)])
def test_evaluations_are_the_calls_of_a_generation(sampler: Any, steps: int) -> None:
    target = planted_mixture(ONCE, DiffusionProcess("linear"))
    counting = Counting(target)
    options = {**OPTIONS, "num_samples": 64, "sampler": sampler, "num_steps": steps, "pictures": 0}
    attack = Extraction(**options)
    records = attack.run(kept_scene(ONCE, HELDOUT, target=dataclasses.replace(target, denoiser=counting)))
    found = {r.name.removeprefix("attack/extraction/"): r for r in records}
    assert found["evaluations"].value == counting.rows / 64 == (2 * steps - 1 if sampler == "heun" else steps)
    assert (found["evaluations"].unit, found["evaluations"].n) == ("denoiser calls", 64)
    assert 0 < found["seconds_per_image"].value * 64 < found["seconds_per_image"].seconds
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack.table(records))
    shown = console.export_text()
    assert f"one generation costs {found['evaluations'].value:g} denoiser calls, " in shown
    assert " seconds" in shown
    assert "…" not in shown


def test_guidance_by_a_condition_doubles_the_calls() -> None:
    target = planted_mixture(ONCE, DiffusionProcess("linear"))
    target.denoiser.cfg_weight = 7.5  # type: ignore[attr-defined]
    assert [denoiser_calls(target, "heun", 4, conditioned=given) for given in (True, False)] == [14, 7]
    target.denoiser.cfg_weight = 1  # type: ignore[attr-defined]
    assert denoiser_calls(target, "heun", 4, conditioned=True) == 7


TIMES = (1, 2, 4, 8, 16)


def test_digits_come_out_the_more_often_they_are_repeated_as_the_law_says() -> None:
    data = MemorizationDataModule(DigitsSource(), num_members=100, num_heldout=40)
    data.setup()
    members = data.members.images.repeat_interleave(torch.tensor(TIMES).repeat_interleave(20), 0)
    heldout = data.heldout.images
    target = EmpiricalDenoiser(members, DiffusionProcess("linear")).target()  # an image weighs what it stands there
    options = {**OPTIONS, "num_samples": 256, "delta": 0.02, "eidetic_k": list(TIMES), "pictures": 0}
    records = Extraction(**options).run(kept_scene(members, heldout, target=target))
    shares = [by_name(records, rule="rms_l2", repeats=times)["images_by_repeats"] for times in TIMES]
    for times, share in zip(TIMES, shares, strict=True):
        law = 1 - (1 - times / len(members)) ** 256
        assert share.n == 20
        assert abs(share.value - law) < 3 * max(law * (1 - law) / 20, 1 / 400) ** 0.5
    values = [share.value for share in shares]
    assert values == sorted(values)
    assert values[-1] - values[0] > 0.4
    found = [by_name(records, rule="rms_l2", k=k)["eidetic_images"].value for k in TIMES]
    assert found == np.cumsum([20 * value for value in values]).tolist()  # k near copies: the repeats, itself included


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

        term.settings = {"protection": "grey"}  # type: ignore[attr-defined]
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
