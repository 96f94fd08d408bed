"""Every attack under every protection: ratios by hand, calls counted, and targets whose answers are known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from rich.console import Console
from scipy import linalg, stats
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import LossAttack, Protections, copy_reduction, frechet_ratio
from lightning_mem.attacks.protection_costs import measure_costs, middle
from lightning_mem.attacks.protection_picture import chosen_addresses, framed
from lightning_mem.defenses import NearestRejection
from lightning_mem.defenses.rejection import NoCopy
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition, Judge
from lightning_mem.evaluation import blocks
from lightning_mem.records import Record

MEMBERS, HELDOUT = patterns(12), patterns(16, 1)
DRAWING: dict[str, Any] = {"num_steps": 3, "sample_seed": 0, "timing_repeats": 1, "cache_dir": None}


class Push:
    """A score term that is a constant times the noised image, and counts calls that nobody makes."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.evaluations = self.network_evaluations = 0
        self.settings = {"protection": "push", "protection_scale": factor}

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        own = len(addresses.unique())
        self.evaluations += own
        self.network_evaluations += 2 * own
        return None if self.factor == 0 else self.factor * x_t


class Gated(Push):
    """The same with a classifier, which it goes back through at late steps only."""

    classifier, gradients = None, 0

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        self.gradients += len(addresses.unique()) * (int(t[0]) < 500)
        return super().__call__(x_t, t, addresses)


class Guide(Push):
    """The same with a classifier, which it goes back through each time, as guidance does."""

    classifier = None


