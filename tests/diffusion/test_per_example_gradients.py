"""Per-example gradients against a loop of backward passes in float64, and closed forms."""

import pytest
import torch
from torch import Tensor, nn

from lightning_mem.diffusion.gradients import per_example_gradients
from lightning_mem.networks import UNetConfig, build_unet


def _attentive() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(UNetConfig((8,), mid_attention=True, norm_num_groups=4), 4, 1).double().eval()


def test_gradients_taken_together_are_those_of_a_loop_of_backward_passes_in_any_chunks() -> None:
    network = _attentive()
    draw = torch.Generator().manual_seed(1)
    x_t, eps = (torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    t = torch.tensor([10, 400, 900])

    def loss(x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        return (network(x[None], at[None]).sample[0] - noise).square().mean()

    expected = []
    for row in range(3):
        parts = torch.autograd.grad(loss(x_t[row], eps[row], t[row]), list(network.parameters()))
        expected.append(torch.cat([part.flatten() for part in parts]))
    network.requires_grad_(False)  # frozen parameters count too
    room = torch.full_like(torch.stack(expected), torch.nan)
    for chunk_size, out in ((None, None), (2, room)):
        found = per_example_gradients(network, loss, x_t, eps, t, chunk_size=chunk_size, out=out)
        assert out is None or found is out
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_what_becomes_of_a_gradient_is_asked_of_each_example_alone() -> None:
    network = nn.Linear(2, 1, bias=False)
    rows = torch.tensor([[3.0, 4.0], [5.0, 12.0], [0.0, 1.0]])
    norms = per_example_gradients(network, lambda x: network(x).sum(), rows, chunk_size=2, then=lambda g: g[
        "network.weight"].square().sum().sqrt())  # fmt: skip
    assert norms.tolist() == [5.0, 13.0, 1.0]


def test_a_network_that_draws_or_has_no_parameters_is_refused() -> None:
    dropped = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="random"):
        per_example_gradients(dropped, lambda x: dropped(x).sum(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="Identity has none"):
        per_example_gradients(nn.Identity(), lambda x: x.sum(), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"out must be \(2, 6\).*got \(2, 5\)"):
        per_example_gradients(dropped, lambda x: dropped(x).sum(), torch.ones(2, 2), out=torch.ones(2, 5))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        per_example_gradients(dropped.eval(), lambda x: dropped(x).sum(), torch.ones(2, 2), chunk_size=0)
