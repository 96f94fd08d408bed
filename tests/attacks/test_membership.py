"""What membership attacks share: closed forms are told, coins are not, thresholds are fitted elsewhere, and is said."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor
from victim import patterns, scene_of, write_target

from lightning_mem.attacks import PFAMI, PIA, AbstractMembership, FlowLikelihood, LossAttack, Memberships, SecMI, SimA
from lightning_mem.attacks.loss_scores import calibrated_verdict, halves
from lightning_mem.attacks.membership_scores import (
    calibration_scores,
    fitted_accuracy,
    mean_of_shares,
    paired_gains,
    unresolved,
)
from lightning_mem.defenses import NearestRejection
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation import Workers
from lightning_mem.metrics import roc
from lightning_mem.modules import load_target
from lightning_mem.modules.base import META
from lightning_mem.records import Record

MEMBERS, HELDOUT = patterns(30), patterns(40, 1)
ATTACKS: dict[str, Callable[..., AbstractMembership]] = {
    "loss": lambda **options: LossAttack(**options),
    "secmi": lambda **options: SecMI(**options),
    "pia": lambda **options: PIA(**options),
    "pian": lambda **options: PIA(normalize=True, **options),
    "sima": lambda **options: SimA(**options),
    "pfami": lambda **options: PFAMI([0.9, 0.7], None, **options),
    "likelihood": lambda **options: FlowLikelihood(5, **options),
}


def closed_form(images: Tensor = MEMBERS) -> Target:
    return EmpiricalDenoiser(images, DiffusionProcess("linear")).target()


def run(attack: Any, members: Tensor = MEMBERS, heldout: Tensor = HELDOUT) -> list[Record]:
    scene = scene_of(closed_form(), members, heldout)
    attack.identity(scene.target, "closed form", Path("home"))
    found: list[Record] = attack.run(scene)
    assert len({record.identity for record in found}) == len(found)
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_the_optimum_on_the_members_gives_them_away_and_the_score_has_the_right_sign(name: str) -> None:
    attack = ATTACKS[name](timesteps=[100], curve=[50, 100], noise_seed=0)
    assert attack.name == name
    found = run(attack)
    aucs = {(r.definition["attacker"], r.name): r for r in found if r.name.endswith(("/auc", "/auc_curve"))}
    assert aucs["fixed", f"attack/{name}/auc"].value > 0.99  # type: ignore[operator]
    assert aucs["fixed", f"attack/{name}/auc"].definition["t"] == 100
    calibrated = aucs["calibrated", f"attack/{name}/auc"]
    assert (calibrated.value, calibrated.definition["sign"]) == (1.0, 1)
    curve = [r for r in found if r.name == f"attack/{name}/auc_curve"]
    assert [r.definition["t"] for r in curve] == [50, 100]
    assert all((r.value or 0) > 0.99 for r in curve)
    # where the sides are exchanged, the same scores point the other way
    turned = attack.scores(closed_form(), (HELDOUT, MEMBERS), {"none": ()}, Workers())["none"]
    assert roc(turned[0][:, 1], turned[1][:, 1]).auc < 0.01


@pytest.mark.parametrize("name", ATTACKS)
def test_a_coin_that_decides_who_is_a_member_cannot_be_told(name: str) -> None:
    # 64 images the target never saw and 64 of which it knows all: a coin deals each pair out to the two sides
    attack = ATTACKS[name](timesteps=[100], noise_seed=0)
    known, unknown = patterns(64, 5), patterns(64, 6)
    own, other = attack.scores(closed_form(known), (known, unknown), {"none": ()}, Workers())["none"]
    assert roc(own[:, 0], other[:, 0]).auc > 0.99
    swap = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    dealt = torch.where(swap, other[:, 0], own[:, 0]), torch.where(swap, own[:, 0], other[:, 0])
    assert abs(roc(*dealt).auc - 0.5) < 3 * math.sqrt((64 + 64 + 1) / (12 * 64 * 64))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_network_that_learned_nothing_tells_nothing(name: str) -> None:
    target = load_target(write_target(Path("untrained")))
    network, draw = network_of(target.denoiser), torch.Generator().manual_seed(0)
    assert network is not None
    for value in network.parameters():  # its last layer starts at zero
        value.data += 0.1 * torch.randn(value.shape, generator=draw)
    attack = ATTACKS[name](timesteps=[40], noise_seed=0)
    own, other = attack.scores(target, (patterns(64, 7), patterns(64, 8)), {"none": ()}, Workers())["none"]
    assert len(own.unique()) > 60
    assert abs(roc(own[:, 0], other[:, 0]).auc - 0.5) < 3 * math.sqrt((64 + 64 + 1) / (12 * 64 * 64))


def test_at_little_noise_the_optimum_makes_no_error_on_members() -> None:
    own, other = LossAttack(timesteps=[1], noise_seed=0).scores(
        closed_form(), (MEMBERS, HELDOUT), {"none": ()}, Workers()
    )["none"]
    assert -1e-6 < float(own.min()) <= 0
    assert float(other.max()) < -100


@pytest.mark.parametrize("name", ATTACKS)
def test_a_score_does_not_depend_on_its_company(name: str) -> None:
    few, many = ATTACKS[name](timesteps=[100], noise_seed=0), ATTACKS[name](timesteps=[50, 100], noise_seed=0)
    sides = [
        attack.side_errors(closed_form(), images, {"none": ()}, "members", Workers())["none"]
        for attack, images in ((few, HELDOUT[:5]), (many, HELDOUT.repeat(2, 1, 1, 1)))
    ]
    assert torch.equal(sides[0][:, 0], sides[1][:5, 1])


def test_the_threshold_is_fitted_on_other_images_than_it_is_told_on() -> None:
    draw = torch.Generator().manual_seed(0)
    members, heldout = (torch.randn(n, 2, generator=draw).double() for n in (60, 90))
    members[:, 1] += 1.5
    verdict = calibrated_verdict("none", -members, -heldout, [10, 20], seed=3)
    assert (verdict.t, verdict.sign) == (20, 1)
    known = calibration_scores((members, heldout), 1, 1, seed=3)
    found = fitted_accuracy(verdict, known)
    (own, own_test), (other, other_test) = halves(60, 3, "members"), halves(90, 3, "heldout")
    labels = [1] * 30 + [0] * 45
    choices = torch.cat([members[own, 1], heldout[other, 1]])
    threshold = max(choices, key=lambda x: (balanced_accuracy_score(labels, choices >= x), x))
    tested = torch.cat([members[own_test, 1], heldout[other_test, 1]]) >= threshold
    assert found.value == pytest.approx(balanced_accuracy_score(labels, tested), abs=1e-12)
    assert found.n == 75
    assert found.interval is not None
    assert found.interval[0] < (found.value or 0) < found.interval[1]
    best_on_test = verdict.curve.balanced_accuracy
    assert found.value < best_on_test  # what the test images themselves would have chosen flatters


def test_the_interval_of_a_mean_of_two_shares_covers_it() -> None:
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        hits = [int((torch.rand(n, generator=draw) < p).sum()) for n, p in ((40, 0.9), (60, 0.6))]
        low, high = mean_of_shares((hits[0], 40), (hits[1], 60))
        covered += low <= 0.75 <= high
    assert covered >= 180
    assert mean_of_shares((5, 5), (7, 7))[1] == 1


def test_a_gain_is_the_difference_of_two_attacks_on_the_same_images() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(200, generator=draw), torch.randn(300, generator=draw).round(decimals=1)  # with ties
    better, worse = (own + 3, other), ((own + 1).round(decimals=1), other)
    area, few, many, all_of_them = paired_gains(better, worse, (0.01, 0.1, 1.0), torch.Generator().manual_seed(1), 100)
    one, two = roc(*better), roc(*worse)
    assert area.value == pytest.approx(one.auc - two.auc, abs=1e-12)
    for rate, number in ((0.01, few), (0.1, many)):
        assert number.value == pytest.approx(one.tpr_at(rate) - two.tpr_at(rate), abs=1e-12)
        assert number.name == f"tpr_gain_at_{rate}"
    assert (all_of_them.value, all_of_them.interval) == (0, (0, 0))
    for number in (area, few, many):
        assert number.interval is not None
        assert 0 < number.interval[0] < (number.value or 0) < number.interval[1]
    same = paired_gains(better, better, (0.1,), torch.Generator().manual_seed(1), 20)
    assert [(number.value, number.interval) for number in same] == [(0.0, (0.0, 0.0))] * 2
    turned = paired_gains(worse, better, (0.1,), torch.Generator().manual_seed(1), 20)
    assert [number.value for number in turned] == [-(area.value or 0), -(many.value or 0)]


def test_the_bootstrap_of_a_gain_is_paired_and_covers_no_gain() -> None:
    draw = np.random.default_rng(0)
    covered, widths = 0, []
    for seed in range(60):
        shared = [draw.normal(size=n) for n in (80, 120)]  # what makes an image hard for both attacks
        scores = [[side + 0.3 * draw.normal(size=len(side)) for side in (shared[0] + 1, shared[1])] for _ in range(2)]
        one, two = ((torch.from_numpy(own), torch.from_numpy(other)) for own, other in scores)
        area, rate = paired_gains(one, two, (0.1,), torch.Generator().manual_seed(seed), 100)
        for number in (area, rate):
            low, high = number.interval or (0, 0)
            covered += low <= 0 <= high
        widths.append((area.interval or (0, 0))[1] - (area.interval or (0, 0))[0])
    assert covered >= 106
    alone = roc(*one).auc_interval()
    assert np.mean(widths) < 0.6 * (alone[1] - alone[0])  # unpaired it would be wider than either's own


def test_too_few_images_for_a_rate_are_named_with_the_smallest_rate_they_resolve() -> None:
    assert unresolved([0.01, 0.001], 1000) == ""
    assert unresolved([0.01, 0.001], 500).startswith("500 held-out images resolve false positive rates from 0.002 on: ")
    assert "at 0.01 and 0.001 stands" in unresolved([0.01, 0.001], 40)
    attack = PIA(noise_seed=0)
    shown = Console(width=200, record=True)
    shown.print(attack.table(run(attack)))
    assert "40 held-out images resolve false positive rates from 0.025 on" in " ".join(shown.export_text().split())


def test_costs_are_counted_in_denoiser_calls() -> None:
    target = closed_form()
    calls: list[int] = []

    class Counted:
        prediction = target.denoiser.prediction

        def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            calls.append(len(x_t))
            return target.denoiser(x_t, t)

    for attack, expected in (
        (LossAttack(timesteps=[100], num_draws=3, flips=True, spread=2), 18), (SecMI(timesteps=[100]), 12), (PIA(), 2),
        (SimA(), 1), (PFAMI([0.9, 0.7], 30, 2, timesteps=[100]), 24), (FlowLikelihood(4), 9),
    ):  # fmt: skip
        calls.clear()
        attack.side_errors(replace(target, denoiser=Counted()), HELDOUT, {"none": ()}, "heldout", Workers())
        assert len(calls) == attack.evaluations(attack.timesteps[0]) == expected
        assert set(calls) == {64}  # a block at a time, never an image


def test_every_image_stands_in_the_table_beside_what_the_ledger_says_of_it() -> None:
    Path("home").mkdir()
    lines = [
        "step,weights,index,copies,nearest,samples,file",
        "0,raw,3,7,0.012000,1 2,",
        "5,raw,4,9,0.01,1,",
        "0,ema,4,9,0.01,1,",
    ]
    Path("home/ledger.csv").write_text("\n".join(lines))
    Path("home/members.json").write_text(json.dumps({"heldout": {"indices": list(range(100, 140))}}))
    suite = Memberships([PIA(timesteps=[200], noise_seed=0), SecMI(timesteps=[50], noise_seed=0)])
    found = run(suite)
    rows = list(csv.DictReader(Path("results/tables/membership.csv").read_text().splitlines()))
    assert [row["index"] for row in rows] == [*map(str, range(30)), *map(str, range(100, 140))]
    assert list(rows[0]) == ["set", "index", "copies", "nearest", "pia_t200", "secmi_t50"]
    copied = {row["index"]: (row["copies"], row["nearest"]) for row in rows if row["copies"] != "0"}
    assert copied == {"3": ("7", "0.012000")}
    sides = [[float(row["pia_t200"]) for row in rows if row["set"] == side] for side in ("members", "heldout")]
    told = next(r for r in found if r.name == "attack/pia/auc" and r.definition["attacker"] == "fixed")
    assert roc(*sides).auc == told.value
    alone = {r.identity: r.value for r in run(PIA(timesteps=[200], noise_seed=0)) if "seconds" not in r.name}
    assert alone == {r.identity: r.value for r in found if r.name.startswith("attack/pia/") and "seconds" not in r.name}


def checkpoint(name: str, step: int, seed: int) -> Path:
    """A file of the run folder ``home`` as training leaves it after ``step`` steps."""
    Path(write_target(Path(f"{name} of {seed}"), seed))
    content = torch.load(f"{name} of {seed}/checkpoints/last.ckpt", weights_only=False)
    content[META]["step"] = step
    place = Path("home/checkpoints") / name
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, place)
    return place


def test_the_curve_follows_the_checkpoints_each_asked_at_its_own_weights() -> None:
    files = {3: checkpoint("step3.ckpt", 3, 1), 7: checkpoint("step7.ckpt", 7, 2)}
    checkpoint("other.ckpt", 5, 3)
    attacks = [LossAttack(timesteps=[20], curve=[40, 60], noise_seed=0), PIA(timesteps=[30], noise_seed=0)]
    members, heldout = MEMBERS[:9], HELDOUT[:11]
    scene = replace(scene_of(load_target(files[7]), members, heldout), step=7)
    found = Memberships(attacks, "checkpoints/step*.ckpt").run(scene)
    assert len({record.identity for record in found}) == len(found)  # step 7 was attacked itself, too
    curves = {(r.name, r.step, r.definition["t"]): r.value for r in found if r.name.endswith("/auc_curve")}
    expected = {}
    for step, file in files.items():
        target = load_target(file)
        for attack, times in (
            (LossAttack(timesteps=[40, 60], noise_seed=0), [40, 60]), (PIA(timesteps=[30], noise_seed=0), [30]),
        ):  # fmt: skip
            own, other = attack.scores(target, (members, heldout), {"none": ()}, Workers())["none"]
            labels = [1] * 9 + [0] * 11
            for place, t in enumerate(times):
                auc = roc_auc_score(labels, torch.cat([own, other])[:, place])
                expected[f"attack/{attack.name}/auc_curve", step, t] = pytest.approx(auc, abs=1e-12)
    assert curves == expected
    assert {r.step for r in found if not r.name.endswith("/auc_curve")} == {7}


def test_an_attack_at_other_timesteps_leaves_the_first_as_it_was() -> None:
    attack = LossAttack(timesteps=[100], candidates=[50, 100], curve=[10], noise_seed=0)
    other = attack.at([20, 300])
    assert (other.times, other.timesteps, other.candidates, other.curve) == ([20, 300], [20, 300], [20, 300], [])
    assert attack.times == [10, 50, 100]


def test_overlap_and_kinds_are_noticed() -> None:
    attack = PIA(noise_seed=0)
    twins = HELDOUT.clone()
    twins[[2, 7]] = MEMBERS[:2]
    with pytest.raises(ValueError, match=r"2 of 40 held-out images equal a member pixel for pixel \(rows \[2, 7\]"):
        run(attack, heldout=twins)
    with pytest.warns(UserWarning, match=r"differ in more than membership .* p = 0.001\): PIA may tell two kinds"):
        found = run(attack, heldout=HELDOUT // 4)
    assert next(r.value for r in found if r.name == "attack/pia/shift_p_value") == 0.001
    assert next(r.value for r in run(attack) if r.name == "attack/pia/shift_p_value") > 0.01


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "likelihood"])
def test_a_rejection_leaves_nothing_to_ask_and_is_refused_before_anything_is(name: str) -> None:
    attack = ATTACKS[name](protection=NearestRejection(), noise_seed=0)
    refused = rf"NearestRejection changes no denoiser, it judges finished samples: {attack.title} .*Protections"
    with pytest.raises(ValueError, match=refused):
        attack.identity(closed_form(), "x", Path("x"))
    with pytest.raises(ValueError, match=refused):
        attack.tell(closed_form(), (MEMBERS, HELDOUT), Workers())


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"curve must be .* increasing order, got \[3, 2\]"):
        PIA(curve=[3, 2])
    with pytest.raises(ValueError, match=r"timesteps must be multiples of the stride 10, got \[105\]"):
        SecMI(timesteps=[100, 105])
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got 1000"):
        SecMI(timesteps=[990]).identity(closed_form(), "x", Path("x"))
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        SecMI(stride=0)
    with pytest.raises(ValueError, match="power must be positive, got 0"):
        PIA(power=0)
    with pytest.raises(ValueError, match="spread must be at least 0, got -1"):
        LossAttack(spread=-1)
    with pytest.raises(ValueError, match=r"no two of one name, got \['pia', 'pia'\]"):
        Memberships([PIA(), PIA(power=2)])
    labelled = replace(closed_form(), num_classes=3)
    with pytest.raises(ValueError, match="conditioned on 3 classes: it is asked about an image under a label"):
        PIA().side_errors(labelled, HELDOUT, {"none": ()}, "members", Workers())
