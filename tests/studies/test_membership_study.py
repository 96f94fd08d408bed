"""The study of membership: its rows and what each is given, and what is pooled from made-up records."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from tiny_study import TINY

from lightning_mem.data.plan import Row
from lightning_mem.records import Record
from lightning_mem.studies import MembershipStudy, Run
from lightning_mem.studies.recipe import deciding, parents_of


def files() -> dict[str, str]:
    protection = {"class_path": "CPSampleProtection", "init_args": {"tol": 0.5}}
    own = {
        "pool": {"data": {"num_members": 12}}, "shadow": {}, "attacks": {}, "lira": {},
        "repeated": {"data": {"num_members": 10, "duplicates": {"count": 2, "times": [2, 4]}}},
        "extraction": {}, "labels": {}, "protected": {"attack": {"init_args": {"protection": protection}}},
    }  # fmt: skip
    for name, content in own.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: f"{name}.yaml" for name in own}


def study(**changes: Any) -> MembershipStudy:
    at = files()
    options: dict[str, Any] = {
        "config": [str(TINY)], "attack": [at["attacks"]], "num_members": [8, 20], "pool": [at["pool"]],
        "shadow": [at["shadow"]], "lira": [at["lira"]], "shadows": 7, "seeds": [0, 4],
    }  # fmt: skip
    return MembershipStudy(**{**options, **changes})


def test_shadows_are_trained_on_splits_of_their_own_and_named_to_the_attack() -> None:
    own = study()
    rows = {row.name: row for row in own.rows()}
    assert list(rows) == [
        *("target_8_seed0", "attack_8_seed0", "target_20_seed0", "attack_20_seed0"),
        *("target_8_seed4", "attack_8_seed4", "target_20_seed4", "attack_20_seed4"),
        *("pool_seed0", *(f"shadow0{number}_seed0" for number in range(7)), "lira_seed0"),
    ]
    assert rows["target_20_seed4"].num_members == 20
    halves = [row for row in rows.values() if row.kind in ("pool", "shadow")]
    assert {row.num_members for row in halves} == {12}
    assert len({row.seed for row in rows.values() if row.verb == "fit" and row.kind != "target"}) == 8
    assert own.files(rows["shadow01_seed0"]) == [str(TINY), "pool.yaml", "shadow.yaml"]
    lira = rows["lira_seed0"]
    found = own.settings(lira, "runs", {name: Path("runs") / name for name in lira.needs})
    assert found["trainer"]["default_root_dir"] == "runs/pool_seed0"
    assert found["attack"]["init_args"]["shadows"] == [f"runs/shadow0{number}_seed0" for number in range(7)]
    attack = rows["attack_8_seed4"]
    found = own.settings(attack, "runs", {"target_8_seed4": Path("elsewhere")})
    assert (found["trainer"]["default_root_dir"], found["seed_everything"]) == ("elsewhere", 4)
    assert "attack" not in found


def test_repeats_are_trained_on_once_and_extracted_with_and_without_protection() -> None:
    at = files()
    repeats = {"repeated": [at["repeated"]], "extraction": [at["extraction"]]}
    shield = {"random_label": [at["labels"]], "protected": [at["protected"]]}
    own = study(num_members=[], shadows=0, seeds=[4], **repeats, **shield)
    rows = {row.name: row for row in own.rows()}
    assert list(rows) == ["repeated_seed4", "extraction_seed4", "labels_seed4", "protected_seed4"]
    assert rows["repeated_seed4"].num_members == 10
    assert own.files(rows["repeated_seed4"]) == [str(TINY), "repeated.yaml"]
    assert own.files(rows["protected_seed4"]) == ["extraction.yaml", "protected.yaml"]
    needed = {name: Path("else") / name for name in rows}
    labels = own.settings(rows["labels_seed4"], "runs", needed)
    assert labels["model"]["init_args"]["target"] == "else/repeated_seed4"
    assert (labels["data"]["num_members"], labels["data"]["seed"]) == (10, 4)
    attack = own.settings(rows["protected_seed4"], "runs", needed)
    assert attack["trainer"]["default_root_dir"] == "else/repeated_seed4"
    protection = attack["attack"]["init_args"]["protection"]
    assert protection == {
        "class_path": "CPSampleProtection", "init_args": {"tol": 0.5, "random_label": "else/labels_seed4"},
    }  # fmt: skip
    assert "attack" not in own.settings(rows["extraction_seed4"], "runs", needed)
    for part in ({"repeated": [at["repeated"]]}, {**repeats, "protected": [at["protected"]]}, shield):
        with pytest.raises(ValueError, match="random_label and protected need each other and repeated"):
            study(**part)


def test_repeats_are_reported_by_protection(tmp_path: Path) -> None:
    at = files()
    own = study(num_members=[], shadows=0, repeated=[at["repeated"]], extraction=[at["extraction"]])
    about = {"rule": "rms_l2", "cut": 0.15, "attacker": "none"}
    runs = [run("repeated", 0, [record("memorization/ratio", 0.3)])]
    for row, protection, shares in (("extraction", "none", (0.1, 0.8)), ("protected", "cpsample", (0.05, 0.25))):
        by = [
            record(
                "attack/extraction/images_by_repeats", share, **{**about, "protection": protection, "repeats": times}
            )
            for times, share in zip((1, 8), shares, strict=True)
        ]
        runs.append(run(row, 0, by))
    found = own.report(runs, tmp_path)
    assert {(r.definition["training"], r.definition["num_members"]) for r in found} == {("repeated", 10)}
    table = (tmp_path / "membership.md").read_text()
    assert "| protection | rule | 1 times | 8 times |" in table
    assert "| cpsample | rms_l2 0.15 | 0.050 [0.000, 0.100] | 0.250" in table
    assert (tmp_path / "repeats.png").read_bytes().startswith(b"\x89PNG")


def test_lira_counts_by_what_made_its_shadows_wherever_they_lie() -> None:
    def config(*shadows: str) -> dict[str, Any]:
        attack = {"class_path": "LiRA", "init_args": {"shadows": list(shadows), "mode": "online"}}
        return {"seed_everything": 0, "model": {}, "data": {}, "trainer": {"default_root_dir": "t"}, "attack": attack}

    made_by = {"t": "target", "a/one": "recipe 1", "b/one": "recipe 1", "a/two": "recipe 2"}.__getitem__
    assert parents_of(config("a/one", "a/two")) == ["a/one", "a/two", "t"]
    assert deciding(config("a/one", "a/two"), made_by) == deciding(config("b/one", "a/two"), made_by)
    assert deciding(config("a/one"), made_by) != deciding(config("a/two"), made_by)


def record(name: str, value: float, step: int = 9, unit: str = "fraction", **definition: Any) -> Record:
    about = {"protection": "none", "attacker": "fixed", "t": 100, "num_members": 8, "num_heldout": 24, **definition}
    return Record(name, value, 32, step, value - 0.05, value + 0.05, "ema", unit=unit, definition=about)


def run(row: str, seed: int, records: list[Record]) -> Run:
    kind = row.partition("_")[0]
    return Run(Row(f"{row}_seed{seed}", seed, 8, kind=kind), Path("x"), {}, records)


def test_seeds_are_pooled_under_the_size_of_the_target(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = []
    for seed, auc in ((0, 0.9), (4, 0.96)):
        runs.append(run("target_8", seed, [record("memorization/ratio", 0.5)]))
        calibrated = {"attacker": "calibrated", "t": 50 + seed, "sign": 1, "num_members": 4, "num_heldout": 12}
        own = [record("attack/pia/auc", auc), record("attack/pia/auc", auc - 0.1, **calibrated)]
        own += [record("attack/pia/auc_curve", auc - 0.2 + step / 100, step) for step in (3, 9)]
        own.append(record("attack/pia/evaluations", 2.0, unit="denoiser calls"))
        runs.append(run("attack_8", seed, own))
    runs.append(run("pool", 0, []))
    runs.append(run("lira", 0, [record("attack/lira/auc", 0.8)]))
    found = study().report(runs, tmp_path)
    fixed, calibrated = (r for r in found if r.name == "attack/pia/auc")
    assert fixed.value == pytest.approx(0.93)
    assert (fixed.definition["num_members"], fixed.definition["seeds"], fixed.n) == (8, 2, 64)
    half = stats.t.ppf(0.975, 1) * 0.03 * math.sqrt(2) / math.sqrt(2)
    assert fixed.low == pytest.approx(0.93 - half)
    assert fixed.high == 1.0
    assert calibrated.value == pytest.approx(0.83)  # one attacker, whatever t it picked
    assert "t" not in calibrated.definition
    assert (calibrated.definition["num_members"], calibrated.definition["tested_num_members"]) == (8, 4)
    curve = {r.step: r.value for r in found if r.name == "attack/pia/auc_curve"}
    assert curve == {3: pytest.approx(0.76), 9: pytest.approx(0.82)}
    assert {r.definition["num_members"] for r in found if r.name.startswith("attack/lira")} == {12}
    assert next(r for r in found if r.name == "attack/lira/auc").low == 0.75  # one seed keeps its own interval
    assert next(r.value for r in found if r.name == "memorization/ratio") == 0.5
    assert len({r.identity for r in found}) == len(found)
    table = (tmp_path / "membership.md").read_text()
    assert "| 8 | pia | fixed | 100 | 0.930" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "membership.png").read_bytes().startswith(b"\x89PNG")


def test_agreeing_seeds_do_not_make_an_interval_of_nothing(tmp_path: Path) -> None:
    runs = [run("attack_8", seed, [record("attack/pia/auc", 0.7)]) for seed in (0, 1, 2)]
    found = study(shadows=0).report(runs, tmp_path)[0]
    assert found.low == pytest.approx(0.7 - 0.05 / math.sqrt(3))
    assert found.high == pytest.approx(0.7 + 0.05 / math.sqrt(3))


def test_what_cannot_be_studied_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_members must increase .* got \[20, 8\]"):
        study(num_members=[20, 8])
    with pytest.raises(ValueError, match=r"shadows must be at least 7 for LiRA \(online, global .* pool of 36, got 6"):
        study(shadows=6)
    with pytest.raises(ValueError, match=r"shadows needs files for pool and lira, got pool None"):
        study(pool=None)
    with pytest.raises(ValueError, match=r"all must exist; missing: \['none.yaml'\]"):
        study(lira=["none.yaml"])
    with pytest.raises(ValueError, match="num_members must hold at least one size, or shadows or repeated be given"):
        study(num_members=[], shadows=0)