class PushProtection(AbstractAddition):
    """By class_path."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        return [Push(self.factor)]


class NoCopies(NearestRejection):
    """Of the members above, which lie in no run folder."""

    def judge(self, target: Target, path: str) -> Judge:  # type: ignore[override]
        return NoCopy(MEMBERS)


def attack(target: Target, protections: dict[str, AbstractAddition], **options: Any) -> dict[tuple[str, ...], Record]:
    """Records by attack, protection and what they say; those of the loss attack with attacker and t."""
    own = Protections(protections, **{"num_samples": 48, "timesteps": [], **DRAWING, **options})
    scene = scene_of(target, MEMBERS, HELDOUT)
    own.identity(target, "nowhere", Path("home"))
    records = own.run(scene)
    assert len({record.identity for record in records}) == len(records)
    shown = Console(width=80, record=True)
    shown.print(own.table(records))
    assert "copies" in shown.export_text()
    found = {}
    for record in records:
        about, (_, protection, what) = record.definition, record.name.split("/", 2)
        more = (about["attacker"], str(about["t"])) if "t" in about else ()
        if protection != "floor":
            assert about["protection"] == protection
        found[(str(about.get("attack", "")), protection, what, *more)] = record
    return found


def empirical() -> Target:
    return EmpiricalDenoiser(MEMBERS, DiffusionProcess("linear")).target()


def planted() -> Target:
    return planted_mixture(MEMBERS, DiffusionProcess("linear"))


def test_all_is_a_copy_of_a_finite_set_and_rejection_by_nearest_image_accepts_nothing() -> None:
    found = attack(empirical(), {"reject": NoCopies(), "none-at-all": PushProtection(0.0)}, max_tries=3, pictures=False)
    for protection in ("none", "reject", "none-at-all"):
        assert found["unguided", protection, "ratio"].value == 1
        assert found["unguided", protection, "near_copies"].value == 1
        assert found["unguided", protection, "ratio_heldout"].value == 0
    assert found["unguided", "reject", "accepted"].value == 0
    assert found["unguided", "reject", "tries"].value == 3
    assert found["unguided", "reject", "copy_reduction"].value == 1
    # every draw is paid for
    assert found["unguided", "reject", "evaluations"].value == 9
    assert found["unguided", "none", "evaluations"].value == 3
    assert ("unguided", "none", "accepted") not in found


def test_a_protection_of_scale_0_is_no_protection_bit_for_bit() -> None:
    found = attack(planted(), {"off": PushProtection(0.0), "on": PushProtection(-0.5)}, timesteps=[30], pictures=False)
    assert 0.05 < found["unguided", "none", "ratio"].value < 0.8
    assert found["unguided", "off", "copy_reduction"].value == 1
    ratio = found["unguided", "off", "frechet_ratio"]
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    for what in ("ratio", "near_copies", "frechet/pixels/heldout", "precision/pixels/heldout"):
        assert found["unguided", "off", what].value == found["unguided", "none", what].value
    assert found["unguided", "on", "frechet_ratio"].value != 1
    for attacker in ("fixed", "calibrated"):
        key = ("z", attacker, "30")
        assert found["unguided", "off", *key].value == found["unguided", "none", *key].value
        assert found["unguided", "on", *key].value != found["unguided", "none", *key].value
    assert found["unguided", "off", "ratio"].definition["protection_method"] == "push"


def test_membership_is_that_of_the_loss_attack_on_the_same_noise() -> None:
    options: dict[str, Any] = {"timesteps": [30, 60], "pictures": False, "num_samples": 8}
    found = attack(planted(), {"push": PushProtection(-0.5)}, **options)
    loss = LossAttack(PushProtection(-0.5), timesteps=[30, 60], noise_seed=0)
    loss.identity(planted(), "nowhere", Path("home"))
    expected = loss.run(scene_of(planted(), MEMBERS, HELDOUT, Path("loss")))
    by_key = {
        (
            r.definition["protection"],
            r.name.removeprefix("attack/loss/"),
            r.definition["attacker"],
            r.definition["t"],
        ): r
        for r in expected
        if "t" in r.definition
    }
    told = {key[1:]: record for key, record in found.items() if "t" in record.definition}
    assert len(told) == 2 * 3 * 5
    for (protection, what, attacker, t), own in told.items():
        record = by_key[protection, what, attacker, int(t)]
        assert (own.value, own.low, own.high, own.n) == (record.value, record.low, record.high, record.n)


@pytest.mark.parametrize(
    ("base", "protected", "expected"),
    [
        ((0.5, 0.4, 0.6), (0.05, 0.02, 0.1), (10.0, 4.0, 30.0)),
        ((0.5, 0.4, 0.6), (0.0, 0.0, 0.02), (50.0, 20.0, 60.0)),  # no copy among 100 counts as one
        ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), (1.0, 0.4 / 0.6, 1.5)),
    ],
)
def test_the_reduction_of_copies_is_that_of_the_definition(base: Any, protected: Any, expected: Any) -> None:
    assert copy_reduction(base, protected, 100) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"must lie in its interval within \[0, 1\], got 0.5 in \[0.6, 0.7\]"):
        copy_reduction((0.5, 0.6, 0.7), protected, 100)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        copy_reduction(base, protected, 0)


def dense_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the definition, with scipy's matrix root."""
    s1, s2 = np.cov(a.T), np.cov(b.T)
    cross = np.trace(linalg.sqrtm(s1 @ s2).real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def test_the_interval_of_the_frechet_ratio_leaves_the_same_samples_out_of_both_arms() -> None:
    draw = np.random.default_rng(0)
    base, real = draw.normal(0.3, 1, (60, 3)), draw.normal(0, 1, (80, 3))
    own = base * 1.5 + draw.normal(0, 0.1, (60, 3))
    value, ends = frechet_ratio(*(torch.tensor(part) for part in (own, base, real)))
    assert value == pytest.approx(dense_frechet(own, real) / dense_frechet(base, real), rel=1e-6)
    without = []
    for block in range(20):
        rows = np.arange(60) % 20 != block
        without.append(math.log(dense_frechet(own[rows], real) / dense_frechet(base[rows], real)))
    half = stats.t.ppf(0.975, 19) * math.sqrt(19 / 20 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert ends == pytest.approx((value * math.exp(-half), value * math.exp(half)), rel=1e-5)
    assert frechet_ratio(torch.tensor(own[:39]), torch.tensor(base[:39]), torch.tensor(real))[1] is None
    with pytest.raises(ValueError, match="must have the same samples"):
        frechet_ratio(torch.tensor(own[:50]), torch.tensor(base), torch.tensor(real))


def test_calls_are_counted_without_padding_and_classifiers_only_where_there_are_some() -> None:
    settings = {"sampler": "ddim", "num_steps": 4, "eta": 0.0, "block": 64, "sample_seed": 0}
    judge: Any = NoCopy(MEMBERS)
    judge.classifier = None
    arms: Any = {
        "none": ((), None),
        "push": ([Gated(0.1)], None),
        "guide": ([Guide(0.1)], judge),
        "amg": ([Push(0.1)], None),
    }
    found = measure_costs(planted(), arms, settings, 10, 2, torch.device("cpu"))
    counts = {k: (c.evaluations, c.classifier_evaluations, c.classifier_gradients) for k, c in found.items()}
    times = DiffusionProcess("linear").scheduler("ddim", 4).timesteps
    late = int((times < 500).sum())
    assert counts == {"none": (4, 0, 0), "push": (12, 4, late), "guide": (12, 5, 4), "amg": (12, 0, 0)}
    assert all(len(cost.seconds) == 2 and min(cost.seconds) > 0 for cost in found.values())


def test_the_interval_of_a_median_has_the_confidence_that_it_says() -> None:
    value, ends, level = middle(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (value, ends) == (3, (1, 5))
    assert level == pytest.approx(1 - 2 / 2**5)
    _, ends, level = middle(torch.arange(9.0))
    assert ends == (1, 7)  # the second smallest and largest: 1 - 2 (1 + 9) / 2**9
    assert level == pytest.approx(1 - 20 / 512)


def test_a_stopped_attack_draws_and_times_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    scene = scene_of(planted(), MEMBERS, HELDOUT)

    def draw(file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[Any]) -> Any:
        if file.name not in kept:
            kept[file.name] = scene.blocks(file, first, count, settings, guidance)
        return kept[file.name]

    def records() -> list[Record]:
        own = Protections({"push": PushProtection(-0.5)}, num_samples=8, timesteps=[], pictures=False, **DRAWING)
        own.identity(scene.target, "nowhere", Path("home"))
        return own.run(replace(scene, blocks=draw, _read=[]))

    first = records()
    assert set(kept) == {"none@unguided.npz", "push@unguided.npz"}
    monkeypatch.setattr(blocks, "sample", None)
    again = records()
    assert [(r.name, r.value, r.low, r.high) for r in again] == [(r.name, r.value, r.low, r.high) for r in first]


def test_guided_arms_are_compared_with_the_same_attack_and_pictures_and_tables_are_written() -> None:
    found = attack(
        planted(),
        {"push": PushProtection(-0.5)},
        guidances={"pull": PushProtection(0.2)},
        training="plain",
        setting="x",
    )
    arms = {key[:2] for key in found if key[0]}
    assert arms == {(a, p) for a in ("unguided", "pull") for p in ("none", "push")}
    base, own = found["pull", "none", "ratio"], found["pull", "push", "ratio"]
    reduction = found["pull", "push", "copy_reduction"]
    assert reduction.value == base.value / max(own.value, 1 / 48)
    assert reduction.definition["setting"] == "x"
    assert found["pull", "push", "evaluations"].value == 3 * (1 + 2 + 2)
    assert found["", "floor", "members"].n == 12
    text = Path("results/tables/protections.md").read_text()
    assert text.count("\n| pull | ") == 2
    assert "held-out images (16), pixels" in text
    assert {path.name for path in Path("results/images").iterdir()} == {"gallery.png", "frontier.png"}
    assert len(Path("results/tables/samples_push@pull.csv").read_text().splitlines()) == 49


def test_copies_are_framed_and_half_of_the_gallery_where_there_are_enough() -> None:
    copied = torch.tensor([False, True, True, False, True, False, False])
    assert chosen_addresses(copied, 4).tolist() == [1, 2, 0, 3]
    assert chosen_addresses(torch.ones(7, dtype=torch.bool), 4).tolist() == [0, 1, 2, 3]
    shown = framed(MEMBERS[:2], torch.tensor([True, False]))
    assert shown.shape == (2, 3, 10, 10)
    assert shown[0, :, 0, 0].tolist() == [193, 39, 45]
    assert shown[1, :, 0, 0].tolist() == [255] * 3
    assert torch.equal(shown[0, 2, 1:-1, 1:-1], MEMBERS[0, 0])


def test_what_cannot_be_asked_is_refused() -> None:
    push = PushProtection(0.1)
    with pytest.raises(ValueError, match=r"names of protections must be made of letters.*got \['none'\]"):
        Protections({"none": push})
    with pytest.raises(ValueError, match=r"names of guidances must .*got \['a/b'\]"):
        Protections({}, {"a/b": push})
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        Protections({}, num_samples=1)
    with pytest.raises(ValueError, match=r"increasing order, got \[200, 100\]"):
        Protections({}, timesteps=[200, 100])
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got 1000: name others"):
        Protections({}, timesteps=[1000]).identity(planted(), "x", Path("x"))
    target = planted()
    identities = {
        Protections(given, num_samples=n, sample_seed=0).identity(target, "x", Path("x"))
        for given, n in (({}, 4), ({"a": push}, 4), ({"b": push}, 4), ({"a": PushProtection(0.2)}, 4), ({}, 5))
    }
    assert len(identities) == 5
    target.num_classes = 3
    with pytest.raises(ValueError, match="needs an unconditional target: timesteps"):
        Protections({}).identity(target, "x", Path("x"))
