"""AMG-style guidance: its distance by brute force, its slope by differences, its trigger, and its sign on a target."""

import numpy as np
import pytest
import torch
from labelled_mixture import copied, patterns, planted
from oracles import finite_differences
from torch import Tensor

from lightning_mem.defenses import AMG, amg
from lightning_mem.diffusion import DiffusionProcess, Target, sample
from lightning_mem.metrics import nearest_neighbors, normalized_l2
from lightning_mem.randomness import generator


def test_the_distance_is_that_of_the_metric() -> None:
    bank = patterns(60)
    _, target, _ = planted()
    term = AMG(target, bank, search="x0")
    x = patterns(5, seed=3).double() / 127.5 - 1
    near = term.nearest(x, 0)
    assert near.shape == (5, 50, 16)
    expected = normalized_l2(nearest_neighbors(x / 2 + 0.5, bank.double() / 255, 50)[0])
    torch.testing.assert_close(amg.adaptive_distance(x.flatten(1), near), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("search", ["noised", "x0"])
def test_the_term_is_the_weighted_slope_of_the_adaptive_distance(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amg, "CHUNK", 5)  # the search in several pieces
    members, target, _ = planted(12)
    term = AMG(target, members, 3.0, trigger=1.9, search=search)  # type: ignore[arg-type]
    t, process = 40, target.process
    alpha_bar = float(process.alpha_bar[t])
    x_t = process.add_noise(
        members[:2].double() / 127.5 - 1, 0.3 * torch.ones(2, 1, 4, 4).double(), torch.full((2,), t)
    ).float()
    clean = (members.double() / 127.5 - 1).flatten(1).numpy()
    if search == "noised":
        parts = [(0, 5), (1, 5), (2, 2)]
        eps = torch.cat([torch.randn(n, 16, generator=generator(0, "amg", t, number)) for number, n in parts])
        bank = np.sqrt(alpha_bar) * clean + np.sqrt(1 - alpha_bar) * eps.double().numpy()
        place, factor = x_t.double().flatten(1).numpy(), 1.0
    else:
        bank, factor = clean, 1 / np.sqrt(alpha_bar)
        output = target.denoiser(x_t, torch.full((2,), t))
        place = process.to_x0(output, x_t, torch.full((2,), t)).double().flatten(1).numpy()

    def distance(x: np.ndarray) -> float:
        found = np.sort(np.sqrt(((x - bank) ** 2).sum(1)))
        return float(found[0] / (0.5 * found.mean()))

    found = term(x_t, torch.full((2,), t), torch.arange(2))
    assert found is not None
    for row in range(2):
        own = distance(place[row])
        assert own < 1.9
        strength = 3 * (1.95 - 0.45 * np.exp(-0.025 * t) - own) * factor
        slope = strength * finite_differences(distance, place[row], 1e-5)
        np.testing.assert_allclose(found[row].flatten().numpy(), slope, rtol=2e-3, atol=2e-4 * np.abs(slope).max())
    assert term.evaluations == 2
    assert term.network_evaluations == (2 if search == "x0" else 0)


def test_the_right_sign_lowers_copies_and_the_wrong_one_does_not() -> None:
    members, target, _ = planted()
    term = AMG(target, members)

    def wrong(x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        found = term(x_t, t, addresses)
        return None if found is None else -found

    base, right, reverse = (
        copied(sample(target, range(64), seed=0, num_steps=20, guidance=terms), members).double().mean()
        for terms in ([], [term], [wrong])
    )
    assert base > 0.3
    assert right < base / 3
    assert reverse > 1.5 * base


def test_above_the_trigger_no_bit_changes() -> None:
    members, target, _ = planted()
    plain = sample(target, range(8), seed=0, num_steps=10)
    copies = copied(plain, members)
    assert 0 < copies.sum() < 8
    never = AMG(target, members, 50.0, trigger=1e-6)
    assert torch.equal(sample(target, range(8), seed=0, num_steps=10, guidance=[never]), plain)
    assert torch.equal(sample(target, range(8), seed=0, num_steps=10, guidance=[AMG(target, members, 0.0)]), plain)
    x_t, t = members[:1].float() / 127.5 - 1, torch.tensor([0])
    term = AMG(target, members, 50.0, search="x0")
    far = torch.cat([x_t, torch.zeros_like(x_t)])
    found = term(far, t.expand(2), torch.arange(2))
    assert found is not None
    assert found[0].abs().max() > 0
    assert found[1].abs().max() == 0
    assert term(far[1:], t, torch.tensor([1])) is None
    term(far[[1, 0, 0]], t.expand(3), torch.tensor([0, 5, 5]))  # the last row pads the block
    assert term.gate_rate(torch.tensor([0, 1, 5, 9])).tolist() == [0.5, 0, 1, 0]


def test_the_noise_is_that_of_the_timestep_alone() -> None:
    members, target, _ = planted()
    term = AMG(target, members, search="noised")
    x = torch.zeros(1, 1, 4, 4)
    assert torch.equal(term.nearest(x, 300), AMG(target, members, search="noised", seed=0).nearest(x, 300))
    assert not torch.equal(term.nearest(x, 300), term.nearest(x, 301))
    assert not torch.equal(term.nearest(x, 300), AMG(target, members, search="noised", seed=1).nearest(x, 300))
    assert AMG(target, members, mirror=True).k == 24


def test_what_does_not_fit_is_refused() -> None:
    members, target, _ = planted()
    for options, message in (
        ({"scale": -1.0}, "scale must be finite and at least 0 .* got -1.0"),
        ({"trigger": 2.0}, r"trigger must lie in \(0, 2\), .* got 2.0"),
        ({"search": "far"}, "search must be noised or x0, got 'far'"),
        ({"bank": members[:1]}, r"bank must be uint8 \[N >= 2, C, H, W\], got torch.uint8 \(1, 1, 4, 4\)"),
        ({"bank": patterns(3, 8)}, r"become \(1, 8, 8\) for the denoiser, which works on \(1, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            AMG(target, **{"bank": members, **options})  # type: ignore[arg-type]
    conditional = Target(target.denoiser, DiffusionProcess("linear"), (1, 4, 4), num_classes=3)
    with pytest.raises(ValueError, match="the target is conditional: use search noised"):
        AMG(conditional, members, search="x0")
    with pytest.raises(ValueError, match=r"must have one timestep, got \[1, 2\]"):
        AMG(target, members)(torch.zeros(2, 1, 4, 4), torch.tensor([1, 2]), torch.arange(2))
