"""The loss attack: its losses and z by hand, its attackers on planted losses, both signs, and its records."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from rich.console import Console
from scipy import stats
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import LossAttack, calibrated_verdict, loss_z, reconstruction_losses
from lightning_mem.attacks.loss_scores import halves
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.randomness import generator

MEMBERS, HELDOUT = patterns(24), patterns(30, 1)


class Push:
    """A score term that is a constant times the noised image; near a noised member only, where asked."""

    def __init__(self, factor: float, near: Target | None = None) -> None:
        self.factor, self.near = factor, near
        self.settings = {"protection": "push", "protection_scale": factor}

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        if self.factor == 0:
            return None
        if self.near is None:
            return self.factor * x_t
        alpha_bar = self.near.process.alpha_bar_at(t, x_t)
        clean = alpha_bar.sqrt().flatten()[:, None] * (MEMBERS.flatten(1) / 127.5 - 1)[:, None]
        near = (x_t.flatten(1) - clean).square().mean(2).amin(0) < 2 * (1 - alpha_bar.flatten())
        return self.factor * x_t * near.reshape(-1, 1, 1, 1)


class PushProtection(AbstractAddition):
    """By class_path."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        return [Push(self.factor, target)]


def planted(prediction: str = "eps") -> Target:
    return planted_mixture(MEMBERS, DiffusionProcess("linear", prediction=prediction))  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_losses_are_those_of_the_definition_at_the_same_noise_for_both_arms(prediction: str) -> None:
    target = planted(prediction)
    arms = {"none": [], "nothing": [Push(0.0)], "push": [Push(0.7)]}
    found = reconstruction_losses(target, MEMBERS[:3], [30, 400], arms, seed=5, name="members", num_draws=2)
    assert torch.equal(found["none"], found["nothing"])
    for row in range(3):
        for place, t in enumerate((30, 400)):
            alpha_bar = float(target.process.alpha_bar[t])
            expected = {"none": 0.0, "push": 0.0}
            for number in range(2):
                eps = torch.randn(1, 8, 8, generator=generator(5, "loss", "members", row, t, number)).double()
                x_t = math.sqrt(alpha_bar) * (MEMBERS[row] / 127.5 - 1).double() + math.sqrt(1 - alpha_bar) * eps
                score = target.denoiser.score(x_t[None], torch.tensor([t]))[0]  # type: ignore[attr-defined]
                for arm, factor in (("none", 0.0), ("push", 0.7)):
                    guess = -math.sqrt(1 - alpha_bar) * (score + factor * x_t)
                    expected[arm] += float((eps - guess).square().mean()) / 2
            for arm, value in expected.items():
                assert float(found[arm][row, place]) == pytest.approx(value, rel=2e-3)


def test_a_loss_does_not_depend_on_its_company() -> None:
    target = planted()
    few = reconstruction_losses(target, MEMBERS[:5], [100], {"none": []}, name="x")["none"]
    many = reconstruction_losses(target, MEMBERS.repeat(3, 1, 1, 1), [50, 100], {"none": []}, name="x")["none"]
    assert torch.equal(few[:, 0], many[:5, 1])
    other = reconstruction_losses(target, MEMBERS[:5], [100], {"none": []}, name="y")["none"]
    assert (other != few).all()


def test_z_is_welchs_statistic_and_positive_where_members_are_reconstructed_better() -> None:
    draw = np.random.default_rng(0)
    members, heldout = draw.gamma(2, 1, 40), draw.gamma(3, 1.5, 70)
    expected = stats.ttest_ind(heldout, members, equal_var=False).statistic
    assert loss_z(torch.tensor(members), torch.tensor(heldout)) == pytest.approx(expected, rel=1e-12)
    assert expected > 3
    with pytest.raises(ValueError, match="at least 2 losses on each side, got 1 and 2"):
        loss_z(torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match="z does not exist"):
        loss_z(torch.ones(3), torch.ones(3))


def test_nothing_leaks_where_a_coin_decided_who_is_a_member() -> None:
    found = []
    target = EmpiricalDenoiser(patterns(10, 2), DiffusionProcess("linear")).target()
    losses = reconstruction_losses(target, patterns(200, 3), [300], {"none": []})["none"][:, 0]
    for seed in range(40):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        found.append(loss_z(losses[order[:100]], losses[order[100:]]))
    assert abs(np.mean(found)) < 4 / math.sqrt(40)
    assert 0.7 < np.std(found) < 1.3  # standard normal


def test_the_attacker_who_calibrates_finds_time_and_sign_and_is_told_on_other_images() -> None:
    draw = torch.Generator().manual_seed(0)
    members, heldout = (torch.randn(n, 3, generator=draw).double() for n in (60, 80))
    members[:, 1] += 1.0  # members are reconstructed *worse* at the second timestep
    members[:, 2] -= 0.3
    found = calibrated_verdict("cpsample", members, heldout, [10, 20, 30], seed=7)
    assert (found.t, found.sign) == (20, -1)
    assert found.z < -2
    (_, own), (_, other) = halves(60, 7, "members"), halves(80, 7, "heldout")
    assert (found.curve.num_members, found.curve.num_heldout) == (30, 40)
    wins = (members[own, 1][:, None] > heldout[other, 1]).double().mean()
    assert found.curve.auc == pytest.approx(float(wins))
    # what it is told on is not what it chose on
    spoilt = members.clone()
    spoilt[own] = -5.0
    again = calibrated_verdict("cpsample", spoilt, heldout, [10, 20, 30], seed=7)
    assert (again.t, again.sign) == (20, -1)
    assert again.curve.auc == 0
    own_half, other_half = halves(61, 7, "members")
    assert sorted([*own_half.tolist(), *other_half.tolist()]) == list(range(61))


