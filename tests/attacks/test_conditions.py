"""Conditional models are asked about each image under its own label or caption, and about no other image's."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_diffusion import tiny_pipeline
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import (
    PFAMI,
    PIA,
    AbstractMembership,
    Audit,
    FlowLikelihood,
    GradientNorm,
    Inpainting,
    LossAttack,
    Memberships,
    NoiseNorm,
    PromptedExtraction,
    SecMI,
    SimA,
)
from lightning_mem.attacks.completions import Completions
from lightning_mem.attacks.conditions import Conditions, conditions_of
from lightning_mem.attacks.query import Query
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Reference, Scene, Workers
from lightning_mem.modules import DenoiserModule
from lightning_mem.networks import PromptEncoder, TextDenoiser, UNetConfig
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

MEMBERS, HELDOUT = patterns(6), patterns(5, 1)
LABELS = torch.tensor([0, 2, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1, 1])
CAPTIONS = ["a cat", "a dog", "a hat", "a log", "a cow", "an elk"], ["red", "blue", "pink", "grey", "teal"]
EVERY = [LossAttack, SecMI, PIA, GradientNorm, SimA, partial(PFAMI, [0.8], None), partial(FlowLikelihood, 3)]


def scene(target: Target, labels: Any = LABELS, captions: Any = CAPTIONS) -> Scene:
    reference = replace(Reference.from_images(MEMBERS, HELDOUT), labels=labels, captions=lambda: captions)
    return replace(scene_of(target, MEMBERS, HELDOUT), read=lambda: reference)


class Noting:
    """A denoiser whose answer is its condition, and which notes what it was asked under."""

    prediction = "eps"

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        value = condition["words"] if isinstance(condition, Mapping) else condition
        assert value is not None
        self.asked.append(value)
        return (1 + t.reshape(-1, 1, 1, 1)) / 100 * value.reshape(-1, 1, 1, 1).float()


def noting(classes: int | None) -> Target:
    def conditioner(prompts: Any) -> dict[str, Tensor]:
        return {"words": torch.tensor([float(len(prompt)) for prompt in prompts])}

    process = DiffusionProcess("linear", num_timesteps=300)
    return Target(Noting(), process, (1, 8, 8), classes, digest="x", conditioner=None if classes else conditioner)


def network() -> Target:
    """An untrained class-conditional UNet whose answer depends on the label."""
    torch.manual_seed(0)
    module = DenoiserModule(
        num_classes=3, network=UNetConfig((8,), norm_num_groups=4, mid_attention=False),
        process=DiffusionProcess("linear", num_timesteps=300),
    )  # fmt: skip
    for value in module.unet.parameters():  # its last layer starts at zero
        value.data += 0.1 * torch.randn_like(value)
    return module.eval().target()


def errors(attack: AbstractMembership, target: Target, conditions: Conditions, side: str = "members") -> Tensor:
    attack.conditions = conditions
    images = {"members": MEMBERS, "heldout": HELDOUT}[side]
    return attack.side_errors(target, images, {"none": ()}, side, Workers())["none"]


@pytest.mark.parametrize("attack", EVERY)
def test_an_image_is_asked_about_under_its_own_label_whatever_the_others_have(attack: Any) -> None:
    target = network()
    conditions = conditions_of(target, scene(target).reference())
    assert conditions.definition == {"condition": "label"}
    given: dict[str, Any] = {"timesteps": [20], "noise_seed": 0}
    own = errors(attack(**given), target, conditions)
    alike = errors(attack(**given), target, Conditions("label", {"members": torch.full((6,), 2)}))
    rows = LABELS[0] == 2
    torch.testing.assert_close(own[rows], alike[rows], rtol=1e-5, atol=0)
    assert ((own[~rows] / alike[~rows] - 1).abs() > 1e-4).all()


@pytest.mark.parametrize("attack", [LossAttack, SecMI, PIA, SimA])
def test_an_image_is_asked_about_under_its_own_caption_at_every_call(attack: Any) -> None:
    target = noting(None)
    made = attack(noise_seed=0)
    made.run(scene(target))
    lengths = [torch.tensor([float(len(caption)) for caption in side]) for side in CAPTIONS]
    asked = target.denoiser.asked  # type: ignore[attr-defined]
    assert len(asked) == 2 * sum(made.evaluations(t) for t in made.times)
    for number, found in enumerate(asked):
        side = lengths[0 if number < len(asked) // 2 else 1]
        torch.testing.assert_close(found, side[torch.arange(64).clamp(max=len(side) - 1)])


def test_the_loss_is_that_of_the_definition_under_the_label() -> None:
    target = noting(3)
    found = errors(LossAttack(timesteps=[20], noise_seed=7), target, Conditions("label", {"members": LABELS[0]}))

    for row in range(6):
        eps = torch.randn((1, 8, 8), generator=generator(7, "loss", "members", row, 20, 0)).double()
        assert float(found[row, 0]) == pytest.approx(float((eps - 0.21 * LABELS[0][row]).square().mean()), rel=1e-5)


def test_completions_are_drawn_and_judged_under_the_label_of_their_image() -> None:
    target, rows = noting(3), torch.tensor([4, 1, 3])
    asked = Conditions("label", {"members": LABELS[0]}).part("members", rows).of(target, "members")
    drawing = {"num_steps": 2, "sampler": "ddim", "eta": 0.0, "block": 8}
    completions = Completions(target, MEMBERS[rows], "right", 2, 20, 0, "members", drawing, "cpu", asked)
    completions.scores(torch.arange(6))
    found = target.denoiser.asked  # type: ignore[attr-defined]
    assert len(found) == 3
    assert all(labels[:6].tolist() == [0, 0, 2, 2, 2, 2] for labels in found)


def test_the_inpainting_attack_asks_under_the_labels_of_the_images_it_drew() -> None:
    target, each = noting(11), (torch.arange(6), torch.arange(6, 11))
    attack = Inpainting(num_images=2, num_inpaintings=2, kept=1, num_steps=2, sample_seed=0, timestep=20, block=8)
    records = attack.run(scene(target, labels=each))
    assert {record.definition["condition"] for record in records} == {"label"}
    lines = [line.split(",") for line in Path("results/tables/inpainting.csv").read_text().splitlines()[1:]]
    drawn = {int(row) + (6 if side == "heldout" else 0) for side, row, *_ in lines}
    assert set(torch.cat(target.denoiser.asked).tolist()) == drawn  # type: ignore[attr-defined]
    assert len(drawn) == 4


def test_the_records_say_what_was_asked_under_and_of_an_unconditional_model_nothing() -> None:
    target = noting(None)
    target.denoiser = EmpiricalDenoiser(MEMBERS, target.process)
    for attack, kind in (
        (LossAttack(noise_seed=0), "caption"), (LossAttack(noise_seed=0, condition="empty"), "empty"),
        (Memberships([LossAttack(noise_seed=0)]), "caption"),
    ):  # fmt: skip
        assert {record.definition["condition"] for record in attack.run(scene(target))} == {kind}
    plain = EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear")).target()
    assert all("condition" not in record.definition for record in LossAttack(noise_seed=0).run(scene(plain)))
    records = LossAttack(noise_seed=0).run(scene(target, captions=None))
    assert {record.definition["condition"] for record in records} == {"empty"}


def test_captions_and_rule_decide_the_folder_of_the_results() -> None:
    target, found = noting(None), set()
    for attack in (LossAttack, Inpainting):
        for rule, captions in ((None, CAPTIONS), (None, CAPTIONS[::-1]), (None, None), ("empty", CAPTIONS)):
            made = attack(condition=rule)
            made.prepare(target, lambda captions=captions: captions)
            found.add(made.identity(target, "x", Path("x")))
    assert len(found) == 8


def test_prompts_are_the_captions_of_the_data_each_once() -> None:
    captions = ["a", "b", "a"], ["c", "b", "c"]
    for attack in (PromptedExtraction(cfg_weight=None), NoiseNorm()):
        Audit([attack]).prepare(noting(None), lambda: captions)
        assert attack.prompts == {"members": ["a", "b"], "heldout": ["c"]}
    labels = PromptedExtraction(cfg_weight=None)
    labels.prepare(noting(3), lambda: captions)
    assert labels.prompts == {"members": ["0", "1", "2"], "heldout": []}
    given = NoiseNorm(["x"], ["y"])
    given.prepare(noting(None), lambda: captions)
    assert given.prompts == {"members": ["x"], "heldout": ["y"]}


def test_missing_captions_are_found_before_anything_is_drawn() -> None:
    target = noting(None)
    for attack in (LossAttack(condition="caption"), Inpainting(condition="caption")):
        with pytest.raises(ValueError, match="condition caption needs captions, and the source of the data has none"):
            Audit([attack]).prepare(target, lambda: None)
    for prompted in (PromptedExtraction(cfg_weight=None), NoiseNorm()):
        with pytest.raises(ValueError, match="prompts null takes the captions of the data, and its source has none"):
            Audit([prompted]).prepare(target, lambda: None)
    with pytest.raises(ValueError, match=r"leave heldout_prompts null too, or give prompts; got heldout_prompts \['a"):
        NoiseNorm(None, ["a"])


def test_a_target_that_lacks_a_piece_is_refused_by_it() -> None:
    unet = tiny_pipeline().unet
    process = DiffusionProcess("linear")
    no_text = Target(TextDenoiser(unet, "eps"), process, (4, 8, 8), digest="x")
    for attack in (*(kind() for kind in EVERY), Inpainting()):
        with pytest.raises(ValueError, match="text-to-image model without tokenizer and text encoder"):
            attack.identity(no_text, "x", Path("x"))
    plain = EmpiricalDenoiser(MEMBERS, process).target()
    with pytest.raises(ValueError, match="condition caption is for text-to-image models, and the target is uncondit"):
        LossAttack(condition="caption").identity(plain, "x", Path("x"))
    with pytest.raises(ValueError, match="condition empty .* target is conditioned on 3 classes"):
        PIA(condition="empty").identity(noting(3), "x", Path("x"))
    with pytest.raises(ValueError, match="condition must be caption, empty or null, got 'label'"):
        SecMI(condition="label").identity(plain, "x", Path("x"))  # type: ignore[arg-type]


def test_images_without_labels_of_the_model_are_refused() -> None:
    target = noting(3)
    with pytest.raises(ValueError, match=r"3 classes, .* the data have none: set data.labels to true .* to 3"):
        LossAttack().run(scene(target, labels=None))
    with pytest.raises(ValueError, match=r"lie in \[0, 3\), but those of the heldout images go from 0 to 3"):
        LossAttack().run(scene(target, labels=(LABELS[0], LABELS[1] + (LABELS[1] == 2))))


def test_a_gradient_norm_under_captions_is_that_of_every_image_alone() -> None:
    pipeline = tiny_pipeline()
    conditioner = PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)
    denoiser = TextDenoiser(pipeline.unet.eval(), "eps", conditioner([""]))
    target = Target(denoiser, DiffusionProcess("linear"), (4, 8, 8), digest="x", conditioner=conditioner)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8), dtype=np.uint8))
    asked = Conditions("caption", {"members": ["a", "b", "c"]}).of(target, "members")
    query, rows = Query(target, condition=asked), torch.arange(3)
    found = GradientNorm(noise_seed=0).norms(query, to_float(images), rows, 100, "members")

    for row, prompt in enumerate("abc"):
        eps = torch.randn(target.shape, generator=generator(0, "loss", "members", row, 100, 0))[None]
        t = torch.tensor([100])
        x_t = target.process.add_noise(to_float(images[row : row + 1]), eps, t)
        pipeline.unet.requires_grad_(True).zero_grad()
        (pipeline.unet(x_t, t, **conditioner([prompt])).sample - eps).square().mean().backward()
        gradients = [value.grad for value in pipeline.unet.parameters() if value.grad is not None]
        norm = float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())
        assert float(found[row]) == pytest.approx(norm, rel=1e-4)
