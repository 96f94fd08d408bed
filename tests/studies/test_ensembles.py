"""The study of ensembles: who is trained on what, what is skipped and refused, and what is told of trained members."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from tiny_study import TINY, Trainings

from lightning_mem.attribution import Ensemble, UnitCodes
from lightning_mem.data.split import read_indices
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.records import Record
from lightning_mem.studies import EnsembleStudy, ReadConfig, Run, Settings, ensembles, runner
from lightning_mem.studies.ensembles_pool import pooled

PLAIN = {"data": {"num_heldout": 0, "flip": False}}


def study(**changes: Any) -> EnsembleStudy:
    own = {"config": [str(TINY)], "num_members": 6, "ensemble_size": 4, "overrides": Settings(PLAIN)}
    return EnsembleStudy(**{**own, **changes})


def closed_form(path: Path) -> Ensemble:
    """Members that are closed forms of the images their places name."""
    codes, data = UnitCodes.load(path), study().data(int(path.stem[-1]))
    place = {int(index): row for row, index in enumerate(data.members.indices)}
    members = (data.members.images[[place[i] for i in codes.seen_by(k)]] for k in range(codes.num_members))
    return Ensemble(tuple(EmpiricalDenoiser(own, DiffusionProcess()).target() for own in members), codes)


def test_members_are_trained_on_their_units_by_seeds_of_their_own_and_only_once(
    trainings: Trainings, read_config: ReadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings.stop_at["member02_seed0"] = 1
    with pytest.raises(SystemExit):
        runner.study(study(), "ensembles", read_config=read_config)
    assert trainings.rows == [f"member0{k}_seed0" for k in range(3)]
    trainings.stop_at.clear()
    monkeypatch.setattr(EnsembleStudy, "report", lambda self, runs, folder: [Record("all", len(runs), 1, 0)])
    runner.study(study(), "ensembles", read_config=read_config)
    assert trainings.rows[3:] == [f"member0{k}_seed0" for k in (2, 3)]
    codes = UnitCodes.load("ensembles/codes_seed0.json")
    drawn = study().data(0).members.indices.tolist()
    assert sorted(index for unit in codes.units for index in unit) == sorted(drawn)
    seeds = set()
    for k, name in enumerate(codes.members):
        seen = read_indices(f"ensembles/{name}/members.json", "members").tolist()
        assert sorted(seen) == [codes.units[unit][0] for unit in range(6) if codes.codes[unit, k]]
        assert len(seen) == 3
        config = read_config(["--config", f"ensembles/{name}/config.yaml"])
        assert config["data"]["members"] == f"ensembles/seen/{name}.json"
        assert config["seed_everything"] == config["data"]["seed"]
        seeds.add(config["seed_everything"])
    assert len(seeds) == 4


def test_duplicates_and_classes_can_be_units() -> None:
    own = study(units="class", num_members=40, ensemble_size=5).codes(0)
    assert own.kind == "class"
    assert len(own.units) == 10
    assert sum(map(len, own.units)) == 40
    near = study(units="duplicates", duplicates=0.15, num_members=40, ensemble_size=8).codes(0)
    assert len(near.units) < 40
    assert sum(map(len, near.units)) == 40


def test_what_cannot_be_an_ensemble_is_refused() -> None:
    with pytest.raises(ValueError, match="3 members have 3 balanced codes, fewer than the 6 units: use at least 4"):
        study(ensemble_size=3).rows()
    with pytest.raises(ValueError, match="ensemble_size must be at least 2, got 1"):
        study(ensemble_size=1)
    with pytest.raises(ValueError, match=r"seeds must hold at least one and none twice, got \[1, 1\]"):
        study(seeds=[1, 1])


def test_an_ensemble_is_explained_when_all_its_members_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Ensemble, "load", staticmethod(closed_form))
    monkeypatch.setattr(ensembles, "PICTURES", 1)
    own = study(seeds=[0, 3], num_samples=6, num_steps=1)
    runs = []
    for row in own.rows()[:-1]:
        own.settings(row, tmp_path, {})
        runs.append(Run(row, tmp_path / row.name, {"trainer": {"max_steps": 12}}, []))
    found = own.report(runs, tmp_path)
    assert "3 of the 4 members of seed 3 are trained: not explained yet" in capsys.readouterr().out
    assert len({record.identity for record in found}) == len(found)
    named: dict[str, list[Record]] = {}
    for record in found:
        assert (record.step, record.seed, record.definition["num_units"]) == (12, 0, 6)
        named.setdefault(record.name.removeprefix("attribution/ensemble/"), []).append(record)
    assert [record.value for record in named["trainings"]] == [4]
    assert [record.value for record in named["evaluations"]] == [6 * (4 + 6 * 2)]
    first = [record for record in named["source_first"] if record.definition["score"] == "moved_away"]
    assert {record.definition["method"] for record in first} == {"exact ablation", "forward-mode derivative"}
    assert {record.definition["queries"] for record in first} == {"ensemble"}
    assert {record.definition["chance"] for record in first} == {1 / 6}
    exact, forward = (record.value for record in first)
    assert exact == forward  # one step is linear in the weights
    agreement = next(r for r in named["first_order_correlation"] if r.definition["score"] == "moved_away")
    assert agreement.value > 0.85  # of pixels that were rounded, against some that were not
    of = {(r.definition["of"], r.definition.get("bank")) for r in named["memorization_ratio"]}
    assert of == {("ensemble", None), ("members", "all images"), ("members", "images it saw")}
    assert (tmp_path / "images" / "counterfactuals_seed0.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(ensembles, "landscape", lambda *given, **options: pytest.fail("again"))
    again = own.report(runs, tmp_path)
    assert [record.value for record in again] == [record.value for record in found]


def test_several_ensembles_are_pooled_and_a_number_that_one_lacks_is_left_out() -> None:
    def record(name: str, value: float | None, unit: str = "fraction", **about: Any) -> Record:
        return Record(f"attribution/ensemble/{name}", value, 50, 9, 0.0, 1.0, "ema", unit=unit, definition=about)

    values = [(0.7, 3.0), (0.8, 3.5), (0.75, 4.0)]
    found = pooled([[record("source_first", a, score="x", chance=0.1), record("radius", b, "l2")] for a, b in values])
    share, radius = found
    assert (share.value, share.n, share.definition["seeds"]) == (pytest.approx(0.75), 150, 3)
    half = stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3)
    assert share.low <= 0.75 - half
    assert radius.value == pytest.approx(3.5)
    assert radius.high == pytest.approx(3.5 + stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(3))
    assert pooled([[record("radius", 1.0)], [record("radius", None)]]) == []
    one = pooled([[record("radius", None)]])
    assert (one[0].value, one[0].definition["seeds"]) == (None, 1)
    assert json.loads(one[0].to_json())["name"] == "attribution/ensemble/radius"


def test_the_samples_of_one_model_of_all_images_are_explained_by_the_ensemble(tmp_path: Path) -> None:
    ablation = {"class_path": "lightning_mem.attribution.EnsembleAblation", "init_args": {"ensemble": "elsewhere"}}
    methods = [ablation, {"class_path": "lightning_mem.attribution.TRAK"}]
    file = tmp_path / "attribution.yaml"
    file.write_text(yaml.safe_dump({"attribution": {"init_args": {"methods": methods}}}))
    own = study(seeds=[2], target=[str(TINY)], attribution=[str(file)])
    rows = {row.name: row for row in own.rows()}
    assert list(rows) == [*(f"member0{k}_seed2" for k in range(4)), "target_seed2", "explained_seed2"]
    assert (rows["target_seed2"].seed, rows["target_seed2"].num_members) == (2, 6)
    assert own.files(rows["explained_seed2"]) == [str(file)]
    assert own.settings(rows["target_seed2"], tmp_path, {})["data"] == {"seed": 2, "num_members": 6, "members": None}
    found = own.settings(rows["explained_seed2"], tmp_path, {name: Path("runs") / name for name in rows})
    assert found["trainer"]["default_root_dir"] == "runs/target_seed2"
    assert found["attribution"]["init_args"]["methods"] == [
        {**ablation, "init_args": {"ensemble": str(tmp_path / "codes_seed2.json")}}, methods[1],
    ]  # fmt: skip
    (tmp_path / "explained" / "images").mkdir(parents=True)
    (tmp_path / "explained" / "images" / "attribution.png").write_bytes(b"picture")
    record = Record("attribution/trak/source_first", 0.5, 8, 1)
    assert own.report([Run(rows["explained_seed2"], tmp_path / "explained", {}, [record])], tmp_path) == [record]
    assert (tmp_path / "images" / "attribution_seed2.png").read_bytes() == b"picture"
    with pytest.raises(ValueError, match="target and attribution need each other"):
        study(target=[str(TINY)])
