"""LiRA: its ratio by scipy, on Gaussians whose AUC is known, and on closed-form shadows of half splits."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from victim import patterns, scene_of, write_target

from lightning_mem.attacks import LiRA, LossAttack, likelihood_ratios
from lightning_mem.attacks.lira import Shadow
from lightning_mem.attacks.loss_scores import reconstruction_losses
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


def test_gaussians_are_told_as_well_as_they_can_be() -> None:
    # loss of image i: N(c_i + 1, 1) without it, N(c_i, 1) with it, the c_i far apart: only shadows see past them
    draw = torch.Generator().manual_seed(0)
    n, shadows = 3000, 64
    center = 20 * torch.randn(n, generator=draw)
    trained_with = torch.rand(shadows, n, generator=draw) < 0.5
    known = (center + 1 - trained_with.float() + torch.randn(shadows, n, generator=draw))[..., None]
    member = torch.arange(n) < n // 2
    losses = (center + 1 - member.float() + torch.randn(n, generator=draw))[:, None]
    for mode in ("online", "offline"):
        scores = likelihood_ratios(losses, known, trained_with, mode)[:, 0]  # type: ignore[arg-type]
        optimum = stats.norm.cdf(1 / math.sqrt(2 + 2 / 32))  # means are known from 32 shadows
        assert roc(scores[member], scores[~member]).auc == pytest.approx(optimum, abs=0.03)
    assert abs(roc(-losses[member, 0], -losses[~member, 0]).auc - 0.5) < 0.05


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
