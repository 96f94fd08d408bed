"""Noise norms: against another library's guided sampling by hand, company, signs, records and refusals."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from stable_diffusion import save_pipeline, tiny_pipeline
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import NoiseNorm, noise_norm, noise_norms
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.modules import load_target
from lightning_mem.randomness import derive_seed, generator


@pytest.fixture(scope="module")
def text_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_pipeline(tmp_path_factory.mktemp("pipeline")))


@torch.no_grad()
def test_norms_are_those_of_diffusers_networks_along_its_own_guided_sampling(text_target: Target) -> None:
    found = noise_norms(text_target, ["a", "b c"], num_generations=2, cfg_weight=3.0, num_steps=3, seed=5, block=4)
    assert found.shape == (2, 2, 3)
    pipeline = tiny_pipeline()
    for row, prompt in enumerate(["a", "b c"]):
        states = pipeline.encode_prompt(prompt, "cpu", 1, True)
        for number in range(2):
            address = (derive_seed(5, "noise norm", prompt) >> 16) + number
            x = torch.randn(4, 8, 8, generator=generator(5, "sample", address))[None]
            pipeline.scheduler.set_timesteps(3)
            for step, t in enumerate(pipeline.scheduler.timesteps):
                given, without = (pipeline.unet(x, t, own).sample for own in states)
                assert float(found[row, number, step]) == pytest.approx(float((given - without).norm()), rel=1e-3)
                x = pipeline.scheduler.step(without + 3.0 * (given - without), t, x).prev_sample


def test_a_prompts_norms_do_not_depend_on_the_others(text_target: Target) -> None:
    options: dict[str, Any] = {"num_generations": 2, "num_steps": 2, "block": 8}
    few = noise_norms(text_target, ["b"], **options)
    many = noise_norms(text_target, ["a", "c", "b", "d"], **options)
    assert torch.equal(few[0], many[2])
    assert (many[2] != many[0]).all()


class Listening:
    """Predicts noise that the prompt moves by as much as its number says, in all pixels; in eps or v."""

    def __init__(self, prediction: str) -> None:
        self.prediction, self.empty = prediction, {"by": torch.zeros(1)}
        self.process = DiffusionProcess("linear", prediction=prediction)  # type: ignore[arg-type]

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        by = torch.zeros(len(x_t)) if condition is None else condition["by"]
        eps = 0.1 * x_t + by.reshape(-1, 1, 1, 1)
        alpha_bar = self.process.alpha_bar_at(t, x_t)
        x0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return eps if self.prediction == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def listening(prediction: str = "eps") -> Target:
    denoiser = Listening(prediction)
    return Target(
        denoiser, denoiser.process, (1, 8, 8), digest="listening",  # type: ignore[arg-type]
        conditioner=lambda prompts: {"by": torch.tensor([float(prompt) for prompt in prompts])},
    )  # fmt: skip


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_norm_is_in_noise_whatever_the_network_predicts_and_before_the_weight(prediction: str) -> None:
    found = noise_norms(listening(prediction), ["0", "0.25", "1"], num_generations=1, num_steps=3, cfg_weight=7.5)
    torch.testing.assert_close(
        found[:, 0], torch.tensor([[0.0], [2.0], [8.0]]).double().expand(3, 3), atol=2e-4, rtol=1e-3
    )


def test_prompts_that_move_more_are_called_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_norm, "draw_detection", lambda *_: None)
    attack = NoiseNorm(["0.9", "0.8", "0.2"], ["0.1", "0.3", "-0.05", "0"], num_generations=2, num_steps=2)
    scene = scene_of(listening(), patterns(2), patterns(2, 1))
    assert attack.identity(scene.target, "x", Path("x"))
    records = attack.run(scene)
    assert len({record.identity for record in records}) == len(records)
    for statistic in ("mean", "first_step"):
        found = {
            r.name.removeprefix("attack/noise_norm/"): r for r in records if r.definition["statistic"] == statistic
        }
        timed = {"seconds_per_image"} if statistic == "mean" else set()
        assert set(found) == {"norm", "norm_heldout", "auc", "tpr_at_0.01", "tpr_at_0.001", "evaluations", *timed}
        assert found["evaluations"].value == (4 if statistic == "mean" else 2)  # with the prompt and without, a step
        assert found["evaluations"].n == 14
        assert found["auc"].value == pytest.approx(11 / 12)
        assert found["tpr_at_0.01"].value == pytest.approx(2 / 3)
        assert found["norm"].value == pytest.approx(8 * 1.9 / 3, rel=1e-3)
        assert found["norm_heldout"].value == pytest.approx(8 * 0.45 / 4, rel=1e-3)
    rows = list(csv.DictReader(Path("results/tables/noise_norms.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == ["0.9", "0.8", "0.3", "0.2", "0.1", "-0.05", "0"]
    assert [row["prompts"] for row in rows[:3]] == ["members", "members", "heldout"]
    assert float(rows[0]["call_1"]) == pytest.approx(7.2, rel=1e-3)
    alone = NoiseNorm(["0.9", "0.8"], num_steps=2).run(scene)
    names = {record.name.removeprefix("attack/noise_norm/") for record in alone}
    assert names == {"norm", "evaluations", "seconds_per_image"}


def test_evaluations_are_counted_and_shown_beside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = Listening.__call__

    def call(self: Listening, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        rows.append(len(x_t))
        return original(self, x_t, t, condition)

    monkeypatch.setattr(Listening, "__call__", call)
    attack = NoiseNorm(["0.9", "0.8"], ["0.1", "0.3"], num_generations=2, num_steps=3, sampler="heun", block=4)
    records = attack.run(scene_of(listening(), patterns(2), patterns(2, 1)))
    found = {r.name.removeprefix("attack/noise_norm/"): r for r in records if r.definition["statistic"] == "mean"}
    assert found["evaluations"].value == sum(rows) / 8 == 2 * (2 * 3 - 1)
    each = found["seconds_per_image"]
    assert 0 < (each.value or 0) <= each.seconds / 8
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack.table(records))
    shown = console.export_text().splitlines()
    assert next(line.split() for line in shown if "evaluations" in line) == ["evaluations", "10", "2"]
    assert len(next(line.split() for line in shown if "seconds" in line)) == 2
    assert Path("results/images/noise_norms.png").stat().st_size > 1000


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(ValueError, match="num_generations and block must be at least 1, got 0"):
        NoiseNorm(["a"], num_generations=0)
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        NoiseNorm([])
    with pytest.raises(ValueError, match="1 prompts are in prompts and in heldout_prompts, such as 'a'"):
        NoiseNorm(["a"], ["a"])
    target = listening()
    target.denoiser.empty = None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="needs a text-to-image model with its text encoder"):
        NoiseNorm(["a"]).identity(target, "x", Path("x"))
