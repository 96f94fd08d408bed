"""SIDE on planted copies and on exact targets: its numbers by hand, its arms from one noise, and what it refuses."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from victim import patterns, scene_of, write_labels, write_surrogate, write_target

from lightning_mem.attacks import SIDE, Clusters, PseudoLabels
from lightning_mem.attacks.guided import draw_targets
from lightning_mem.attacks.side import take_in_turn
from lightning_mem.attacks.side_report import arms_table
from lightning_mem.attacks.side_scores import Arm, score_arms
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import Measure, Reference
from lightning_mem.metrics import PixelsExtractor
from lightning_mem.modules import load_target
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

MEMBERS, HELDOUT = patterns(40), patterns(60, 1)


def by_arm(records: list[Record]) -> dict[tuple[str, str], Record]:
    found = {(r.definition["surrogate"], r.name.removeprefix("attack/side/")): r for r in records}
    assert len(found) == len(records)  # each once
    assert len({record.identity for record in records}) == len(records)
    return found


# --- targets and selection -----------------------------------------------------------------------------------------


def test_targets_are_drawn_in_proportion_and_by_address() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0])
    found = draw_targets(weights, torch.arange(4000), seed=3)
    counts = torch.bincount(found, minlength=4).numpy()
    assert counts[1] == 0
    expected = 4000 * np.array([1, 2, 5]) / 8
    assert stats.chisquare(counts[[0, 2, 3]], expected).pvalue > 0.01
    assert torch.equal(draw_targets(weights, torch.arange(20, 50), seed=3), found[20:50])
    assert not torch.equal(draw_targets(weights, torch.arange(50), seed=4), found[:50])
    with pytest.raises(ValueError, match="at least 0 and not all 0"):
        draw_targets(torch.tensor([-1.0, 2.0]), torch.arange(4), 0)


def test_each_wanted_class_takes_the_next_sample_that_serves_it() -> None:
    classes = torch.tensor([2, -1, 0, 2, 0, 1])
    wanted = torch.tensor([0, 2, 1, 1, 2, 2, 0])
    assert take_in_turn(classes, wanted).tolist() == [2, 0, 5, 3, 4]


# --- scores on planted copies --------------------------------------------------------------------------------------


def planted(copies: list[int], n: int, seed: int) -> SampleSet:
    """n new images, of which the first are copies of these members, one pixel a level off."""
    images = patterns(n, seed)
    images[: len(copies)] = MEMBERS[copies]
    images[: len(copies), 0, 0, 0] ^= 1
    return SampleSet(images, torch.arange(n), None, "raw", {"sample_seed": 0})


def scored(arms: list[Arm], heldout: Tensor = HELDOUT) -> dict[tuple[str, str], Record]:
    measure = Measure(Reference.from_images(MEMBERS, heldout), metrics=("ratio", "copied_images", "scores"))
    scores = score_arms(arms, measure, step=3, config_digest="c", run="r", seed=0)
    return by_arm([record for score in scores for record in score.records])


def test_hits_are_the_planted_share_and_distinct_images_the_planted_rows() -> None:
    unguided, guided = (
        planted([1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9], 60, 2),
        planted(list(range(10, 28)) + [9] * 6, 60, 3),
    )
    found = scored([Arm("none", unguided, 600.0, paired=True), Arm("trained", guided, 1200.0, paired=True)])
    assert found["none", "hits"].value == 12 / 60
    assert found["trained", "hits"].value == 24 / 60
    assert found["trained", "hits_heldout"].value == 0
    assert found["none", "unique_images"].value == 9
    assert found["trained", "unique_share"].value == pytest.approx(19 / 60)
    assert found["trained", "hits_per_evaluation"].value == pytest.approx(24 / 1200)
    assert found["trained", "unique_per_evaluation"].value == pytest.approx(19 / 1200)
    assert found["trained", "ams_gain"].value == pytest.approx(2.0)
    assert found["trained", "ams/pixels/high"].value == 24 / 60
    assert found["trained", "ums/pixels/high"].value == pytest.approx(19 / 60)
    assert {key for key in found if key[0] == "none" and "gain" in key[1]} == set()
    assert found["trained", "hits"].definition["rule"].startswith("nearest / second nearest < 0.3333")
    assert all(record.step == 3 and record.run == "r" for record in found.values())
    # the interval of a ratio of paired shares, by the delta method
    a, b = (torch.arange(60) < k for k in (24, 12))
    influence = a.double() / a.double().mean() - b.double() / b.double().mean()
    error = 2.0 * float(influence.std()) / 60**0.5
    gain = found["trained", "ams_gain"]
    assert gain.low is not None
    assert gain.high is not None
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * error, rel=0.35)
    assert gain.low < 2.0 < gain.high


def test_a_gain_over_nothing_has_no_value() -> None:
    arms = [Arm("none", planted([], 40, 2), 1.0, paired=True), Arm("trained", planted([1, 2], 40, 3), 1.0, paired=True)]
    gain = scored(arms)["trained", "ams_gain"]
    assert gain.value is None
    assert gain.definition["undefined"] == "the unguided arm has no hit"


def test_the_gain_of_a_selection_is_that_of_its_rows_over_its_pool() -> None:
    pool = planted(list(range(20)), 80, 2)
    places = torch.arange(10, 30)  # ten of the copies, ten others
    chosen = SampleSet(pool.images[places], pool.addresses[places], None, "raw", pool.settings)
    targets = torch.zeros(20, dtype=torch.int64)
    selection = Arm("selection", chosen, 80.0, targets=targets, places=places, pool=pool)
    found = scored([Arm("none", pool, 80.0, paired=True), selection])
    assert found["selection", "hits"].value == 0.5
    assert found["selection", "ams_gain"].value == pytest.approx(0.5 / 0.25)
    assert found["selection", "ams_gain"].definition["base_samples"] == 80
    assert found["selection", "hits_per_evaluation"].value == pytest.approx(10 / 80)


def test_a_guided_arm_is_compared_with_the_selection_that_cost_as_much() -> None:
    pool, guided = planted(list(range(20)), 80, 2), planted(list(range(32)), 80, 3)
    places = torch.arange(10, 30)
    chosen = SampleSet(pool.images[places], pool.addresses[places], None, "raw", pool.settings)
    arms = [Arm("none", pool, 80.0, paired=True), Arm("trained", guided, 80.0, paired=True)]
    fair = Arm("selection_equal_cost", chosen, 80.0, targets=torch.zeros(20).long(), places=places, pool=pool)
    found = scored([*arms, fair])
    over = found["trained", "gain_over_selection"]
    assert over.value == pytest.approx(0.4 / 0.5)
    # the logarithm of a ratio of two independent shares, by the delta method
    error = (0.6 / 0.4 / 80 + 0.5 / 0.5 / 20) ** 0.5
    assert over.low is not None
    assert over.high is not None
    assert np.log(over.high / over.low) == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert ("none", "gain_over_selection") not in found


def test_a_selection_that_picks_nothing_says_so() -> None:
    pool = planted([1], 20, 2)
    empty = SampleSet(pool.images[:0], pool.addresses[:0])
    found = scored([Arm("none", pool, 1.0, paired=True), Arm("selection", empty, 1.0, pool=pool)])
    assert found["selection", "hits"].value is None
    assert "kept cluster" in found["selection", "hits"].definition["undefined"]
    arms_table(list(found.values()))


# --- the attack on an exact target ---------------------------------------------------------------------------------

PROCESS = DiffusionProcess("cosine", num_timesteps=100)
OPTIONS: dict[str, Any] = {
    "closed_form": True, "labels_file": "labels.npz", "guidance_scale": 1.0, "num_samples": 70, "num_steps": 5,
    "sample_seed": 0, "cost_ratio": 0.5, "pictures": False, "cache_dir": None,
}  # fmt: skip


def exact_scene(dropped: int = 1) -> Any:
    """A target that copies its 8 images; each is a cluster of its own, and the first is dropped."""
    images = MEMBERS[:8]
    model = EmpiricalDenoiser(images, PROCESS).target()
    model.digest = "exact"
    labels = torch.arange(8) - dropped
    labels[:dropped] = 8 - dropped
    features = PixelsExtractor()(images)
    write_labels(Path("labels.npz"), images, labels, list(range(dropped, 8)), features, "exact")
    return scene_of(model, MEMBERS, HELDOUT)


def attacked(scene: Any, **options: Any) -> list[Record]:
    attack = SIDE(**OPTIONS | options)
    attack.identity(scene.target, "oracle", scene.home)
    return attack.run(scene)


def samples_of(arm: str) -> list[dict[str, str]]:
    with Path(f"results/tables/samples_{arm}.csv").open() as file:
        return list(csv.DictReader(file))


def test_guidance_by_the_posterior_reaches_the_drawn_cluster_and_the_wrong_sign_leaves_it() -> None:
    found = by_arm(attacked(exact_scene()))
    rows = samples_of("closed_form")
    assert np.mean([int(row["index"]) == int(row["target"]) + 1 for row in rows]) > 0.9
    assert found["none", "hits"].value == 1
    assert found["closed_form", "unique_images"].value == 7
    assert {row["target"] for row in rows} == {str(k) for k in range(7)}
    attacked(exact_scene(), guidance_scale=-1.0)
    assert (
        np.mean([int(row["index"]) == int(row["target"]) + 1 for row in samples_of("closed_form")]) < 0.05
    )  # unguided: 1/8


def test_without_guidance_the_arms_are_equal_to_the_bit() -> None:
    found = by_arm(attacked(exact_scene(), guidance_scale=0.0))
    assert found["closed_form", "ams_gain"].value == 1
    assert [row["index"] for row in samples_of("closed_form")] == [row["index"] for row in samples_of("none")]
    assert found["closed_form", "hits_per_evaluation"].value == found["none", "hits_per_evaluation"].value


def test_selection_takes_what_falls_into_kept_clusters_at_what_the_guided_arm_cost() -> None:
    scene = exact_scene(dropped=3)
    found = by_arm(attacked(scene, interval=[20, 100]))
    # five trailing steps of 100: 80, 60, 40, 20, 0; four of them guided
    assert found["closed_form", "hits_per_evaluation"].value == pytest.approx(70 / (70 * (5 + 4 * 0.5)))
    chosen = [row for row in samples_of("none") if int(row["index"]) >= 3]
    assert [row["address"] for row in samples_of("selection")] == [row["address"] for row in chosen]
    assert found["selection", "hits"].n == len(chosen)
    drawn = found["selection_equal_cost", "hits"].definition["drawn"]
    assert drawn == round(70 * 7 / 5)
    assert found["selection_equal_cost", "hits_per_evaluation"].value == pytest.approx(
        found["selection_equal_cost", "hits"].n / (drawn * 5)
    )
    counts = np.bincount([int(row["target"]) for row in samples_of("selection_equal_cost")], minlength=5)
    wanted = np.bincount(draw_targets(torch.ones(5), torch.arange(70), 0), minlength=5)
    assert (counts <= wanted).all()
    with Path("results/tables/clusters.csv").open() as file:
        clusters = [row for row in csv.DictReader(file) if row["arm"] == "selection_equal_cost"]
    assert [int(row["samples"]) for row in clusters] == counts.tolist()


def test_targets_follow_the_numbers_of_the_clusters() -> None:
    attacked(exact_scene(), targets="size", num_samples=200, selection=False, guidance_scale=0.0)
    counts = np.bincount([int(row["target"]) for row in samples_of("closed_form")], minlength=7)
    sizes = np.arange(1, 8)
    assert stats.chisquare(counts, 200 * sizes / sizes.sum()).pvalue > 0.01


def test_the_cost_of_a_classifier_is_measured_once() -> None:
    scene = exact_scene()
    first = by_arm(attacked(scene, cost_ratio=None))
    again = by_arm(attacked(scene_of(scene.target, MEMBERS, HELDOUT), cost_ratio=None))
    assert first["closed_form", "hits"].definition["cost_ratio"] > 0
    assert {r.identity for r in first.values()} == {r.identity for r in again.values()}


def test_nothing_is_drawn_once_the_training_images_were_read() -> None:
    scene = exact_scene()
    read = []
    object.__setattr__(scene, "read", lambda: read.append(1) or Reference.from_images(MEMBERS, HELDOUT))
    scene.draw("unguided", 3, seed=0, num_steps=2)
    assert read == []
    scene.reference()
    scene.reference()
    assert read == [1]
    with pytest.raises(RuntimeError, match="draws all its samples before scoring"):
        scene.draw("unguided", 3, seed=0, num_steps=2)


def test_pictures_show_the_law_the_arms_and_the_bands() -> None:
    attacked(exact_scene(), pictures=True, selection=False)
    drawn = {path.name for path in Path("results/images").iterdir()}
    assert {"unique.png", "arms.png", "pairs_none_pixels_high.png", "pairs_closed_form_pixels_high.png"} <= drawn


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_surrogate_of_another_target_or_kind_or_labelling_is_refused(target: str) -> None:
    model = load_target(target)
    images = patterns(6)
    features = PixelsExtractor()(images)
    write_labels(Path("labels.npz"), images, torch.arange(6) // 2, [0, 1, 2], features[::2], model.digest)
    own = {"images_digest": SampleSet.load("labels.npz").digest}
    scene = scene_of(model, MEMBERS, HELDOUT)

    def refused(message: str, scene: Any = scene, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            attacked(scene, closed_form=False, num_steps=2, num_samples=4, **options)

    other = load_target(write_target(Path("other"), seed=1))
    trained = write_surrogate(target, 3, own)
    refused(
        f"was trained for the target {model.digest}, but oracle is {other.digest}",
        scene_of(other, MEMBERS, HELDOUT),
        surrogate=trained,
    )
    refused("holds no pseudo-labels of the target", scene_of(other, MEMBERS, HELDOUT))
    refused(
        "is a time-independent classifier: give it as time_independent",
        surrogate=write_surrogate(target, 3, own, False),
    )
    refused(
        "was trained on the labelled images other", surrogate=write_surrogate(target, 4, {"images_digest": "other"})
    )
    refused("are not in home/pseudo_labels: say where", surrogate=trained, labels_file=None)


def test_trained_surrogates_guide_from_the_labels_they_were_trained_on(target: str) -> None:
    model = load_target(target)
    images = patterns(6)
    folder = Path("home/pseudo_labels")
    labels = folder / "labels-0.npz"
    write_labels(labels, images, torch.arange(6) // 2, [0, 1, 2], PixelsExtractor()(images)[::2], model.digest)
    own = {"images_digest": SampleSet.load(labels).digest}
    options = {"surrogate": write_surrogate(target, 3, own), "time_independent": write_surrogate(target, 3, own, False)}
    scene = scene_of(model, MEMBERS, HELDOUT)
    found = by_arm(attacked(scene, **options, labels_file=None, num_steps=2, num_samples=6, guidance_scale=5.0))
    arms = ["none", "trained", "time_independent", "closed_form", "selection", "selection_equal_cost"]
    assert list(dict.fromkeys(arm for arm, _ in found)) == arms
    settings = [found[arm, "hits"].definition.get("guidance_classifier") for arm in arms[:4]]
    assert settings[0] is None
    assert len(set(settings)) == 4
    assert len({found[arm, "hits"].definition.get("guidance_labels") for arm in arms[1:4]}) == 1


def test_an_attack_that_knows_no_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match="SIDE needs clusters of generated images"):
        SIDE(closed_form=True)
    with pytest.raises(ValueError, match="not both"):
        SIDE(pseudo_labels=PseudoLabels(extractor="pixels"), labels_file="labels.npz")
    for options, message in (({"num_samples": 1}, "num_samples must"), ({"cost_ratio": -1.0}, "cost_ratio must")):
        with pytest.raises(ValueError, match=message):
            SIDE(**OPTIONS | options)


def test_the_file_of_another_extractor_is_refused() -> None:
    scene = exact_scene()
    samples = SampleSet.load("labels.npz")
    samples.settings["extractor_digest"] = "another"
    samples.save("labels.npz")
    with pytest.raises(ValueError, match="were made with pixels another"):
        attacked(scene)
    assert Clusters.load(Path("labels.clusters.npz")).kept.tolist() == list(range(1, 8))
