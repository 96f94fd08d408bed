"""One-step extraction: one image a label comes out at once, scores by hand, signs, company, processes, refusals."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import on_two
from rich.console import Console
from stable_diffusion import save_pipeline
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import OneStepExtraction, one_step_scores
from lightning_mem.attacks import one_step as one_step_module
from lightning_mem.attacks.one_step import edges, one_step
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Scene
from lightning_mem.modules import load_target
from lightning_mem.randomness import generator

IMAGES = patterns(4 + 4 * 12)
LABELS = torch.cat([torch.arange(4), torch.arange(4, 8).repeat_interleave(12)])
"""Labels 0 to 3 have one image each, 4 to 7 have twelve."""

MEMORIZED, OTHERS = ["0", "1", "2", "3"], ["4", "5", "6", "7"]


def labelled(prediction: str = "eps") -> Target:
    process = DiffusionProcess("linear", prediction=prediction)  # type: ignore[arg-type]
    return EmpiricalDenoiser(IMAGES, process, LABELS).target()


def noises(seed: int, count: int) -> Tensor:
    return torch.stack([torch.randn(1, 8, 8, generator=generator(seed, "one step", n)) for n in range(count)])


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_one_step_gives_the_only_image_of_a_label_and_the_posterior_mean_of_many(prediction: str) -> None:
    target = labelled(prediction)
    which, numbers = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 2])
    found, noise = one_step(target, ["2", "0", "5"], which, numbers, 999, 7, 8)
    only = IMAGES[[2, 2, 0]].double() / 127.5 - 1
    torch.testing.assert_close(found[:3].double(), only, atol=2e-4, rtol=0)
    assert torch.equal(noise, noises(7, 3)[[0, 1, 0, 2]])
    for t in (999, 300):
        found, noise = one_step(target, ["5"], torch.zeros(2).long(), torch.arange(2), t, 7, 2)
        alpha_bar = float(target.process.alpha_bar[t])
        group = (IMAGES[LABELS == 5].double() / 127.5 - 1).flatten(1)
        away = math.sqrt(1 - alpha_bar) * noise.double().flatten(1)[:, None] - math.sqrt(alpha_bar) * group
        mean = (-away.square().sum(2) / (2 * (1 - alpha_bar))).softmax(1) @ group
        torch.testing.assert_close(found.double().flatten(1), mean, atol=2e-4, rtol=0)


def test_scores_are_those_of_the_definition_for_any_company_and_block() -> None:
    target = labelled()
    found = one_step_scores(target, ["1", "4"], num_generations=3, seed=5)
    image, noise = IMAGES[1].double(), noises(5, 3).double()
    assert float(found["white_box"][0]) == pytest.approx(float((image / 127.5 - 1 - noise).square().mean()), rel=1e-4)
    strength = [
        math.sqrt(((image[0, y, x + 1] - image[0, y, x]) ** 2 + (image[0, y + 1, x] - image[0, y, x]) ** 2) / 2) / 255
        for y in range(7)
        for x in range(7)
    ]
    assert float(found["black_box"][0]) == pytest.approx(sum(strength) / 49, rel=1e-5)
    alone = one_step_scores(target, ["4"], num_generations=3, seed=5, block=2)
    many = one_step_scores(target, ["0", "7", "4", "2", "1"], num_generations=3, seed=5, block=4)
    for word, own in found.items():
        torch.testing.assert_close(alone[word][0], own[1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(many[word][[4, 2]], own, atol=1e-6, rtol=1e-5)


def test_two_processes_give_the_scores_of_one() -> None:
    scene = scene_of(labelled(), patterns(2), patterns(2, 1))
    prompts = ["1", "4", "6"]

    def work(own: Scene) -> dict[str, Tensor]:
        return one_step_scores(own.target, prompts, num_generations=3, block=4, workers=own.workers)

    alone = one_step_scores(scene.target, prompts, num_generations=3, block=4)
    for found in on_two(scene, work):
        assert all(torch.equal(found[word], own) for word, own in alone.items())


def test_edges_that_only_some_noises_show_do_not_count() -> None:
    step = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    step[0, :, :, 2:] = 255
    step[1, :, 2:] = 255
    found = edges(step)
    assert found[0, :, 1].tolist() == pytest.approx([math.sqrt(0.5)] * 3)
    assert float(found.amin(0).sum()) == pytest.approx(math.sqrt(0.5))  # where the two cross
    assert float(found[0].sum()) == pytest.approx(3 * math.sqrt(0.5))


def test_memorized_labels_score_higher_and_what_it_costs_is_told() -> None:
    target = labelled()
    rows: list[int] = []
    original = target.denoiser

    class Counting:
        prediction = original.prediction

        def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            rows.append(len(x_t))
            return original(x_t, t, condition)

    target.denoiser = Counting()
    attack = OneStepExtraction(MEMORIZED, OTHERS, num_generations=4, cfg_weight=None, sample_seed=1, block=16)
    scene = scene_of(target, patterns(2), patterns(2, 1))
    assert attack.identity(target, "x", Path("x"))
    records = attack.run(scene)
    assert len({record.identity for record in records}) == len(records)
    for statistic in ("white_box", "black_box"):
        own = [r for r in records if r.definition.get("statistic") == statistic]
        found = {r.name.removeprefix("attack/one_step/"): r for r in own}
        assert set(found) == {"score", "score_heldout", "auc", "tpr_at_0.01", "tpr_at_0.001"}
        assert found["auc"].value == found["tpr_at_0.01"].value == 1
        assert (found["score"].value or 0) > (found["score_heldout"].value or 1)
        assert found["auc"].definition["timestep"] == 999
    costs = {r.name.removeprefix("attack/one_step/"): r for r in records if "statistic" not in r.definition}
    assert costs["evaluations"].value == sum(rows) / 32 == 1
    assert 0 < (costs["seconds_per_image"].value or 0) <= costs["seconds_per_image"].seconds / 32
    lines = list(csv.DictReader(Path("results/tables/one_step.csv").read_text().splitlines()))
    assert [line["prompts"] for line in lines] == ["members"] * 4 + ["heldout"] * 4
    assert Path("results/images/one_step.png").stat().st_size > 1000
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack.table(records))
    assert "one generation costs 1 denoiser calls, " in console.export_text()


def test_prompts_of_a_text_to_image_model_are_scored_under_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_step_module, "draw_detection", lambda *_: None)
    target = load_target(save_pipeline(tmp_path))
    attack = OneStepExtraction(["a", "b"], ["c"], num_generations=2, block=4)
    records = attack.run(scene_of(target, patterns(2), patterns(2, 1)))
    found = {r.name.removeprefix("attack/one_step/"): r for r in records}
    assert found["evaluations"].value == 2
    assert "auc" not in found  # one held-out prompt alone
    assert found["score"].n == 2


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="num_generations must be at least 2 and block at least 1, got 1 and 64"):
        OneStepExtraction(["0"], num_generations=1)
    with pytest.raises(ValueError, match=r"timestep must lie in \[0, 1000\) or be null for the last one, got 1000"):
        OneStepExtraction(["0"], cfg_weight=None, timestep=1000).identity(labelled(), "x", Path("x"))
    with pytest.raises(ValueError, match="labels from 0 to 7, got '8'"):
        OneStepExtraction(["8"], cfg_weight=None).identity(labelled(), "x", Path("x"))
    with pytest.raises(ValueError, match="cfg_weight 7.5 needs a text-to-image model"):
        OneStepExtraction(["0"]).identity(labelled(), "x", Path("x"))
    settings: list[dict[str, Any]] = [{}, {"timestep": 500}, {"num_generations": 3}, {"sample_seed": 4}]
    digests = {
        OneStepExtraction(["0"], cfg_weight=None, **own).identity(labelled(), "x", Path("x")) for own in settings
    }
    assert len(digests) == 4
