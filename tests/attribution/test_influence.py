"""First-order influence: forward-mode derivatives against difference quotients and against leaving out."""

from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_mem.attribution import Ensemble, UnitCodes, first_order_landscape, first_order_shifts, landscape
from lightning_mem.attribution.influence import weight_changes, weight_derivatives
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target, sample_x0
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator

PROCESS = DiffusionProcess(num_timesteps=40, clip_sample=False)
CODES = UnitCodes.drawn([[i] for i in range(6)], 4)
CONFIG = UNetConfig(block_out_channels=(4, 4), norm_num_groups=2, attention_levels=(1,), attention_head_dim=2)


@cache
def networks() -> Ensemble:
    """Four tiny networks with attention, in float64."""
    members = []
    for k in range(4):
        network = build_unet(CONFIG, 4, 1).double().eval().requires_grad_(False)
        for number, (name, value) in enumerate(sorted(network.named_parameters())):
            drawn = torch.randn(value.shape, generator=generator(k, "weights", number), dtype=torch.float64)
            value.copy_(drawn * 0.3 + ("norm" in name and name.endswith("weight")))
        members.append(Target(UNetDenoiser(network, "eps"), PROCESS, (1, 4, 4), digest=str(k)))
    return Ensemble(tuple(members), CODES)


def drawn(weights: Tensor, steps: int, eta: float = 0.0) -> Tensor:
    options = {"seed": 7, "num_steps": steps, "eta": eta, "block": 2, "dtype": torch.float64}
    return sample_x0(networks().weighted(weights), [0, 3], **options)


@pytest.mark.parametrize(("steps", "eta"), [(2, 0.0), (3, 1.0)])
def test_forward_derivatives_equal_central_difference_quotients(steps: int, eta: float) -> None:
    whole, slopes = weight_derivatives(
        networks(), [0, 3], seed=7, num_steps=steps, eta=eta, block=2, dtype=torch.float64
    )
    even, h = torch.full((4,), 0.25, dtype=torch.float64), 1e-5
    torch.testing.assert_close(whole, drawn(even, steps, eta), rtol=1e-12, atol=1e-12)
    assert slopes.shape == (4, 2, 1, 4, 4)
    for k, step in enumerate(h * torch.eye(4, dtype=torch.float64)):
        quotient = (drawn(even + step, steps, eta) - drawn(even - step, steps, eta)) / (2 * h)
        assert quotient.abs().max() > 0.01
        torch.testing.assert_close(slopes[k], quotient, rtol=1e-6, atol=1e-6 * float(quotient.abs().max()))


def test_with_one_step_and_no_clip_first_order_influence_is_exact() -> None:
    whole, slopes = weight_derivatives(networks(), [0, 3], seed=7, num_steps=1, block=2, dtype=torch.float64)
    shifts = first_order_shifts(slopes, CODES)
    for unit in range(6):
        options = {"seed": 7, "num_steps": 1, "block": 2, "dtype": torch.float64}
        exact = sample_x0(networks().target([unit]), [0, 3], **options) - whole
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(shifts[unit], exact, rtol=1e-9, atol=1e-9)


def test_weights_change_to_those_of_the_members_that_are_left() -> None:
    torch.testing.assert_close(weight_changes(CODES), (1 - 2 * CODES.codes.double()) / 4)
    odd = UnitCodes.drawn([[i] for i in range(10)], 5)
    for unit, change in enumerate(weight_changes(odd)):
        active = odd.active([unit])
        torch.testing.assert_close(change + 0.2, active.double() / active.sum())


def test_the_first_order_landscape_is_the_exact_one_where_the_sample_is_linear_in_the_weights() -> None:
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=generator(0, "images"))
    targets = tuple(EmpiricalDenoiser(images[CODES.codes[:, k]], PROCESS).target() for k in range(4))
    ensemble, units = Ensemble(targets, CODES), torch.arange(6)
    options = {"seed": 1, "num_steps": 1}
    exact = landscape(ensemble, images, units, range(5), **options)
    first = first_order_landscape(ensemble, images, units, range(5), **options)
    assert torch.equal(first.factual, exact.factual)
    torch.testing.assert_close(first.to_units, exact.to_units)
    rounding = 0.5 * 2 * 4 / 255  # of both images to whole pixel values
    for name in ("displacement", "moved_away"):
        found, known = getattr(first, name), getattr(exact, name)
        assert known.abs().max() > 4 * rounding
        assert (found - known).abs().max() <= rounding
