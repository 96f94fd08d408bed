"""Studies of protections: their chains of rows, what they pool from planted records, and what a calibration picks."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from tiny_study import TINY

from lightning_mem.data.plan import Row
from lightning_mem.metrics import wilson_interval
from lightning_mem.records import Record
from lightning_mem.studies import ProtectionCalibration, ProtectionTable, Run, Settings
from lightning_mem.studies.protection_pool import of_arm, pooled

N = 1000
CPSAMPLE = {"class_path": "x.CPSampleProtection", "init_args": {"random_label": "one", "scale": 2.0}}
SIDE = {"class_path": "x.SurrogateGuidance", "init_args": {"surrogate": "?"}}
DISTANCE = {"none": 0.5, "cpsample": 0.6, "weak": 0.5, "far": 2.0}


def table(**changes: Any) -> ProtectionTable:
    own: dict[str, Any] = {
        "config": [str(TINY)], "random_label": [str(TINY)], "attack": [str(TINY)], "surrogate": [str(TINY)],
        "loss": [str(TINY)], "num_members": 20, "protections": Settings({"cpsample": CPSAMPLE}),
        "classifiers": Settings({"eight": {}, "one": {"model": {"init_args": {"num_labelings": 1}}}}),
        "guidances": Settings({"side": SIDE}), "trainings": Settings({"early_stop": {"trainer": {"max_steps": 5}}}),
        "settings": {"copies": "cpsample"}, "seeds": [3],
    }  # fmt: skip
    return ProtectionTable(**{**own, **changes})


def planted(ratios: dict[str, float], training: str = "plain", zs: dict[str, float] | None = None) -> list[Record]:
    """Records of one attack on one target: copies, distances and z of its unguided arms."""
    found = []
    for protection, ratio in ratios.items():
        about = {"attack": "unguided", "protection": protection, "training": training, "setting": ""}

        def record(name: str, value: float, unit: str = "fraction", ends: Any = (None, None), **more: Any) -> Record:
            definition = {**about, **more}  # noqa: B023 (called at once)
            return Record(f"defense/{protection}/{name}", value, N, 12, *ends, "ema", unit=unit, definition=definition)  # noqa: B023

        found.append(record("ratio", ratio, ends=wilson_interval(round(ratio * N), N), threshold=1 / 3))
        distance = DISTANCE[protection] * (2 if training != "plain" else 1)
        ends = (distance / 1.1, distance * 1.1)
        found.append(record("frechet/pixels/heldout", distance, "squared distance", ends, extractor="pixels"))
        for t, z in ((100, 9.0), (200, (zs or {}).get(protection, 30.0))):
            more = {"attacker": "fixed", "t": t}
            found.append(record("z", z, "standard errors", (z - 1.96, z + 1.96), **more))
        if protection != "none":
            value = distance / DISTANCE["none"]
            found.append(record("frechet_ratio", value, "ratio", (value / 1.05, value * 1.05), extractor="pixels"))
    floor = {"training": training, "setting": "", "queries": "fresh images", "extractor": "pixels", "bank_size": 9}
    found.append(Record("defense/floor/fresh", 0.1, 50, 12, None, None, "ema", definition=floor))
    return found


def attack(seed: int, records: list[Record], training: str = "plain") -> Run:
    row = Row(f"attack_seed{seed}", seed=seed, verb="attack", needs=("target",), kind=f"attack:{training}")
    return Run(row, Path(), {}, records)


def test_a_chain_builds_each_classifier_on_the_target_and_attacks_every_training() -> None:
    study = table()
    rows = {row.name: row for row in study.rows()}
    assert list(rows) == [
        "target_seed3", "eight_seed3", "one_seed3", "surrogate_seed3", "attack_seed3", "loss_copies_seed3",
        "target_early_stop_seed3", "surrogate_early_stop_seed3", "attack_early_stop_seed3",
    ]  # fmt: skip
    needed = {name: Path("runs") / name for name in rows}
    early = study.settings(rows["target_early_stop_seed3"], "runs", {})
    assert (early["trainer"]["max_steps"], early["data"]["num_members"]) == (5, 20)
    one = study.settings(rows["one_seed3"], "runs", {"target_seed3": needed["target_seed3"]})
    assert one["model"]["init_args"] == {"num_labelings": 1, "target": "runs/target_seed3"}
    assert one["data"] == {"seed": 3, "num_members": 20}
    whole = {name: needed[name] for name in rows["attack_seed3"].needs}
    own = study.settings(rows["attack_seed3"], "runs", whole)["attack"]["init_args"]
    assert own["protections"]["cpsample"]["init_args"] == {"random_label": "runs/one_seed3", "scale": 2.0}
    assert own["guidances"]["side"]["init_args"] == {"surrogate": "runs/surrogate_seed3"}
    loss = study.settings(rows["loss_copies_seed3"], "runs", whole)["attack"]["init_args"]
    assert loss["protection"]["init_args"]["random_label"] == "runs/one_seed3"
    assert loss["setting"] == "copies"
    others = {name: needed[name] for name in rows["attack_early_stop_seed3"].needs}
    own = study.settings(rows["attack_early_stop_seed3"], "runs", others)["attack"]["init_args"]
    assert (own["training"], own["protections"]) == ("early_stop", {})
    assert own["guidances"]["side"]["init_args"] == {"surrogate": "runs/surrogate_early_stop_seed3"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "seeds"),
        ({"random_label": ["nowhere.yaml"]}, "nowhere.yaml"),
        ({"protections": Settings({"cpsample": {"scale": 1.0}})}, "class_path"),
        ({"classifiers": Settings({"eight": {}})}, "classifiers are"),
        ({"settings": {"copies": "amg"}}, "must name protections"),
        ({"surrogate": None}, "surrogate"),
        ({"trainings": Settings({"plain": {}})}, "trainings"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(**changes)


def test_the_reduction_is_that_of_the_pooled_shares_and_no_copy_counts_as_one_of_an_arm() -> None:
    runs = [attack(s, planted({"none": base, "cpsample": 0.0})) for s, base in enumerate((0.2, 0.3, 0.4))]
    records = pooled(runs)
    base, own = (of_arm(records, name, "ratio") for name in ("none", "cpsample"))
    found = of_arm(records, "cpsample", "copy_reduction")
    assert base is not None
    assert own is not None
    assert found is not None
    assert base.value == pytest.approx(0.3)
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert (base.low, base.high) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    upper = wilson_interval(0, 3 * N)[1]
    assert (own.low, own.high) == (0, pytest.approx(upper))
    assert found.value == pytest.approx(0.3 * N)
    assert found.low == pytest.approx(base.low / max(upper, 1 / N))
    assert found.high == pytest.approx(base.high * N)


def test_frechet_ratios_are_geometric_means_and_of_other_trainings_with_both_errors() -> None:
    runs = [attack(s, planted({"none": 0.2, "cpsample": 0.01})) for s in (0, 1)]
    runs += [attack(s, planted({"none": 0.1}, "early_stop"), "early_stop") for s in (0, 1)]
    records = pooled(runs)
    found = of_arm(records, "cpsample", "frechet_ratio")
    assert found is not None
    assert found.value == pytest.approx(1.2)
    assert found.high == pytest.approx(1.2 * 1.05 ** (1 / math.sqrt(2)))  # the seeds agree: the samples' errors, pooled
    other = of_arm(records, "early_stop", "frechet_ratio")
    assert other is not None
    assert other.value == pytest.approx(2)
    assert other.high == pytest.approx(2 * 1.1)  # sqrt(2) log 1.1 of a seed, over sqrt(2) for two seeds
    early = of_arm(records, "early_stop", "copy_reduction")
    assert early is not None
    assert early.value == pytest.approx(2)


def test_z_is_a_mean_that_is_never_surer_than_the_images_of_all_seeds() -> None:
    z = of_arm(pooled([attack(s, planted({"none": 0.2})) for s in range(4)]), "none", "z", attacker="fixed", t=100)
    assert z is not None
    assert (z.value, z.low, z.high) == (9, pytest.approx(9 - 1.96 / 2), pytest.approx(9 + 1.96 / 2))


def test_the_table_is_written_with_a_row_an_arm(tmp_path: Path) -> None:
    runs = [attack(s, planted({"none": 0.2, "cpsample": 0.0})) for s in (0, 1)]
    runs += [attack(0, planted({"none": 0.1}, "early_stop"), "early_stop")]
    table().report(runs, tmp_path)
    text = (tmp_path / "protections.md").read_text()
    for word in ("none", "cpsample", "early_stop"):
        assert f"| unguided | {word} |" in text
    assert "of fresh images (100) to held-out images (9), pixels: 0.1" in text
    assert (tmp_path / "frontier.png").stat().st_size > 1000


# --- calibration ---------------------------------------------------------------------------------------------------


def calibration(**changes: Any) -> ProtectionCalibration:
    own: dict[str, Any] = {
        "config": [str(TINY)], "random_label": [str(TINY)], "attack": [str(TINY)], "num_members": 20, "seeds": [0],
        "grid": {"scale": [1.0, 2.0, 4.0]}, "target_reduction": 20.0,
    }  # fmt: skip
    return ProtectionCalibration(**{**own, **changes})


def run_of(study: ProtectionCalibration, points: list[tuple[float, float, float]]) -> Run:
    """An attack whose arms have these ratios, Fréchet ratios and z, in the order of the grid."""
    names = list(study.points)
    found = planted({"none": 0.4})
    for name, (ratio, frechet, z) in zip(names, points, strict=True):
        DISTANCE[name] = 0.5 * frechet
        found += planted({name: ratio}, zs={name: z})
    return attack(0, found)


def test_the_least_loss_that_reaches_the_target_is_picked_and_written(tmp_path: Path) -> None:
    study = calibration()
    study.report([run_of(study, [(0.1, 1.05, 20.0), (0.01, 1.2, 5.0), (0.0, 1.5, -1.0)])], tmp_path)
    written = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())["protections"]
    assert written["copies"]["init_args"] == {"random_label": "random_label", "scale": 2.0}
    assert written["membership"]["init_args"]["scale"] == 4.0
    assert (tmp_path / "calibration.png").stat().st_size > 1000


def test_a_limit_on_quality_picks_the_largest_reduction_within_it(tmp_path: Path) -> None:
    study = calibration(max_frechet_ratio=1.3)
    study.report([run_of(study, [(0.1, 1.05, 20.0), (0.05, 1.2, 5.0), (0.0, 1.5, 3.0)])], tmp_path)
    written = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())["protections"]
    assert list(written) == ["copies"]
    assert written["copies"]["init_args"]["scale"] == 2.0


def test_a_target_that_memorizes_fully_gets_no_setting_but_the_closest_named(tmp_path: Path) -> None:
    study = calibration()
    study.report([run_of(study, [(0.39, 1.0, 50.0), (0.35, 1.2, 40.0), (0.36, 1.5, -30.0)])], tmp_path)
    text = (tmp_path / "calibration.md").read_text()
    assert text.count("NO SETTING") == 2
    assert "the closest is random_label_2.0" in text
    assert "the closest is random_label_4.0" in text
    assert yaml.safe_load((tmp_path / "calibrated.yaml").read_text()) == {"protections": {}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {}}, "grid must name"),
        ({"grid": {"scale": [1.0, 1.0]}}, "must not repeat"),
        ({"target_reduction": 0.5}, "at least 1"),
        ({"max_frechet_ratio": 0.0}, "positive"),
    ],
)
def test_a_calibration_that_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibration(**changes)
