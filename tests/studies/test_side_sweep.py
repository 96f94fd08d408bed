"""The rows of a sweep of SIDE: what each is given, in what order they run, and what is not run again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import planted, sweep
from tiny_study import write_run

from lightning_mem.data.plan import merge, read_plan
from lightning_mem.records import read_records, write_records
from lightning_mem.studies import Settings, SideSweep, runner
from lightning_mem.studies.launch import Stop
from lightning_mem.studies.recipe import FinishedRuns, parents_of


def plain_config(options: Sequence[str], verb: str = "fit") -> dict[str, Any]:
    """Files over each other: a command line that knows every setting and no default."""
    found: dict[str, Any] = {"seed_everything": 0, "trainer": {"max_steps": 12}}
    for file in options[1::2] if "--ckpt_path" not in options else options[1:-2:2]:
        found = merge(found, yaml.safe_load(file if "\n" in file else Path(file).read_text()))
    return {key: value for key, value in found.items() if verb == "attack" or key not in ("attack", "out")}


class Chains:
    """Stands in for the processes of rows: leaves behind what they would."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.options: dict[str, list[str]] = {}
        self.fails: set[str] = set()
        self.killed: set[str] = set()

    def run(self, verb: str, options: list[str], log: Path, stop: Stop, lock: int, look: Callable[[], None]) -> int:
        config = plain_config(options, verb)
        folder = Path(config["out"] if verb == "attack" else config["trainer"]["default_root_dir"])
        self.rows.append(folder.name)
        self.options[folder.name] = options
        look()
        if folder.name in self.fails:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("ValueError: no\n")
            return 1
        if folder.name in self.killed:
            folder.mkdir(parents=True)
            (folder / "samples.blocks").touch()
            stop.signal = 15
            return 143
        if verb == "attack":
            scale = config["attack"]["init_args"]["guidance_scale"]
            write_records(folder / "results.jsonl", planted({"none": 0.2, "closed_form": 0.2 + 0.1 * scale}))
        elif "source" in config["data"] and config["data"]["source"]["class_path"] == "x.PseudoLabels":
            assert (Path(config["model"]["init_args"]["target"]) / "summary.json").is_file()
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            for name in ("members.json", "summary.json"):
                digest = {"digest": "0"}
                (folder / name).write_text(json.dumps({"members": digest, "heldout": digest}))
        else:
            write_run(config, folder)
        return 0


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Chains:
    found = Chains()
    monkeypatch.setattr(runner, "run_row", found.run)
    monkeypatch.setattr("lightning_mem.studies.side_sweep.draw_sweep", lambda *_: None)
    return found


CLUSTERS = {
    "parameter": "clusters", "values": [5, 10],
    "sets": {"surrogate": ["data.source.init_args.num_clusters"], "attack": ["attack.init_args.labels.num_clusters"]},
}  # fmt: skip


def run(study: SideSweep, folder: str, **options: Any) -> Path:
    runner.study(study, folder, read_config=plain_config, **options)
    return Path(folder)


def names(study: SideSweep) -> list[str]:
    return [row.name for row in study.rows()]


def test_what_does_not_depend_on_the_value_is_run_once_a_seed() -> None:
    one_surrogate = ["target_seed0", "surrogate_seed0", "attack_0.5_seed0", "attack_1.0_seed0"]
    assert names(sweep()) == one_surrogate
    assert names(sweep(seeds=[0, 4])) == one_surrogate + [name.replace("seed0", "seed4") for name in one_surrogate]
    assert names(sweep(surrogate=None)) == ["target_seed0", "attack_0.5_seed0", "attack_1.0_seed0"]
    assert names(sweep(**CLUSTERS)) == [
        "target_seed0", "surrogate_5_seed0", "attack_5_seed0", "surrogate_10_seed0", "attack_10_seed0"
    ]  # fmt: skip
    both = ["target_seed0", "surrogate_seed0", "time_independent_seed0", "attack_1.0_seed0"]
    assert names(sweep(values=[1.0], time_independent=True)) == both
    larger = {"sets": {"target": ["trainer.max_steps"]}, "values": [6, 12]}
    assert names(sweep(**larger, surrogate=None)) == [
        "target_6_seed0", "attack_6_seed0", "target_12_seed0", "attack_12_seed0"
    ]  # fmt: skip


