"""LiRA: its ratio by scipy, on Gaussians whose AUC is known, and on closed-form shadows of half splits."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor
from victim import patterns, scene_of, write_target

from lightning_mem.attacks import LiRA, LossAttack, likelihood_ratios
from lightning_mem.attacks.lira import Shadow, least_shadows
from lightning_mem.attacks.loss_scores import reconstruction_losses
from lightning_mem.attacks.membership import Told
from lightning_mem.data.split import image_digest
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import Workers
from lightning_mem.metrics import roc
from lightning_mem.modules import load_target

POOL = patterns(48)


def digests(images: Tensor) -> frozenset[str]:
    return frozenset(image_digest(image) for image in images.numpy())


def planted(shadows: int = 6, n: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    trained_with = torch.stack([torch.randperm(n, generator=draw) < n // 2 for _ in range(shadows)])
    trained_with[0], trained_with[1] = True, False  # every image has one of each
    trained_with[2], trained_with[3] = False, True
    return torch.rand(n, 2, generator=draw), torch.rand(shadows, n, 2, generator=draw), trained_with


@pytest.mark.parametrize("variance", ["global", "per_image"])
def test_the_ratio_is_that_of_two_normal_densities(variance: Any) -> None:
    losses, known, trained_with = planted()
    online, offline = (likelihood_ratios(losses, known, trained_with, mode, variance) for mode in ("online", "offline"))
    for place in range(2):
        means, residuals = np.zeros((2, 50)), ([], [])
        deviations = np.zeros((2, 50))
        for row in range(50):
            for kind in (0, 1):
                own = known[trained_with[:, row] == bool(kind), row, place].double().numpy()
                means[kind, row], deviations[kind, row] = own.mean(), own.std(ddof=1)
                residuals[kind].append(((own - own.mean()) ** 2).sum())
        if variance == "global":
            for kind in (0, 1):
                spare = sum(int((trained_with[:, row] == bool(kind)).sum()) - 1 for row in range(50))
                deviations[kind] = math.sqrt(sum(residuals[kind]) / spare)
        x = losses[:, place].double().numpy()
        expected = stats.norm.logpdf(x, means[1], deviations[1]) - stats.norm.logpdf(x, means[0], deviations[0])
        np.testing.assert_allclose(online[:, place], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(offline[:, place], (means[0] - x) / deviations[0], rtol=1e-9)


def gaussians(n: int, gap: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a target, whose members are the first half, and of 64 shadows, and what these were trained with.

    N(c_i, 1) without image i and ``gap`` lower with it; the c_i are far apart: only shadows see past them.
    """
    draw = torch.Generator().manual_seed(0)
    center = 20 * torch.randn(n, generator=draw)
    trained_with = torch.rand(64, n, generator=draw) < 0.5
    known = (center - gap * trained_with.float() + torch.randn(64, n, generator=draw))[..., None]
    member = torch.arange(n) < n // 2
    return (center - gap * member.float() + torch.randn(n, generator=draw))[:, None], known, trained_with


def test_gaussians_are_told_as_well_as_they_can_be() -> None:
    losses, known, trained_with = gaussians(3000)
    for mode in ("online", "offline"):
        scores = likelihood_ratios(losses, known, trained_with, mode)[:, 0]  # type: ignore[arg-type]
        optimum = stats.norm.cdf(1 / math.sqrt(2 + 2 / 32))  # means are known from 32 shadows
        assert roc(scores[:1500], scores[1500:]).auc == pytest.approx(optimum, abs=0.03)
    assert abs(roc(-losses[:1500, 0], -losses[1500:, 0]).auc - 0.5) < 0.05


