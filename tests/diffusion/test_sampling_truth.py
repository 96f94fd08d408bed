"""Each solver against densities whose denoiser and probability flow are known in closed form."""

import math

import pytest
import torch
from oracles import MixtureDenoiser, gaussian_denoiser, gaussian_flow

from lightning_mem.diffusion import DiffusionProcess, sample, sample_x0
from lightning_mem.diffusion.sampling import initial_noise
from lightning_mem.randomness import generator

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]
PREDICTIONS = ["eps", "v", "x0"]


def variant_name(options):
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_solver_reaches_the_gaussian(options, prediction):
    process = DiffusionProcess(prediction=prediction, clip_sample=False)
    denoiser = gaussian_denoiser(torch.full((1, 8, 8), 0.3), 0.4, process)
    drawn = sample_x0(denoiser, range(64), seed=0, num_steps=100, **options).double()
    n = drawn.numel()
    # 4096 independent values: four standard errors, and one percent for the solver's 100 steps
    assert drawn.mean().item() == pytest.approx(0.3, abs=4 * 0.4 / math.sqrt(n) + 0.004)
    assert drawn.var().item() == pytest.approx(0.16, abs=4 * 0.16 * math.sqrt(2 / n) + 0.0032)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_the_difference_of_two_scores_turns_one_model_into_the_other(options, prediction):
    process = DiffusionProcess("linear", prediction=prediction, clip_sample=False)
    image = torch.linspace(-0.8, 0.8, 16).reshape(1, 4, 4)
    wide, near_image = gaussian_denoiser(torch.zeros(1, 4, 4), 0.8, process), gaussian_denoiser(image, 0.2, process)

    def half(x_t, t, addresses):
        return (near_image.score(x_t, t) - wide.score(x_t, t)).float() / 2

    draw = {"seed": 0, "num_steps": 20, "block": 16, **options}
    guided = sample_x0(wide, range(16), guidance=[half, half], **draw)  # terms add
    # scores are float32; at alpha_bar = 4e-5 the image is the score times 160
    torch.testing.assert_close(guided, sample_x0(near_image, range(16), **draw), rtol=0, atol=1e-3)
    plain = sample_x0(wide, range(16), **draw)
    assert (guided - image).square().mean() < 0.2 * (plain - image).square().mean()


# Heun's last step, to sigma = 0, is an Euler step whose own error falls between 1/n and 1/n**2 on this grid
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpm++", 2), ("heun", 1.75)])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order):
    process = DiffusionProcess("linear", prediction="v", clip_sample=False)
    mean = torch.linspace(-0.6, 0.6, 16).reshape(1, 4, 4)
    denoiser = gaussian_denoiser(mean, 0.7, process)
    noise = initial_noise((1, 4, 4), [generator(0, "sample", i) for i in range(64)])
    errors = []
    for num_steps in (10, 20, 40):
        seen = []

        def first(x_t, t, addresses, seen=seen):
            seen.append((x_t.clone(), int(t[0])))
            return torch.zeros_like(x_t)

        drawn = sample_x0(denoiser, range(64), seed=0, num_steps=num_steps, sampler=sampler, guidance=[first])
        x_t, start = seen[0]
        # Heun and Euler start from noise of their own scale, sqrt(1 - alpha_bar) in ours
        torch.testing.assert_close(x_t, noise * x_t.norm() / noise.norm(), rtol=1e-5, atol=1e-6)
        errors.append((drawn - gaussian_flow(denoiser, x_t, start)).square().mean().sqrt().item())
    observed = math.log2(errors[0] / errors[2]) / 2
    # one order is a factor of 2 in the error for twice the steps; a quarter of an order for higher terms
    assert observed > order - 0.25, errors
    assert errors[2] < 0.1, errors


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_the_shares_of_a_mixture_are_sampled(options):
    process = DiffusionProcess(prediction="eps", clip_sample=False)
    means = torch.stack([torch.full((1, 2, 2), -0.6), torch.full((1, 2, 2), 0.6)])
    mixture = MixtureDenoiser(means, torch.tensor([0.05, 0.05]), process, torch.tensor([0.25, 0.75]))
    drawn = sample_x0(mixture, range(640), seed=0, num_steps=50, block=640, **options).flatten(1)
    upper = drawn.mean(1) > 0
    assert upper.double().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / 640) + 0.01)
    assert (drawn - torch.where(upper, 0.6, -0.6)[:, None]).abs().max() < 6 * 0.05


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_zero_terminal_signal_is_sampled_right_or_refused(options, prediction):
    process = DiffusionProcess("cosine", prediction=prediction, clip_sample=False, zero_terminal_snr=True)
    mean = 0.3

    class Gaussian:
        """E[x0|x_t] of N(0.3, 0.4**2), finite at alpha_bar = 0 where the mean is all there is."""

        def __init__(self):
            self.prediction = prediction

        def __call__(self, x_t, t, condition=None):
            alpha_bar = process.alpha_bar_at(t, x_t.double())
            gain = alpha_bar.sqrt() * 0.16 / (alpha_bar * 0.16 + 1 - alpha_bar)
            x0 = mean + gain * (x_t - alpha_bar.sqrt() * mean)
            return process.from_x0(x0, x_t.double(), t).to(x_t.dtype)

    target = gaussian_denoiser(torch.zeros(1, 8, 8), 1.0, process).target()
    target.denoiser = Gaussian()
    try:
        drawn = sample_x0(target, range(64), seed=0, num_steps=100, **options).double()
    except ValueError:
        assert options["sampler"] in ("heun", "euler")  # which divide by alpha_bar
        return
    n = drawn.numel()
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * 0.4 / math.sqrt(n) + 0.004)
    assert drawn.var().item() == pytest.approx(0.16, abs=4 * 0.16 * math.sqrt(2 / n) + 0.0032)


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
@pytest.mark.parametrize("num_steps", [2, 49, 50])
def test_every_number_of_steps_up_to_t_gives_images(options, num_steps):
    process = DiffusionProcess(num_timesteps=50, prediction="v")
    denoiser = gaussian_denoiser(torch.full((1, 4, 4), 0.3), 0.1, process)
    if options["sampler"] == "dpm++" and num_steps == 50:  # its spacing would visit a timestep twice: NaN in diffusers
        with pytest.raises(ValueError, match="choose fewer steps"):
            sample(denoiser, range(8), seed=0, num_steps=num_steps, block=8, **options)
        return
    images = sample(denoiser, range(8), seed=0, num_steps=num_steps, block=8, **options)
    # 0.3 is pixel 166, 0.1 is 13 levels
    assert (images.double() - 165.75).abs().max() < 6 * 12.75


def test_images_that_are_not_finite_are_refused():
    class Broken:
        prediction = "eps"

        def __call__(self, x_t, t, condition=None):
            return x_t / 0

    target = gaussian_denoiser(torch.zeros(1, 4, 4), 1.0, DiffusionProcess()).target()
    target.denoiser = Broken()
    with pytest.raises(ValueError, match="not finite"):
        sample(target, range(3), seed=0, num_steps=2)
