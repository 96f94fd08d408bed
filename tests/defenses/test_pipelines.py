"""Protection inside diffusers' own pipelines, against our sampler and against their loop written by hand."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from lightning_mem.defenses import CPSample, protected_pipeline
from lightning_mem.diffusion import DiffusionProcess, Target, sample_x0
from lightning_mem.networks import TextDenoiser, UNetConfig, UNetDenoiser, build_unet
from lightning_mem.networks.text import STATES
from lightning_mem.randomness import generator


class BitNetwork:
    """A random-label classifier of images of some shape, never trained, that is sure of much."""

    num_classes = 2
    digest = "bits"

    def __init__(self, shape: tuple[int, int, int], process: DiffusionProcess) -> None:
        self.shape, self.process = shape, process
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.module = nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.LazyLinear(2))
            self.module(torch.zeros(1, *shape))
        self.seen: list[tuple[int, int]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.seen.append((len(x_t), int(t[0])))
        return 30 * self.module(x_t)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_ddim_pipeline_gives_the_samples_of_our_own_sampler(eta: float) -> None:
    process = DiffusionProcess("linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(UNetConfig((8,), norm_num_groups=4, mid_attention=False), image_size=8, channels=1).eval()
    target = Target(UNetDenoiser(unet, "eps"), process, (1, 8, 8))
    pipeline = DDIMPipeline(unet, process.scheduler("ddim", 4))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        noise = [generator(0, "sample", i) for i in range(4)]
        given = {"generator": noise, "num_inference_steps": 4, "eta": eta, "output_type": "pt"}
        return pipeline(batch_size=4, **given).images

    plain = draw()
    for tol in (0.5, 0.2):
        term = CPSample(BitNetwork((1, 8, 8), process), tol, 3.0)
        with protected_pipeline(pipeline, [term]):
            found = draw()
        assert 0 < term.gradients <= term.evaluations == 16
        expected = sample_x0(target, range(4), seed=0, num_steps=4, eta=eta, guidance=[term], block=4)
        torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
        assert (found - plain).abs().max() > 0.05
    assert len(term.certificates(range(4)).gate_rate) == 4
    with protected_pipeline(pipeline, [CPSample(BitNetwork((1, 8, 8), process), 0.5, 0.0)]):
        assert torch.equal(draw(), plain)
    assert torch.equal(draw(), plain)  # as it was


def stable_diffusion(scheduler: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), norm_num_groups=4,
            cross_attention_dim=8, attention_head_dim=4,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2)
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_latents_are_protected_once_after_classifier_free_guidance(prediction: str) -> None:
    schedule = {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": prediction,
        "steps_offset": 1,
    }
    pipeline = stable_diffusion(DDIMScheduler(**schedule))
    process = DiffusionProcess.from_config({"_class_name": "DDIMScheduler", **pipeline.scheduler.config})
    draw = torch.Generator().manual_seed(0)
    prompt, empty = torch.randn(2, 2, 3, 8, generator=draw)
    start = torch.randn(2, 4, 8, 8, generator=draw)
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": empty, "latents": start, "output_type": "latent"}

    def latents() -> Tensor:
        return pipeline(guidance_scale=4.0, num_inference_steps=3, eta=0.0, **given).images

    plain, classifier = latents(), BitNetwork((4, 8, 8), process)
    term = CPSample(classifier, 0.5, 2.0)
    with protected_pipeline(pipeline, [term], addresses=[5, 9]):
        found = latents()
    assert classifier.seen == [(2, t) for t in (667, 334, 1)]  # two images, not four rows
    assert term.certificates([5, 9]).gate_rate.tolist() == [1, 1]
    x, scheduler = start, DDIMScheduler(**schedule)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            t = torch.full((2,), int(timestep))
            one, other = (pipeline.unet(x, timestep, states).sample for states in (empty, prompt))
            output = one + 4.0 * (other - one)
            score = term(x, t, torch.arange(2))
            assert score is not None
            x = scheduler.step(process.add_score(output, score, x, t), timestep, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 * float(x.abs().max()))
    assert (found - plain).abs().max() > 0.1
    assert torch.equal(latents(), plain)


def test_our_own_sampler_protects_once_after_classifier_free_guidance_too() -> None:
    schedule = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1).config
    process = DiffusionProcess.from_config({"_class_name": "DDIMScheduler", **schedule})
    pipeline = stable_diffusion(process.scheduler("ddim", 3))
    prompt, empty = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 8)
    target = Target(TextDenoiser(pipeline.unet, "eps", {STATES: empty}, 4.0), process, (4, 8, 8))
    draw: dict[str, Any] = {"seed": 0, "num_steps": 3, "block": 2, "condition": {STATES: prompt}}
    classifier = BitNetwork((4, 8, 8), process)
    found = sample_x0(target, range(2), guidance=[CPSample(classifier, 0.5, 2.0)], **draw)
    assert {rows for rows, _ in classifier.seen} == {2}
    start = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "sample", i)) for i in range(2)])
    with protected_pipeline(pipeline, [CPSample(classifier, 0.5, 2.0)]):
        expected = pipeline(
            prompt_embeds=prompt, negative_prompt_embeds=empty.expand(2, -1, -1), latents=start, output_type="latent",
            guidance_scale=4.0, num_inference_steps=3, eta=0.0,
        ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (found - sample_x0(target, range(2), **draw)).abs().max() > 0.1


def test_other_schedulers_work_where_they_visit_training_timesteps() -> None:
    schedule = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}
    embeds = {"prompt_embeds": torch.zeros(1, 3, 8), "negative_prompt_embeds": torch.zeros(1, 3, 8)}
    given = {**embeds, "latents": torch.ones(1, 4, 8, 8), "output_type": "latent", "num_inference_steps": 4}
    for scheduler in (PNDMScheduler(skip_prk_steps=True, **schedule), EulerDiscreteScheduler(**schedule)):
        pipeline = stable_diffusion(scheduler)
        process = DiffusionProcess.from_config({"_class_name": "DDIMScheduler", **pipeline.scheduler.config})
        classifier = BitNetwork((4, 8, 8), process)
        with protected_pipeline(pipeline, [CPSample(classifier, 0.5, 2.0)]):
            pipeline(**given)
        assert {t for _, t in classifier.seen} <= {999, 749, 499, 249}
    fractional = stable_diffusion(EulerDiscreteScheduler(**{**schedule, "timestep_spacing": "linspace"}))
    term = CPSample(classifier, 0.5, 2.0)
    with protected_pipeline(fractional, [term]), pytest.raises(ValueError, match="fractional timestep 749.25"):
        fractional(**{**given, "num_inference_steps": 5})
    with (
        protected_pipeline(fractional, [term], addresses=[1, 2]),
        pytest.raises(ValueError, match="each of the 1 images of a call, got 2"),
    ):
        fractional(**{**given, "num_inference_steps": 1})
    other = CPSample(BitNetwork((4, 8, 8), DiffusionProcess("cosine")))
    with pytest.raises(ValueError, match="another noising process"), protected_pipeline(fractional, [other]):
        pass