def test_the_gain_on_the_loss_attack_has_its_sign_and_is_nothing_where_shadows_know_nothing() -> None:
    found = {}
    for gap in (2.0, 0.0):
        losses, *shadows = gaussians(1000, gap)
        attack = LiRA(["a", "b"], timesteps=[100], noise_seed=0)
        attack._plain = {"members": -losses[:500], "heldout": -losses[500:]}
        scores = likelihood_ratios(losses, *shadows)
        told = Told({"none": (scores[:500], scores[500:])}, {"none": {"protection": "none"}}, [100], 1.0)
        numbers = {number.name: number for number in attack.extra_numbers(told, 0.5)}
        found[gap] = numbers["auc_gain"], numbers["tpr_gain_at_0.01"]
    d = 2 / math.sqrt(1 + 1 / 32)  # means are known from 32 shadows
    truth = stats.norm.cdf(d / math.sqrt(2)) - 0.5, stats.norm.sf(stats.norm.isf(0.01) - d) - 0.01
    for number, expected, nothing in zip(found[2.0], truth, found[0.0], strict=True):
        low, high = number.interval or (0, 0)
        assert 0 < low < expected < high
        assert low < (number.value or 0) < high
        assert (number.definition["against"], number.definition["num_members"]) == ("loss", 500)
        low, high = nothing.interval or (1, 1)
        assert low <= 0 <= high


class ClosedFormShadows(LiRA):
    """Shadows that are optima of half splits, instead of run folders."""

    splits: list[Tensor]

    def read_shadows(self) -> list[Shadow]:
        process = DiffusionProcess("linear")
        return [Shadow(EmpiricalDenoiser(POOL[own], process).target(), digests(POOL[own])) for own in self.splits]


def half(seed: int) -> Tensor:
    return torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:24]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_closed_form_shadows_give_the_members_away_and_the_target_is_not_among_them(mode: Any) -> None:
    mine = half(100)
    rest = torch.tensor([row for row in range(48) if row not in set(mine.tolist())])
    target = EmpiricalDenoiser(POOL[mine], DiffusionProcess("linear")).target()
    attack = ClosedFormShadows(["a", "b"], mode, num_draws=2, flips=True, timesteps=[100], noise_seed=0)
    attack.splits = [half(seed) for seed in range(8)] + [mine]  # one was trained on the target's own split
    scene = scene_of(target, POOL[mine], POOL[rest])
    assert attack.identity(target, "x", Path("home"))
    records = {(r.name, r.definition.get("attacker")): r for r in attack.run(scene)}
    auc = records["attack/lira/auc", "fixed"]
    assert auc.value is not None
    assert auc.value > 0.99
    assert auc.definition["num_shadows"] == 8  # the target is left out of its own shadows
    assert records["attack/lira/evaluations", "none"].value == (1 + 8) * 2 * 2
    gain = records["attack/lira/tpr_gain_at_0.01", "fixed"]
    plain = LossAttack(num_draws=2, flips=True, timesteps=[100], noise_seed=0)
    own, other = plain.scores(target, (POOL[mine], POOL[rest]), {"none": ()}, scene.workers)["none"]
    lira = records["attack/lira/tpr_at_0.01", "fixed"].value
    assert gain.value == pytest.approx((lira or 0) - roc(own[:, 0], other[:, 0]).tpr_at(0.01))
    assert gain.definition["against"] == "loss"
    assert records["attack/lira/auc_gain", "fixed"].value == pytest.approx(auc.value - roc(own[:, 0], other[:, 0]).auc)
    shown = Console(width=120, record=True)
    shown.print(attack.table(list(records.values())))
    assert "LiRA" in shown.export_text()
    # a coin dealt the pool out to sides, and the target saw neither: shadows know no more than the coin
    attack.splits = [half(seed) for seed in range(8)]
    attack._shadows = []
    nobody = EmpiricalDenoiser(patterns(24, 9), DiffusionProcess("linear")).target()
    coin = attack.scores(nobody, (POOL[mine], POOL[rest]), {"none": ()}, scene.workers)["none"]
    assert abs(roc(coin[0][:, 0], coin[1][:, 0]).auc - 0.5) < 3 * math.sqrt((24 + 24 + 1) / (12 * 24 * 24))
    # another's members are nobody's here: what the shadows know is not the target's membership
    stranger = EmpiricalDenoiser(POOL[half(200)], DiffusionProcess("linear")).target()
    told = attack.scores(stranger, (POOL[mine], POOL[rest]), {"none": ()}, scene.workers)["none"]
    in_stranger = [torch.isin(side, half(200)) for side in (mine, rest)]
    scores, truth = torch.cat(told)[:, 0], torch.cat(in_stranger)
    assert roc(scores[truth], scores[~truth]).auc > 0.99


