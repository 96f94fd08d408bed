"""The likelihood by probability flow against densities in closed form, its divergence, and what it leaves alone."""

import math
from pathlib import Path

import pytest
import torch
from oracles import MixtureDenoiser
from torch import Tensor
from victim import patterns, write_target

from lightning_mem.attacks import FlowLikelihood
from lightning_mem.attacks.query import Query
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation import Workers
from lightning_mem.modules import load_target

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (4, 1, 2, 2), generator=DRAW, dtype=torch.uint8)
MEANS = torch.rand(3, 1, 2, 2, generator=DRAW) * 1.6 - 0.8


def mixture(count: int) -> MixtureDenoiser:
    """Of one Gaussian, or several."""
    return MixtureDenoiser(MEANS[:count], torch.tensor([0.3, 0.2, 0.5])[:count], DiffusionProcess("linear"))


def bits(attack: FlowLikelihood, target: Target, images: Tensor = IMAGES) -> Tensor:
    return attack.side_errors(target, images, {"none": ()}, "members", Workers())["none"]


def exact(denoiser: MixtureDenoiser, t: int) -> Tensor:
    """Bits per dimension of the noised law at the scaled images."""
    x_t = (IMAGES.double() / 127.5 - 1) * denoiser.process.alpha_bar[t].sqrt()
    return -denoiser.log_density(x_t, torch.full((len(IMAGES),), t)) / (4 * math.log(2))


@pytest.mark.parametrize("count", [1, 3])
def test_the_flow_gives_the_density_of_gaussians_and_of_mixtures(count: int) -> None:
    denoiser = mixture(count)
    found = bits(FlowLikelihood(40, None, timesteps=[0, 100]), denoiser.target())
    torch.testing.assert_close(found[:, 0], exact(denoiser, 0), rtol=0.02, atol=0)
    torch.testing.assert_close(found[:, 1], exact(denoiser, 100), rtol=0.01, atol=0)
    coarse = bits(FlowLikelihood(10, None, timesteps=[0]), denoiser.target())
    errors = [float((side[:, 0] - exact(denoiser, 0)).abs().max()) for side in (coarse, found)]
    assert errors[0] > 8 * errors[1]  # of second order, up to what the end of the schedule leaves


def test_random_signs_estimate_the_divergence_and_are_an_images_own() -> None:
    target = mixture(3).target()
    whole = bits(FlowLikelihood(1, None), target)[:, 0]
    draws = torch.stack([bits(FlowLikelihood(1, 1, noise_seed=seed), target)[:, 0] for seed in range(40)])
    error = draws.std(0) / math.sqrt(40)
    assert (error > 0).all()
    assert ((draws.mean(0) - whole).abs() < 4 * error).all()
    many = bits(FlowLikelihood(1, 40, noise_seed=0), target)[:, 0]
    assert ((many - whole).abs() < 4 * error).all()
    alone = bits(FlowLikelihood(1, 1, noise_seed=0), target, IMAGES[:2])[:, 0]
    assert torch.equal(alone, draws[0, :2])


def test_steps_are_even_in_log_sigma_as_far_as_timesteps_are() -> None:
    query = Query(mixture(1).target())
    nodes = FlowLikelihood(50).nodes(query, 0)
    assert nodes[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert nodes[-1] == 999
    assert nodes == sorted(set(nodes))
    widths = ((1 - query.process.alpha_bar) / query.process.alpha_bar).sqrt()[nodes].log().diff()[10:]
    assert widths.max() < 1.3 * widths.min()
    assert FlowLikelihood(999).nodes(query, 0) == list(range(1000))
    assert FlowLikelihood(10).nodes(query, 989) == list(range(989, 1000))


def test_a_network_is_differentiated_by_its_input_and_left_as_it_was() -> None:
    target = load_target(write_target(Path("victim")))
    network = network_of(target.denoiser)
    assert network is not None
    before = torch.get_rng_state()
    found = bits(FlowLikelihood(3, 2, timesteps=[0, 20]), target, patterns(3))
    assert torch.equal(before, torch.get_rng_state())
    assert found.isfinite().all()
    assert all(parameter.grad is None for parameter in network.parameters())


class Constant:
    """Predicts the same noise everywhere."""

    prediction = "eps"

    def __call__(self, x_t: Tensor, t: Tensor, condition: None = None) -> Tensor:
        return torch.full_like(x_t, 0.3)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a denoiser that can be differentiated"):
        bits(FlowLikelihood(3), Target(Constant(), DiffusionProcess("linear"), (1, 2, 2)))
    for options in ({"num_steps": 0}, {"num_probes": 0}):
        with pytest.raises(ValueError, match=r"must be at least 1, got 0"):
            FlowLikelihood(**options)
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got 1040"):
        FlowLikelihood(50, timesteps=[990]).identity(mixture(1).target(), "x", Path("x"))
    with pytest.raises(ValueError, match="50 steps do not fit between timestep 990 and the last one, 999"):
        bits(FlowLikelihood(50, timesteps=[990]), mixture(1).target())
