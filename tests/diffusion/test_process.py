import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from oracles import MixtureDenoiser, gaussian_denoiser

from lightning_mem.diffusion import DiffusionProcess

PREDICTIONS = ["eps", "v", "x0"]
SAMPLERS = ["ddim", "ddpm", "dpm++", "heun", "euler"]
DISCRETE = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def saved(scheduler):
    """What ``scheduler_config.json`` holds."""
    return json.loads(scheduler.to_json_string())


def rows(seed=0, n=12, shape=(3, 4, 4)):
    draw = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, n, *shape, generator=draw, dtype=torch.float64)
    return x0, eps, torch.randint(1000, (n,), generator=draw)


@pytest.mark.parametrize("theirs", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_noising_and_velocity_are_those_of_diffusers(theirs, schedule):
    name = "squaredcos_cap_v2" if schedule == "cosine" else schedule
    reference = theirs(beta_schedule=name, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    process = DiffusionProcess(schedule, prediction="v")
    assert torch.equal(process.alpha_bar, reference.alphas_cumprod.double())
    x0, eps, t = rows()
    x0, eps = x0.float(), eps.float()
    bound = 8 * torch.finfo(torch.float32).eps * 4  # a handful of roundings of numbers below 4
    torch.testing.assert_close(process.add_noise(x0, eps, t), reference.add_noise(x0, eps, t), rtol=0, atol=bound)
    velocity = reference.get_velocity(x0, eps, t)
    torch.testing.assert_close(process.training_target(x0, eps, t), velocity, rtol=0, atol=bound)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_the_image_and_the_noise(prediction):
    process = DiffusionProcess("linear", prediction=prediction)
    x0, eps, t = rows()
    x_t = process.add_noise(x0, eps, t)
    output = process.training_target(x0, eps, t)
    # dividing by sqrt(alpha_bar) >= 6e-3 or sqrt(1 - alpha_bar) >= 1e-2 magnifies roundings of 2e-16
    torch.testing.assert_close(process.to_x0(output, x_t, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.to_eps(output, x_t, t), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.from_x0(x0, x_t, t), output, rtol=0, atol=1e-12)


def test_score_is_the_gradient_of_the_log_density():
    process = DiffusionProcess("linear", prediction="eps")
    x0, eps, t = rows(shape=(1, 2, 2))
    means = torch.stack([torch.full((1, 2, 2), -0.5), torch.full((1, 2, 2), 0.7)])
    mixture = MixtureDenoiser(means, torch.tensor([0.3, 0.1]), process, torch.tensor([0.3, 0.7]))
    x_t = process.add_noise(x0, eps, t).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, t).sum(), x_t)
    for prediction in PREDICTIONS:
        mixture.prediction = prediction
        score = process.to_score(mixture(x_t, t), x_t, t, prediction)
        torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_added_score_term_is_what_the_score_grows_by(prediction):
    process = DiffusionProcess("linear", prediction=prediction)
    x_t, output, t = rows(seed=1)
    term = rows(seed=2)[0]
    grown = process.to_score(process.add_score(output, term, x_t, t), x_t, t) - process.to_score(output, x_t, t)
    torch.testing.assert_close(grown, term, rtol=0, atol=1e-8)  # x0 at t = 0 divides by 1 - alpha_bar = 1e-4


def test_an_added_score_term_means_the_same_image_in_every_prediction():
    process = DiffusionProcess("linear")
    x0, eps, t = rows()
    x_t, term = process.add_noise(x0, eps, t), rows(seed=2)[0]
    alpha_bar = process.alpha_bar[t].reshape(-1, 1, 1, 1)
    tweedie = x0 + (1 - alpha_bar) / alpha_bar.sqrt() * term  # E[x0|x_t] = (x_t + (1 - alpha_bar) score) / sqrt(...)
    for prediction in PREDICTIONS:
        output = DiffusionProcess("linear", prediction=prediction).training_target(x0, eps, t)
        moved = process.to_x0(process.add_score(output, term, x_t, t, prediction), x_t, t, prediction)
        torch.testing.assert_close(moved, tweedie, rtol=1e-9, atol=1e-9)


def test_zero_terminal_signal_is_refused_where_it_determines_nothing():
    with pytest.raises(ValueError, match=re.escape("t = [999]")):
        DiffusionProcess("linear", prediction="eps", zero_terminal_snr=True)
    x0, eps, _ = rows(n=2)
    for prediction in ("v", "x0"):
        process = DiffusionProcess("linear", prediction=prediction, zero_terminal_snr=True)
        assert process.alpha_bar[-1] == 0
        last, before = torch.tensor([3, 999]), torch.tensor([3, 998])
        x_t = process.add_noise(x0, eps, last)
        assert torch.equal(x_t[1], eps[1])
        output = process.training_target(x0, eps, last)
        torch.testing.assert_close(process.to_x0(output, x_t, last), x0, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match=re.escape("t = [999]: a score term is infinite")):
            process.add_score(output, eps, x_t, last)
        with pytest.raises(ValueError, match=re.escape("t = [999]: eps does not determine")):
            process.to_x0(eps, x_t, last, "eps")
        assert torch.isfinite(process.add_score(output, eps, x_t, before)).all()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (saved(diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler is flow matching"),
        (saved(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")), "flow"),
        (saved(diffusers.EDMEulerScheduler()), "EDMEulerScheduler is continuous time"),
        (saved(diffusers.EDMDPMSolverMultistepScheduler()), "continuous time"),
        (saved(diffusers.CMStochasticIterativeScheduler()), "continuous time"),
        (  # Stable Video Diffusion's
            saved(
                EulerDiscreteScheduler(
                    timestep_type="continuous",
                    prediction_type="v_prediction",
                    use_karras_sigmas=True,
                    sigma_min=0.002,
                    sigma_max=700.0,
                )
            ),
            "continuous time",
        ),
        ({"_class_name": "ScoreSdeVpScheduler", "num_train_timesteps": 2000}, "ScoreSdeVpScheduler"),
    ],
)
def test_processes_that_are_not_built_are_refused_by_name(config, word):
    with pytest.raises(ValueError, match=word):
        DiffusionProcess.from_config(config)


@pytest.mark.parametrize("name", [*DISCRETE, "CogVideoXDDIMScheduler"])
def test_a_configuration_of_diffusers_gives_its_schedule_or_is_refused(name):
    theirs = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    try:
        process = DiffusionProcess.from_config(saved(theirs))
    except ValueError:
        assert name not in DISCRETE
        return
    assert torch.equal(process.alpha_bar, theirs.alphas_cumprod.double())
    again = DiffusionProcess.from_config(process.config)
    assert again.digest == process.digest


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_schedule_in_use_is_the_schedule_of_the_process(sampler, zero_terminal_snr):
    process = DiffusionProcess("linear", prediction="v", zero_terminal_snr=zero_terminal_snr)
    try:
        used = process.scheduler(sampler, 10).alphas_cumprod.double()
    except ValueError:
        assert zero_terminal_snr
        assert sampler in ("heun", "euler")  # which divide by alpha_bar
        return
    # at zero terminal signal some solvers keep alpha_bar = 2**-24 for a division
    assert (used - process.alpha_bar).abs().max() <= 2**-24


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_visit_training_timesteps_only(sampler):
    process = DiffusionProcess(num_timesteps=250)
    for num_steps in range(1, 251):
        try:
            timesteps = process.scheduler(sampler, num_steps).timesteps
        except ValueError:
            assert 250 % num_steps or num_steps == 250  # only what does not divide T may be refused
            continue
        assert torch.equal(timesteps, timesteps.round()), num_steps
        assert timesteps.min() >= 0, f"{num_steps} steps visit t = {int(timesteps.min())}"
        assert timesteps.max() < 250, f"{num_steps} steps visit t = {int(timesteps.max())}"
        assert (timesteps.diff() <= 0).all(), num_steps
        assert len(timesteps.unique()) == num_steps, f"{num_steps} steps visit {len(timesteps.unique())} timesteps"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_of_foreign_configurations_stay_in_range_or_are_refused(spacing):
    # Stable Diffusion's configuration shifts leading timesteps by one
    config = saved(DDIMScheduler(timestep_spacing=spacing, steps_offset=1, num_train_timesteps=50))
    process = DiffusionProcess.from_config(config)
    for sampler in SAMPLERS:
        for num_steps in (1, 7, 10, 25, 49, 50):
            try:
                timesteps = process.scheduler(sampler, num_steps).timesteps
            except ValueError:
                assert num_steps not in (10, 25), f"{sampler} with a divisor of T is refused"
                continue
            assert timesteps.min() >= 0, (sampler, num_steps)
            assert timesteps.max() < 50, (sampler, num_steps)


def test_fractional_spacing_cannot_reach_heun_and_euler():
    config = saved(EulerDiscreteScheduler(use_karras_sigmas=True))
    process = DiffusionProcess.from_config(config)
    for sampler in ("heun", "euler"):
        with pytest.raises(ValueError, match=f"{sampler} with num_steps 10 would not visit 10 different timesteps"):
            process.scheduler(sampler, 10)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_timesteps": 1}, "got 1"),
        ({"beta_start": 0.0}, "0.0"),
        ({"beta_start": 0.3, "beta_end": 0.2}, "0.3 and 0.2"),
        ({"schedule": "sigmoid"}, "sigmoid"),
        ({"prediction": "noise"}, "noise"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value_given(options, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        DiffusionProcess(**options)


@pytest.mark.parametrize(
    ("sampler", "num_steps", "word"), [("plms", 10, "plms"), ("ddim", 0, "got 0"), ("ddim", 1001, "1001")]
)
def test_unknown_samplers_and_step_counts_are_refused(sampler, num_steps, word):
    with pytest.raises(ValueError, match=word):
        DiffusionProcess().scheduler(sampler, num_steps)


def test_the_gaussian_oracle_obeys_bayes():
    # E[x0|x_t] by brute force on a grid of x0, one dimension
    process = DiffusionProcess("linear", prediction="x0")
    oracle = gaussian_denoiser(torch.full((1, 1, 1), 0.4, dtype=torch.float64), 0.6, process)
    grid = np.linspace(-8, 8, 200001)
    for step in (0, 100, 700):
        signal, x = float(process.alpha_bar[step]), 0.9
        log_joint = -((grid - 0.4) ** 2) / (2 * 0.36) - (x - signal**0.5 * grid) ** 2 / (2 * (1 - signal))
        weight = np.exp(log_joint - log_joint.max())
        mean = oracle(torch.full((1, 1, 1, 1), x, dtype=torch.float64), torch.tensor([step])).item()
        assert mean == pytest.approx((weight * grid).sum() / weight.sum(), abs=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_clipped_output_means_the_clipped_x0_and_the_eps_that_belongs_to_it(prediction):
    process = DiffusionProcess("linear", prediction=prediction)
    draw = torch.Generator().manual_seed(0)
    output, x_t = (torch.randn(5, 1, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 10, 200, 600, 999])
    x0, inside = process.to_x0(output, x_t, t), process.to_x0(output, x_t, t).abs() <= 1
    assert 0 < inside.sum() < inside.numel()
    found = process.clip_x0(output, x_t, t)
    again, eps = process.to_x0(found, x_t, t), process.to_eps(found, x_t, t)
    torch.testing.assert_close(again, x0.clamp(-1, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(process.add_noise(again, eps, t), x_t, rtol=0, atol=1e-9)
    assert torch.equal(found[inside], output[inside])
    for options in ({"clip_sample": False}, {"thresholding": True}):
        other = DiffusionProcess.from_config({**process.config, **options})
        assert other.clip_x0(output, x_t, t) is output
    wide = DiffusionProcess.from_config({**process.config, "clip_sample_range": 2.0})
    limit = wide.to_x0(wide.clip_x0(output, x_t, t), x_t, t)
    torch.testing.assert_close(limit, x0.clamp(-2, 2), rtol=0, atol=1e-9)