def test_a_value_stands_in_names_as_a_folder_can() -> None:
    values = [[400, 1000], None, "timm/resnet18", {"extractor": "pixels", "centered": True, "weights": "a/b.pth"}]
    words = ["400-1000", "none", "resnet18", "pixels-centered"]
    study = sweep(values=values, surrogate=None, sets={"attack": ["attack.init_args.labels"]})
    assert names(study)[1:] == [f"attack_{word}_seed0" for word in words]
    assert study.rows()[-1].overrides == {"attack": {"init_args": {"labels": values[-1]}}}


def test_each_row_gets_its_value_and_the_folders_it_builds_on() -> None:
    study = sweep(**CLUSTERS, overrides=Settings({"data": {"batch_size": 4}}))
    rows = {row.name: row for row in study.rows()}
    target = study.settings(rows["target_seed0"], "s", {})
    assert (target["data"]["batch_size"], target["data"]["num_members"]) == (4, 20)
    surrogate = study.settings(rows["surrogate_5_seed0"], "s", {"target_seed0": Path("t")})
    assert surrogate["model"]["init_args"]["target"] == "t"
    assert surrogate["data"] == {"seed": 0, "source": {"init_args": {"num_clusters": 5, "target": "t", "seed": 0}}}
    attack = study.settings(
        rows["attack_5_seed0"], "s", {"target_seed0": Path("t"), "surrogate_5_seed0": Path("other/u")}
    )
    assert attack["attack"]["init_args"] == {"labels": {"num_clusters": 5}, "surrogate": "other/u"}
    assert (attack["out"], attack["trainer"]["default_root_dir"]) == ("s/attack_5_seed0", "t")
    study = sweep(surrogate=None, seeds=[3])
    alone = study.settings(study.rows()[1], "s", {"target_seed3": Path("t")})
    assert alone["attack"]["init_args"] == {"guidance_scale": 0.5, "pseudo_labels": {"init_args": {"seed": 3}}}
    study = sweep(time_independent=True)
    baseline, attack = study.rows()[2:4]
    places = {name: Path(name) for name in attack.needs}
    asked = study.settings(baseline, "s", places)["model"]["init_args"]
    assert asked == {"time_dependent": False, "labels_as": "hard", "target": "target_seed0"}
    given = study.settings(attack, "s", places)["attack"]["init_args"]
    assert (given["surrogate"], given["time_independent"]) == ("surrogate_seed0", "time_independent_seed0")


def test_a_chain_is_run_in_order_and_once(chains: Chains, capsys: pytest.CaptureFixture) -> None:
    study = sweep()
    runner.study(study, "runs/one", dry_run=True, read_config=plain_config)
    assert "4 rows, 2 trainings and 2 attacks to do" in " ".join(capsys.readouterr().out.split())
    assert not Path("runs").exists()
    folder = run(study, "runs/one")
    assert chains.rows == names(study)
    files = chains.options["attack_1.0_seed0"][1::2]
    assert files == ["runs/one/target_seed0/config.yaml", "side.yaml", "runs/one/rows/attack_1.0_seed0.yaml"]
    own = yaml.safe_load(Path(files[-1]).read_text())
    assert own["attack"]["init_args"] == {"guidance_scale": 1.0, "surrogate": "runs/one/surrogate_seed0"}
    assert {r.name for r in read_records(folder / "results.jsonl")} >= {"attack/side/hits", "sweep/gain", "sweep/ends"}
    before = (folder / "results.jsonl").read_text()
    chains.rows.clear()
    run(study, "runs/one")
    assert chains.rows == []
    assert [json.loads(line)["value"] for line in before.splitlines()] == [
        record.value for record in read_records(folder / "results.jsonl")
    ]


def test_another_sweep_reuses_targets_surrogates_and_equal_attacks(chains: Chains) -> None:
    run(sweep(), "runs/one")
    chains.rows.clear()
    run(sweep(values=[1.0, 2.0]), "runs/two")
    assert chains.rows == ["attack_2.0_seed0"]
    places = {entry.row.name: entry.folder for entry in read_plan("runs/two/plan.jsonl")}
    assert places["attack_1.0_seed0"] == "runs/one/attack_1.0_seed0"
    assert places["surrogate_seed0"] == "runs/one/surrogate_seed0"
    chains.rows.clear()
    run(sweep(**CLUSTERS), "runs/three")
    assert chains.rows == ["surrogate_5_seed0", "attack_5_seed0", "attack_10_seed0"]  # ten clusters are the recipe's
    target = yaml.safe_load(Path("runs/three/rows/surrogate_5_seed0.yaml").read_text())["model"]["init_args"]["target"]
    assert target == "runs/one/target_seed0"


