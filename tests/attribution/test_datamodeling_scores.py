"""The judge of attributions: true effects of subsets, the ceiling, losses in closed form, folders that do not fit."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_denoiser import images, scene_of, target_of
from rich.console import Console
from torch import Tensor

from lightning_mem.attribution import AbstractAttribution, DatamodelingScores, Queries, RandomScores
from lightning_mem.attribution.asking import member_digests
from lightning_mem.attribution.datamodeling import SubsetModels
from lightning_mem.attribution.datamodeling_report import ceiling
from lightning_mem.attribution.losses import denoising_losses, even_timesteps
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.records import Record

TARGET = target_of(torch.eye(16), (1, 4, 4))
MEMBERS, HELDOUT = images(10, 1, side=4), images(8, 2, side=4)
SUBSETS, QUERIES, APART = 12, 5, 3


class Effects(AbstractAttribution):
    """Scores that were written down."""

    def __init__(self, values: Tensor, name: str) -> None:
        self.values, self.name = values, name

    def identity(self, target: Target, path: str, home: Path) -> str:
        return self.name

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        return self.values


class Additive(DatamodelingScores):
    """Judges models whose losses are minus the sum of what their images do, and noise of every training."""

    effects: Tensor
    noise: Tensor

    def losses(self, scene: Scene, asked: Mapping[Any, Queries]) -> dict[Any, Tensor]:
        masks = self.models.masks(member_digests(scene.reference()))
        return {kind: -(masks.double() @ self.effects.T) - self.noise for kind in asked}


def write_subsets(masks: Tensor, trainings: int = 2) -> list[list[str]]:
    """Folders that say what was trained on."""
    digests = member_digests(Reference.from_images(MEMBERS))
    folders = [[f"subset{place}_{training}" for place in range(len(masks))] for training in range(trainings)]
    for own in folders:
        for folder, mask in zip(own, masks, strict=True):
            Path(folder).mkdir()
            held = [digest for digest, inside in zip(digests, mask.tolist(), strict=True) if inside]
            Path(folder, "members.json").write_text(json.dumps({"members": {"digests": held}}))
    return folders


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves() -> Tensor:
    return torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(m)) < 5 for m in range(SUBSETS)])


def judged(tmp_path: Path, noise: float = 0.0, trainings: int = 2) -> tuple[list[Record], str]:
    effects = draw(QUERIES + APART, 10)
    methods = [Effects(effects, "true"), Effects(-effects, "wrong"), RandomScores()]
    sizes = {"num_queries": QUERIES, "num_calibration": APART, "resamples": 60}
    verb = Additive(methods, write_subsets(halves(), trainings), ["heldout"], **sizes)
    verb.effects, verb.noise = effects, noise * draw(trainings, SUBSETS, QUERIES + APART, seed=1)
    verb.identity(TARGET, "", tmp_path)
    records = verb.run(scene_of(TARGET, MEMBERS, tmp_path, HELDOUT))
    console = Console(width=110, record=True)
    console.print(verb.table(records))
    return records, console.export_text()


def by_name(records: list[Record]) -> dict[str, Record]:
    return {record.name + ("/" + record.definition["other"] if "other" in record.definition else ""): r
            for record in records for r in [record]}  # fmt: skip


def test_true_effects_score_one_their_negative_minus_one_and_orders_are_claimed(tmp_path: Path) -> None:
    records, shown = judged(tmp_path)
    found = by_name(records)
    true, wrong = found["attribution/true/lds"], found["attribution/wrong/lds"]
    assert true.value == pytest.approx(1)
    assert wrong.value == pytest.approx(-1)
    assert (true.n, true.definition["queries"], true.definition["subsets"]) == (QUERIES, "heldout", SUBSETS)
    assert (true.definition["subset_size"], true.definition["trainings"]) == (5, 2)
    assert found["attribution/retrained/lds"].value == pytest.approx(1)  # trainings without noise
    assert found["attribution/retrained/lds_ceiling"].value == pytest.approx(1)
    gain = found["attribution/true/lds_difference/random"]
    assert gain.value == pytest.approx(true.value - found["attribution/random/lds"].value)
    assert gain.low > 0
    assert gain.definition["claimed"]
    lost = found["attribution/wrong/lds_difference/true"]
    assert lost.value == pytest.approx(-2)
    assert lost.definition["claimed"]
    assert "ceiling, about" in shown
    rows = [line.split()[1] for line in shown.splitlines() if line.startswith("heldout")]
    assert rows == ["true", "random", "wrong", "retrained", "ceiling,"]  # the best first
    with (tmp_path / "tables" / "datamodeling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * QUERIES
    assert {float(row["lds"]) for row in rows if row["method"] == "wrong"} == {-1}
    assert (tmp_path / "images" / "datamodeling.png").stat().st_size > 1000


def test_noise_of_trainings_lowers_the_ceiling_and_chance_claims_nothing(tmp_path: Path) -> None:
    found = by_name(judged(tmp_path, noise=2.0)[0])
    again, top = found["attribution/retrained/lds"], found["attribution/retrained/lds_ceiling"]
    assert 0 < again.value < 0.9
    assert top.value == pytest.approx(math.sqrt(2 * again.value / (1 + again.value)))
    assert again.value < found["attribution/true/lds"].value < 1  # against the mean of both trainings
    random = found["attribution/random/lds"]
    assert random.low < 0 < random.high
    assert ceiling(-0.2) == 0


def test_one_training_of_each_subset_has_no_ceiling(tmp_path: Path) -> None:
    found = by_name(judged(tmp_path, trainings=1)[0])
    assert not any("retrained" in name for name in found)


def test_the_loss_of_a_closed_form_is_what_it_is_at_any_noise() -> None:
    r"""A model of one image m errs by \sqrt{ab}(x - m)/\sqrt{1 - ab} in eps, whatever the noise."""
    process = DiffusionProcess("linear", num_timesteps=100)
    target = EmpiricalDenoiser(MEMBERS[:1], process).target()
    times = even_timesteps(4, 100)
    assert times == [12, 37, 62, 87]
    found = denoising_losses(target, MEMBERS[:3], times, num_draws=2, name="any")
    square = (MEMBERS[:3].double() - MEMBERS[0].double()).div(127.5).square().flatten(1).mean(1)
    bar = process.alpha_bar[times].double()
    torch.testing.assert_close(found, square * (bar / (1 - bar)).mean(), rtol=1e-4, atol=1e-9)
    other = EmpiricalDenoiser(MEMBERS, process).target()
    losses = denoising_losses(other, MEMBERS[:3], times, name="any")
    assert torch.equal(losses[1:2], denoising_losses(other, MEMBERS[:2], times, name="any")[1:])  # noise by the row
    assert not torch.equal(losses, denoising_losses(other, MEMBERS[:3], times, name="other"))
    with pytest.raises(ValueError, match=r"must lie in 1 .. 100, got 101"):
        even_timesteps(101, 100)


def test_subsets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    masks = halves()
    folders = write_subsets(masks)
    models = SubsetModels.read(folders)
    digests = member_digests(Reference.from_images(MEMBERS))
    assert torch.equal(models.masks(digests), masks)
    with pytest.raises(ValueError, match=r"each with the same 3 or more subsets .* got lists of \[2, 2\]"):
        SubsetModels.read([own[:2] for own in folders])
    with pytest.raises(ValueError, match=r"got lists of \[\]"):
        DatamodelingScores([RandomScores()]).identity(TARGET, "", tmp_path)
    swapped = [folders[0], [*folders[1][:3], folders[1][4], folders[1][3], *folders[1][5:]]]
    with pytest.raises(ValueError, match=r"subset4_1 was trained on other images than subset3_0: place 3"):
        SubsetModels.read(swapped)
    with pytest.raises(ValueError, match=r"1 of the 5 images that subset\d+_0 was trained on are no training images"):
        models.masks([digest for place, digest in enumerate(digests) if place != 4])
    with pytest.raises(ValueError, match="1 of the 11 training images equal another"):
        models.masks([*digests, digests[0]])
    Path("subset0_0/members.json").unlink()
    with pytest.raises(ValueError, match="subset0_0 has no members.json"):
        SubsetModels.read(folders)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_queries": 1}, "num_queries must be at least 2, got 1"),
        ({"kinds": []}, "kinds must be model, heldout or both"),
        ({"methods": [Effects(MEMBERS, "retrained")]}, "no method may be called retrained"),
        ({"methods": []}, "methods must be at least one"),
    ],
)
def test_bad_settings_of_the_judge_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DatamodelingScores(**{"methods": [RandomScores()], **options})