def run(protection: AbstractAddition | None, **options: Any) -> dict[tuple[Any, ...], Any]:
    attack = LossAttack(protection, timesteps=[20, 60], noise_seed=0, **options)
    scene = scene_of(planted(), MEMBERS, HELDOUT)
    assert attack.identity(scene.target, "planted", Path("home"))
    records = attack.run(scene)
    assert len({record.identity for record in records}) == len(records)
    shown = Console(width=80, record=True)
    shown.print(attack.table(records))
    lines = shown.export_text().splitlines()
    assert sum("calibrated  " in line and "12+15" in line for line in lines) == 1 + (protection is not None)
    return {
        (record.name.removeprefix("attack/loss/"), own["protection"], own["attacker"], own["t"]): record
        for record in records
        if "sign" in (own := record.definition)
    }


def test_the_records_tell_both_arms_apart_and_a_leak_of_the_other_sign_is_one_too() -> None:
    found = run(PushProtection(-60.0), setting="copies", candidates=[20, 60, 900])
    names = {key[0] for key in found}
    assert names == {"z", "auc", "auc_folded", "tpr_at_0.01", "tpr_at_0.001", "balanced_accuracy"}
    assert {key[2] for key in found if key[0] == "balanced_accuracy"} == {"calibrated"}
    plain, protected = (found["z", arm, "fixed", 20] for arm in ("none", "push"))
    assert plain.value > 3
    assert protected.value < -3
    assert found["auc_folded", "push", "fixed", 20].value > 0.9 > 0.1 > found["auc", "push", "fixed", 20].value
    turned = [record for key, record in found.items() if key[:3] == ("auc", "push", "calibrated")]
    assert [record.definition["sign"] for record in turned] == [-1]
    assert turned[0].value > 0.9
    assert plain.definition["setting"] == "copies"
    assert found["tpr_at_0.01", "none", "fixed", 20].definition["point"] == "at_most"  # of the two in use
    assert protected.definition["protection_scale"] == -60.0
    assert plain.low == pytest.approx(plain.value - stats.norm.ppf(0.975))
    assert found["auc", "none", "fixed", 20].value > 0.9
    assert (found["auc", "none", "fixed", 20].n, found["tpr_at_0.01", "none", "fixed", 20].n) == (54, 30)
    for (name, *key), record in found.items():
        if name == "auc_folded":
            one = found["auc", *key].value
            assert record.value == max(one, 1 - one)
            assert record.low <= record.value <= record.high
    calibrated = next(record for key, record in found.items() if key[:3] == ("auc", "none", "calibrated"))
    assert calibrated.definition["candidates"] == "20 60 900"
    assert calibrated.definition["t"] in (20, 60)
    rows = list(csv.DictReader(Path("results/tables/losses.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3 * (24 + 30)
    own = [float(r["loss"]) for r in rows if (r["protection"], r["set"], r["t"]) == ("none", "members", "20")]
    other = [float(r["loss"]) for r in rows if (r["protection"], r["set"], r["t"]) == ("none", "heldout", "20")]
    assert plain.value == pytest.approx(stats.ttest_ind(other, own, equal_var=False).statistic, rel=1e-6)


def test_without_protection_there_is_one_arm_and_settings_tell_attacks_apart() -> None:
    assert {key[1] for key in run(None)} == {"none"}
    target = planted()
    digests = {
        LossAttack(protection, noise_seed=seed).identity(target, "planted", Path("home"))
        for protection, seed in ((None, 0), (None, 1), (PushProtection(1.0), 0), (PushProtection(2.0), 0))
    }
    assert len(digests) == 4
    assert "drops the protection" in LossAttack.threat_model
    assert "one bit of every member" in LossAttack.threat_model


def test_what_cannot_be_attacked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timesteps must be .* increasing order, got \[200, 100\]"):
        LossAttack(timesteps=[200, 100])
    with pytest.raises(ValueError, match=r"candidates must be .* got \[\]"):
        LossAttack(candidates=[])
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        LossAttack(num_draws=0)
    target = planted()
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got 1000"):
        LossAttack(timesteps=[5, 1000]).identity(target, "x", Path("x"))
    with pytest.raises(ValueError, match="at least 4 members and 4 held-out images, got 24 and 0"):
        LossAttack().run(scene_of(target, MEMBERS, HELDOUT[:0]))
    target.num_classes = 3
    with pytest.raises(ValueError, match="conditioned on 3 classes: it is asked about an image under a label"):
        reconstruction_losses(target, MEMBERS, [1], {"none": []})