def test_shadows_are_run_folders_that_say_their_images() -> None:
    images = POOL[:20]
    members = {"one": torch.arange(20) < 10, "two": torch.arange(20) >= 10, "three": torch.arange(20) % 2 == 0}
    for seed, (name, own) in enumerate(members.items()):
        write_target(Path(name), seed)
        content = {"members": {"digests": sorted(digests(images[own]))}}
        Path(name, "members.json").write_text(json.dumps(content))
    target = load_target(write_target(Path("victim"), 3))
    attack = LiRA(list(members), num_draws=1, timesteps=[20], curve=[60], noise_seed=0)
    found = attack.read_shadows()
    assert [shadow.digests for shadow in found] == [digests(images[own]) for own in members.values()]
    assert len({shadow.target.digest for shadow in found}) == 3
    told = attack.scores(target, (images[:8], images[8:]), {"none": ()}, Workers())["none"]
    losses = [
        [
            reconstruction_losses(load_target(folder), images[part], [20, 60], {"none": ()}, name=name)["none"]
            for name, part in (("members", slice(8)), ("heldout", slice(8, 20)))
        ]
        for folder in ("victim", *members)
    ]
    whole = torch.stack([torch.cat(sides) for sides in losses])
    expected = likelihood_ratios(whole[0], whole[1:], torch.stack(list(members.values())))  # pooled over both sides
    torch.testing.assert_close(torch.cat(told), expected)
    late = attack.at([60]).scores(target, (images[:8], images[8:]), {"none": ()}, Workers())["none"]
    assert all(torch.equal(one, side[:, 1:]) for one, side in zip(late, told, strict=True))
    assert attack.loss.times == [20, 60]
    with pytest.raises(ValueError, match=r"victim has no members.json: a shadow is the run folder"):
        LiRA(["one", "victim"]).read_shadows()


def test_the_least_number_of_shadows_leaves_no_image_of_a_pool_without_one_as_often_as_not() -> None:
    draw = np.random.default_rng(0)

    def enough(count: int, images: int, mode: Any, variance: Any) -> float:
        """Share of pools of random halves in which every image has enough."""
        least, hits = 2 if variance == "per_image" else 1, 0
        for _ in range(300):
            with_it = (draw.random((count, images)) < 0.5).sum(0)
            hits += ((count - with_it >= least) & ((with_it >= least) | (mode == "offline"))).all()
        return hits / 300

    for mode, variance in (("online", "global"), ("offline", "global"), ("online", "per_image")):
        found = least_shadows(60, mode, variance)  # type: ignore[arg-type]
        assert enough(found, 60, mode, variance) > 0.42
        assert enough(found - 1, 60, mode, variance) < 0.58
    assert least_shadows(1024) == 12


def test_too_few_shadows_are_refused() -> None:
    losses, known, trained_with = planted(4)
    with pytest.raises(ValueError, match="at least 2 different run folders, got .'a'"):
        LiRA(["a"])
    with pytest.raises(ValueError, match="mode must be online or offline, got 'both'"):
        LiRA(["a", "b"], "both")  # type: ignore[arg-type]
    nowhere = trained_with.clone()
    nowhere[:, 3] = False
    with pytest.raises(ValueError, match=r"at least 1 shadows trained with every image.* got 0 to 2 of 4.*offline"):
        likelihood_ratios(losses, known, nowhere)
    assert likelihood_ratios(losses, known, nowhere, "offline").isfinite().all()
    with pytest.raises(ValueError, match=r"the per_image variance needs at least 2 shadows trained without"):
        likelihood_ratios(losses[:, :1], known[:3, :, :1], trained_with[[0, 1, 3]], "offline", "per_image")
