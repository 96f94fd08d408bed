"""Inpainting: the known half stays, completions by Bayes' rule, the choice by loss, members against others, a stop."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import gaussian_denoiser, planted_mixture
from rich.console import Console
from stable_diffusion import save_pipeline
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import Inpainting
from lightning_mem.attacks.completions import Completions, hidden_half
from lightning_mem.attacks.inpainting_report import Side
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.diffusion.sampling import sample_x0
from lightning_mem.modules import load_target
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.records import Record
from lightning_mem.types import to_float

MEMBERS, HELDOUT = patterns(8), patterns(8, 1)
DRAWING: dict[str, Any] = {"num_steps": 8, "sampler": "ddim", "eta": 1.0, "block": 16}
OPTIONS: dict[str, Any] = {"num_inpaintings": 4, "kept": 2, "num_steps": 8, "block": 16, "sample_seed": 1}


def completions(target: Target, images: Tensor, count: int = 4, **options: Any) -> Completions:
    given = {"half": "right", "timestep": 100, "seed": 0, "kind": "members", **options}
    return Completions(target, images, num_inpaintings=count, drawing=DRAWING, device="cpu", **given)


def test_the_halves_are_where_their_names_say() -> None:
    assert hidden_half("left", 2, 5).int().tolist() == [[1, 1, 0, 0, 0]] * 2
    assert hidden_half("right", 2, 5).int().tolist() == [[0, 0, 0, 1, 1]] * 2
    assert hidden_half("top", 3, 2).int().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert hidden_half("bottom", 3, 2).int().tolist() == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_half_of_a_member_brings_back_the_other_half_and_half_of_another_image_does_not(prediction: str) -> None:
    process = DiffusionProcess("linear", prediction=prediction)  # type: ignore[arg-type]
    target = EmpiricalDenoiser(MEMBERS, process).target()
    rows = torch.arange(16)
    own = completions(target, MEMBERS)
    found = own.pixels(own.complete(rows), rows)
    assert torch.equal(found[..., :4], MEMBERS[rows // 4][..., :4])
    right = (found.int() - MEMBERS[rows // 4].int()).abs().amax((1, 2, 3)) <= 1
    assert right.double().mean() > 0.8  # replacement is no exact conditioning
    losses, away = own.scores(rows).unbind(1)
    assert away[right].max() < 0.01 < 0.2 < away[~right].min()
    assert losses[right].max() < 1e-6 < 0.1 < losses[~right].min()  # which the loss tells
    other = completions(target, HELDOUT)
    found = other.pixels(other.complete(rows), rows)
    away = (found - 0.0 - HELDOUT[rows // 4])[..., 4:].square().flatten(1).mean(1).sqrt() / 255
    assert away.min() > 0.2
    torch.testing.assert_close(other.scores(rows)[:, 1], away.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler"])
def test_where_the_halves_are_independent_the_hidden_one_is_that_of_plain_sampling(sampler: str) -> None:
    mean = torch.linspace(-0.4, 0.4, 64).reshape(1, 8, 8)
    target = gaussian_denoiser(mean, 0.2, DiffusionProcess("linear")).target()
    own = completions(target, MEMBERS[:2], 8)
    own.drawing = {**DRAWING, "eta": 0.0, "sampler": sampler}
    rows = torch.arange(16)
    found = own.complete(rows)
    assert torch.equal(found[..., :4], to_float(MEMBERS[rows // 8])[..., :4])
    plain = sample_x0(target, rows, seed=derive_seed(0, "inpainting", "members"), **own.drawing)
    torch.testing.assert_close(found[..., 4:], plain[..., 4:])
    assert plain[..., 4:].std(0).mean() > 0.05


def test_losses_are_those_of_the_closed_form_and_do_not_depend_on_company() -> None:
    target = planted_mixture(MEMBERS, DiffusionProcess("linear"))
    own = completions(target, MEMBERS)
    rows = torch.tensor([0, 3, 6])
    drawn = own.complete(rows)
    found = own.losses(drawn, rows)
    assert torch.equal(own.complete(rows[1:]), drawn[1:])
    assert torch.equal(own.losses(drawn[1:], rows[1:]), found[1:])
    alpha_bar = float(target.process.alpha_bar[100])
    for place, row in enumerate(rows.tolist()):
        eps = torch.randn(1, 8, 8, generator=generator(0, "inpainting loss", "members", row)).double()
        x_t = math.sqrt(alpha_bar) * drawn[place].double() + math.sqrt(1 - alpha_bar) * eps
        guess = -math.sqrt(1 - alpha_bar) * target.denoiser.score(x_t[None], torch.tensor([100]))[0]  # type: ignore[attr-defined]
        assert float(found[place]) == pytest.approx(float((guess - eps).square().mean()), rel=2e-3)


def test_the_completions_with_the_lowest_loss_are_averaged() -> None:
    scores = torch.tensor([[[0.3, 1.0], [0.1, 2.0], [0.2, 4.0]], [[0.1, 1.0], [0.2, 8.0], [0.3, 2.0]]])
    target = EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear")).target()
    side = Side(completions(target, MEMBERS[:2], 3), torch.arange(2), scores.double(), kept=2)
    assert side.best.tolist() == [3.0, 4.5]
    assert side.every.tolist() == pytest.approx([7 / 3, 11 / 3])


def test_what_is_shown_is_the_image_its_seen_half_its_best_completions_and_their_mean() -> None:
    target = planted_mixture(MEMBERS, DiffusionProcess("linear"))
    own = completions(target, MEMBERS[:3], 6)
    scores = torch.cat([own.scores(rows) for rows in torch.arange(18).split(16)]).unflatten(0, (3, 6))
    side = Side(own, torch.tensor([4, 5, 9]), scores, kept=4)
    shown = side.shown(1)
    assert torch.equal(shown[0], MEMBERS[1])
    assert (shown[1, :, :, 4:] == 128).all()
    assert torch.equal(shown[1, :, :, :4], MEMBERS[1, :, :, :4])
    order = scores[1, :, 0].argsort()[:4]
    drawn = torch.cat([own.pixels(own.complete(row), row) for row in (6 + order)[:, None]])
    assert torch.equal(shown[2:5], drawn[:3])
    torch.testing.assert_close(shown[5].double(), drawn.double().mean(0), atol=0.5, rtol=0)
    distances = [float((image - 0.0 - MEMBERS[1])[:, :, 4:].square().mean().sqrt()) / 255 for image in drawn]
    assert float(side.best[1]) == pytest.approx(sum(distances) / 4, rel=1e-5)


def by_name(records: list[Record], statistic: str | None) -> dict[str, Record]:
    assert len({record.identity for record in records}) == len(records)
    chosen = (r for r in records if r.definition.get("statistic") == statistic)
    return {r.name.removeprefix("attack/inpainting/"): r for r in chosen}


def test_members_are_completed_better_and_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    target = EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear")).target()
    attack = Inpainting(**OPTIONS, pictures=0)
    assert attack.identity(target, "x", Path("x"))
    whole = attack.run(scene_of(target, MEMBERS, HELDOUT, Path("whole")))
    found = by_name(whole, "best")
    assert found["auc"].value == found["tpr_at_0.01"].value == 1
    assert found["z"].value > 5
    assert found["distance"].value < 0.01 < 0.2 < found["distance_heldout"].value
    assert by_name(whole, "all")["auc"].value == 1
    rows = list(csv.DictReader(Path("whole/tables/inpainting.csv").read_text().splitlines()))
    assert [row["set"] for row in rows] == ["members"] * 8 + ["heldout"] * 8
    original, calls = Completions.scores, []

    def stop(self: Completions, rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return original(self, rows)

    monkeypatch.setattr(Completions, "scores", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        attack.run(scene_of(target, MEMBERS, HELDOUT))
    again = Inpainting(**OPTIONS, pictures=2).run(scene_of(target, MEMBERS, HELDOUT))
    assert len(calls) == 2 + 3  # two groups of four images a side
    assert [(r.name, r.value) for r in again[:-1]] == [(r.name, r.value) for r in whole[:-1]]
    costs, second = (by_name(records, None) for records in (again, attack.run(scene_of(target, MEMBERS, HELDOUT))))
    assert costs["seconds_per_image"].value == second["seconds_per_image"].value  # kept with each group
    assert costs["seconds_per_image"].n == costs["evaluations"].n == 16
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack.table(again))
    shown = console.export_text()
    assert "one image costs 36 denoiser calls, " in shown  # 4 completions of 8 steps and a loss
    assert "best" in shown.splitlines()[1]
    assert Path("results/images/inpainting.png").stat().st_size > 1000


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 4), ("heun", 4)])
def test_evaluations_are_the_calls_of_an_image(sampler: Any, steps: int) -> None:
    rows = []

    class Counting:
        prediction, denoiser = "eps", EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear"))

        def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            rows.append(len(x_t))
            return self.denoiser(x_t, t, condition)

    target = dataclasses.replace(Counting.denoiser.target(), denoiser=Counting())
    options = {**OPTIONS, "sampler": sampler, "num_steps": steps, "pictures": 0}
    found = by_name(Inpainting(**options).run(scene_of(target, MEMBERS, HELDOUT)), None)
    # all blocks are full: 4 images of 4 completions each
    assert found["evaluations"].value == sum(rows) / 16 == 4 * ((2 * steps - 1 if sampler == "heun" else steps) + 1)


def test_nothing_is_told_where_nobody_was_trained_on() -> None:
    target = gaussian_denoiser(torch.zeros(1, 8, 8), 0.5, DiffusionProcess("linear")).target()
    images = patterns(40, 5)
    options = {**OPTIONS, "num_inpaintings": 2, "kept": 1, "num_steps": 4, "pictures": 0}
    found = by_name(Inpainting(**options).run(scene_of(target, images[:20], images[20:])), "best")
    assert abs(found["z"].value) < 3
    assert found["auc"].low < 0.5 < found["auc"].high


def test_latents_are_completed_too(tmp_path: Path) -> None:
    target = load_target(save_pipeline(tmp_path))
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own = completions(target, images, 2, half="bottom")
    rows = torch.arange(4)
    drawn = own.complete(rows)
    known = target.codec.encode(to_float(images))[rows // 2]
    assert torch.equal(drawn[:, :, :4], known[:, :, :4])
    assert not torch.equal(drawn[0, :, 4:], drawn[1, :, 4:])
    assert torch.equal(own.pixels(drawn, rows)[:, :, :8], images[rows // 2][:, :, :8])


def test_what_cannot_be_completed_is_refused() -> None:
    for options, message in (
        ({"kept": 5}, r"kept must lie in 1 .. num_inpaintings, got 5 of 4"),
        ({"num_images": 1}, "num_images must be at least 2, got 1"),
        ({"block": 0}, "block must be at least 1 and pictures at least 0, got 0 and 6"),
    ):
        with pytest.raises(ValueError, match=message):
            Inpainting(**{**OPTIONS, **options})
    target = EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear")).target()
    with pytest.raises(ValueError, match=r"timestep must lie in \[0, 1000\), got 1000"):
        Inpainting(timestep=1000).identity(target, "x", Path("x"))
    with pytest.raises(ValueError, match="at least 2 members and 2 held-out images, got 8 and 1"):
        Inpainting(**OPTIONS).run(scene_of(target, MEMBERS, HELDOUT[:1]))
    target.num_classes = 3
    with pytest.raises(ValueError, match="conditioned on 3 classes, and each image is asked about under its own label"):
        Inpainting(**OPTIONS).run(scene_of(target, MEMBERS, HELDOUT))