def test_a_run_on_another_target_is_not_reused_though_the_folders_name_is_the_same(chains: Chains) -> None:
    run(sweep(), "runs/one")
    chains.rows.clear()
    run(sweep(overrides=Settings({"data": {"batch_size": 4}})), "runs/two")
    assert chains.rows == names(sweep())
    with pytest.raises(ValueError, match=r"target_seed0 holds a run with another configuration .*batch_size"):
        run(sweep(overrides=Settings({"data": {"batch_size": 2}})), "runs/two")
    # the target went on: what stands on it is of another one now
    Path("runs/one/target_seed0/checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"surrogate_seed0 holds a run .*\(model.init_args.target, data"):
        run(sweep(overrides=Settings({"trainer": {"max_steps": 20}})), "runs/one", reuse=[])


def test_an_attack_without_a_surrogate_is_not_reused_on_a_target_that_trained_longer(chains: Chains) -> None:
    run(sweep(surrogate=None), "runs/one")
    chains.rows.clear()
    longer = Settings({"trainer": {"max_steps": 20}})
    run(sweep(surrogate=None, overrides=longer), "runs/two")
    assert chains.rows == names(sweep(surrogate=None))
    chains.rows.clear()
    run(sweep(surrogate=None, values=[1.0], overrides=longer), "runs/three")
    assert chains.rows == []


def test_a_parent_counts_by_its_settings_wherever_it_lies(chains: Chains) -> None:
    run(sweep(), "runs/one")
    Path("moved").mkdir()
    Path("runs/one/target_seed0").rename("moved/target")
    finished = FinishedRuns(["runs"], plain_config)
    config = yaml.safe_load(Path("runs/one/surrogate_seed0/config.yaml").read_text())
    assert parents_of(config) == ["runs/one/target_seed0"] * 2
    config = merge(config, {"model": {"init_args": {"target": "moved/target"}}})
    assert finished.identify("moved/target") == read_plan("runs/one/plan.jsonl")[0].digest
    assert finished.identify("nowhere") == "nowhere"


def test_a_failed_target_takes_its_own_chain_along_and_no_other(chains: Chains) -> None:
    chains.fails = {"target_seed0"}
    with pytest.raises(SystemExit, match="4 of 8 rows failed.*\n.*target_seed0: ValueError: no") as stop:
        run(sweep(seeds=[0, 1]), "runs/one")
    assert "attack_0.5_seed0: not started: it needs target_seed0, surrogate_seed0" in str(stop.value)
    assert chains.rows == ["target_seed0", *(name.replace("seed0", "seed1") for name in names(sweep()))]
    chains.fails = set()
    chains.rows.clear()
    run(sweep(seeds=[0, 1]), "runs/one")
    assert chains.rows == names(sweep())


def test_an_attack_that_was_killed_is_started_again_on_what_it_left(chains: Chains) -> None:
    chains.killed = {"attack_0.5_seed0"}
    with pytest.raises(SystemExit) as stop:
        run(sweep(), "runs/one")
    assert stop.value.code == 143
    chains.killed = set()
    chains.rows.clear()
    run(sweep(), "runs/one")
    assert chains.rows == ["attack_0.5_seed0", "attack_1.0_seed0"]
    assert Path("runs/one/attack_0.5_seed0/samples.blocks").exists()
    assert "--ckpt_path" not in chains.options["attack_0.5_seed0"]


def test_time_is_told_by_the_rows_of_a_kind(chains: Chains, capsys: pytest.CaptureFixture) -> None:
    run(sweep(), "runs/one")
    lines = [json.loads(line) for line in Path("runs/one/plan.jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] = {"target": 0.0, "surrogate": 40.0, "attack": 90.0}[line["kind"]]
    Path("runs/one/plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    runner.study(sweep(values=[0.5, 1.0, 2.0, 3.0]), "runs/one", dry_run=True, read_config=plain_config)
    assert "0 trainings and 2 attacks to do; time: about 0:03:00" in " ".join(capsys.readouterr().out.split())
