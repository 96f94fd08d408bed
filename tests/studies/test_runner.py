"""A plan does what is missing, once, whatever happened before; rows are ordinary run folders."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_study import OVERRIDES, TINY, Trainings, init_args, ratio_curve, write_run

from lightning_mem.cli import main
from lightning_mem.data.plan import Row, claimed, read_plan
from lightning_mem.records import TIME_FIELDS, Record, read_records
from lightning_mem.studies import AbstractStudy, ReadConfig, Run, emm, runner
from lightning_mem.studies.emm_picture import draw_emm
from lightning_mem.studies.recipe import deciding
from lightning_mem.studies.runner import seconds_per_step, step_of


def lines(path: Path) -> list[dict]:
    """Records of a file without what differs between two equal runs."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in found]


def states(folder: Path) -> dict[str, str]:
    return {entry.row.name: entry.state for entry in read_plan(folder / "plan.jsonl")}


def shown(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def by_hand(read_config: ReadConfig) -> Callable[..., Path]:
    """What row n20_none_seed0 leaves when it is trained by hand."""

    def call(folder: str, *options: str) -> Path:
        given = ["--config", str(TINY), "--config", yaml.safe_dump(OVERRIDES), "--data.num_members", "20"]
        write_run(read_config([*given, "--trainer.default_root_dir", folder, *options]), Path(folder))
        return Path(folder)

    return call


def test_the_verb_reads_its_yaml_and_writes_records_table_and_picture(trainings, monkeypatch, capsys) -> None:
    monkeypatch.setattr(emm, "draw_emm", draw_emm)
    own = {"class_path": "lightning_mem.studies.EffectiveMemorization", "init_args": init_args()}
    Path("study.yaml").write_text(yaml.safe_dump({"study": own, "folder": "studies/one"}))
    main(["study", "--config", "study.yaml", "--study.init_args.seeds", "[4]"])
    assert trainings.rows == ["n20_none_seed4", "n30_none_seed4"]
    assert {record.name for record in read_records("studies/one/results.jsonl")} >= {"memorization/ratio"}
    assert Path("studies/one/emm.png").read_bytes().startswith(b"\x89PNG")
    line = "| no labels | 20 | 1 | 0.500 [0.404, 0.596] | 0.000 [0.000, 0.037] |"
    assert line in Path("studies/one/emm.md").read_text()
    assert line in capsys.readouterr().out


def test_a_stopped_row_continues_and_gives_the_same_records(study, trainings: Trainings) -> None:
    trainings.real = True
    whole = study("one/study", num_members=[20])
    trainings.stop_at = {"n20_none_seed0": 7}
    with pytest.raises(SystemExit) as stop:
        study("two/study", num_members=[20])
    assert stop.value.code == 128 + 15
    assert states(Path("two/study")) == {"n20_none_seed0": "planned"}
    assert not Path("two/study/results.jsonl").exists()
    trainings.stop_at = {}
    parts = study("two/study", num_members=[20])
    assert "--ckpt_path" not in trainings.options[1]
    assert trainings.options[2][-2:] == ["--ckpt_path", "last"]
    assert states(parts) == {"n20_none_seed0": "done"}
    for file in ("n20_none_seed0/results.jsonl", "results.jsonl"):
        assert lines(whole / file) == lines(parts / file)
    assert "| no labels | 20 | 1 |" in (whole / "emm.md").read_text()


def test_rows_are_ordinary_run_folders_and_the_plan_says_so(study, trainings: Trainings) -> None:
    folder = study(seeds=[0, 3])
    names = ["n20_none_seed0", "n30_none_seed0", "n20_none_seed3", "n30_none_seed3"]
    assert trainings.rows == names
    assert states(folder) == dict.fromkeys(names, "done")
    config = yaml.safe_load((folder / "n30_none_seed3" / "config.yaml").read_text())
    assert (config["seed_everything"], config["data"]["seed"], config["data"]["num_members"]) == (3, 3, 30)
    assert {record.name for record in read_records(folder / "results.jsonl")} >= {"memorization/ratio", "emm/crossing"}


def test_a_finished_study_trains_nothing_and_reports_again(study, trainings: Trainings) -> None:
    before = lines(study() / "results.jsonl")
    trainings.rows.clear()
    Path("studies/one/results.jsonl").unlink()
    assert lines(study() / "results.jsonl") == before
    assert trainings.rows == []


def test_a_report_without_training_says_what_is_not_in_it(study, trainings: Trainings, capsys) -> None:
    with pytest.raises(SystemExit, match="nothing to report: none of the 2 rows is finished"):
        study(train=False)
    study(num_members=[20])
    shown(capsys)
    folder = study(train=False)
    assert trainings.rows == ["n20_none_seed0"]
    assert "1 of 2 rows are not finished: they are not in these numbers" in shown(capsys)
    assert {r.definition["num_members"] for r in read_records(folder / "results.jsonl")} == {20}


def test_rows_that_another_plan_trained_are_reused(study, trainings: Trainings) -> None:
    study("studies/one")
    trainings.rows.clear()
    folder = study("studies/two", num_members=[20, 24, 30])
    assert trainings.rows == ["n24_none_seed0"]
    places = {entry.row.name: entry.folder for entry in read_plan(folder / "plan.jsonl")}
    assert places["n20_none_seed0"] == "studies/one/n20_none_seed0"
    assert places["n24_none_seed0"] == "studies/two/n24_none_seed0"
    sizes = [r.definition["num_members"] for r in read_records(folder / "results.jsonl") if r.name == "emm/highest"]
    assert sizes == [20, 24, 30]


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        (["--trainer.log_every_n_steps", "1", "--trainer.devices", "auto", "--data.num_workers", "2"], True),
        (["--trainer.callbacks+", "lightning_mem.callbacks.Gallery"], True),
        (["--trainer.callbacks+", "lightning_mem.callbacks.EMA"], False),
        (["--trainer.max_steps", "9"], False),
        (["--model.init_args.optimizer.init_args.lr", "0.002"], False),
        (["--data.seed", "1"], False),
        (["--data.heldout", "heldout.txt"], False),
    ],
)
def test_a_run_trained_by_hand_is_reused_if_what_decides_its_numbers_is_equal(
    study, by_hand, trainings: Trainings, change: list[str], reused: bool
) -> None:
    Path("heldout.txt").write_text("\n".join(map(str, range(24))))
    by_hand("studies/mine", *change)
    folder = study(num_members=[20])
    assert trainings.rows == ([] if reused else ["n20_none_seed0"])
    (entry,) = read_plan(folder / "plan.jsonl")
    assert entry.folder == ("studies/mine" if reused else "studies/one/n20_none_seed0")


def test_a_run_on_other_images_is_not_reused(study, by_hand, trainings: Trainings) -> None:
    # the same settings, but the source held other images when it was trained
    by_hand("studies/mine")
    members = Path("studies/mine/members.json")
    content = json.loads(members.read_text())
    content["members"]["digest"] = "0" * 16
    members.write_text(json.dumps(content))
    study(num_members=[20])
    assert trainings.rows == ["n20_none_seed0"]


def test_runs_are_looked_for_where_reuse_says(study, by_hand, trainings: Trainings) -> None:
    by_hand("elsewhere/mine")
    study("studies/one", num_members=[20])
    study("studies/two", reuse=[], num_members=[20])
    assert trainings.rows == ["n20_none_seed0"] * 2
    study("studies/three", reuse=["elsewhere"], num_members=[20])
    assert read_plan("studies/three/plan.jsonl")[0].folder == "elsewhere/mine"


def test_a_failed_row_does_not_stop_the_others_and_is_tried_again(study, trainings: Trainings) -> None:
    refused = r"1 of 2 rows failed.*\n.*n1800_none_seed0: ValueError: 1800 members .* digits has 1797.*1800.*\.log"
    with pytest.raises(SystemExit, match=refused):
        study(num_members=[20, 1800])
    folder = Path("studies/one")
    assert states(folder) == {"n20_none_seed0": "done", "n1800_none_seed0": "failed"}
    assert read_plan(folder / "plan.jsonl")[1].reason.startswith("ValueError: 1800 members")
    assert [r.definition["num_members"] for r in read_records(folder / "results.jsonl") if r.name == "emm/highest"] == [
        20
    ]
    with pytest.raises(SystemExit, match="1 of 2 rows failed"):
        study(num_members=[20, 1800])
    assert trainings.rows == ["n20_none_seed0", "n1800_none_seed0", "n1800_none_seed0"]


def test_a_dry_run_shows_everything_and_writes_nothing(study, trainings, capsys: pytest.CaptureFixture) -> None:
    study("studies/new", dry_run=True)
    assert "2 rows, 2 trainings to do; time: unknown until the first row is done" in shown(capsys)
    assert not Path("studies").exists()
    study()
    before = {path: path.stat().st_mtime_ns for path in Path("studies").rglob("*")}
    shown(capsys)
    study("studies/one", dry_run=True, num_members=[20, 24])
    # made-up rows take a minute a step: ten steps are missing
    assert "2 rows, 1 trainings to do; time: about 0:10:00 (at the median speed of 1 finished rows)" in shown(capsys)
    assert {path: path.stat().st_mtime_ns for path in Path("studies").rglob("*")} == before


def test_a_second_study_in_a_folder_is_refused_while_the_first_works(study, trainings: Trainings) -> None:
    with claimed("studies/one"), pytest.raises(ValueError, match="studies/one is being worked on by process"):
        study()
    assert trainings.rows == []


def test_a_folder_of_another_recipe_is_refused_with_what_differs(study, trainings: Trainings) -> None:
    study(num_members=[20])
    other = {**OVERRIDES, "data": {"batch_size": 4}}
    with pytest.raises(ValueError, match=r"n20_none_seed0 holds a run with another configuration .*data\.batch_size"):
        study(num_members=[20], overrides=other)
    fewer = {"trainer": {**OVERRIDES["trainer"], "max_steps": 5}}
    with pytest.raises(ValueError, match=r"another configuration .*trainer\.max_steps"):
        study(num_members=[20], overrides=fewer)
    assert trainings.rows == ["n20_none_seed0"]


def test_more_steps_continue_a_finished_row(study, trainings: Trainings) -> None:
    study(num_members=[20])
    Path("studies/one/n20_none_seed0/checkpoints").mkdir()
    Path("studies/one/n20_none_seed0/checkpoints/last.ckpt").touch()
    study(num_members=[20], overrides={"trainer": {**OVERRIDES["trainer"], "max_steps": 20}})
    assert trainings.options[1][-2:] == ["--ckpt_path", "last"]
    assert max(record.step for record in read_records("studies/one/results.jsonl")) == 20


def test_a_row_killed_before_its_first_checkpoint_starts_afresh(study, trainings: Trainings) -> None:
    row = study(num_members=[20]) / "n20_none_seed0"
    (row / "summary.json").unlink()
    (row / "metrics.csv").write_text("step,train/loss\n2,1.0\n")
    (row / "left.txt").touch()
    study(num_members=[20])
    assert trainings.rows == ["n20_none_seed0"] * 2
    assert "--ckpt_path" not in trainings.options[1]
    assert not (row / "left.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": ["missing.yaml"]}, r"missing: \['missing.yaml'\]"),
        ({"config": []}, "config must name at least one file"),
        ({"num_members": [20, 20]}, "num_members must hold at least one number and none twice"),
        ({"num_members": [1]}, "the ratio needs num_members of at least 2, got 1"),
        ({"labels": ["none", "wrong"]}, "Got value: wrong"),
        ({"labels": ["none", "none"]}, "two rows are called n20_none_seed0"),
        ({"labels_num_members": []}, "labels_num_members must hold at least one number"),
        ({"seeds": []}, "seeds must hold at least one number"),
        ({"level": 1.5}, r"level must lie in \(0, 1\), got 1.5"),
        ({"onset_ratio": 0}, r"onset_ratio must lie in \(0, 1\), got 0"),
        ({"overrides": [1]}, "settings of fit are a mapping"),
        ({"overrides": {"data": {"nonsense": 1}}}, "nonsense"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    study, trainings: Trainings, capsys: pytest.CaptureFixture, changes: dict, message: str
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        study(**changes)
    assert re.search(message, f"{stop.value} {capsys.readouterr().err}")
    assert trainings.rows == []


def test_a_members_file_counts_by_its_content(by_hand) -> None:
    Path("mine.txt").write_text("\n".join(map(str, range(40))))
    mine = by_hand("studies/mine", "--data.num_members", "null", "--data.members", "mine.txt")
    shutil.copy("mine.txt", "copy.txt")
    config = yaml.safe_load((mine / "config.yaml").read_text())
    same = {**config, "data": {**config["data"], "members": "copy.txt"}}
    assert deciding(same) == deciding(config)
    Path("copy.txt").write_text("\n".join(map(str, range(1, 41))))
    assert deciding(same) != deciding(config)


class Subsets(AbstractStudy):
    """Some member files, as a study of shadow models or of subsets would name them."""

    def rows(self) -> list[Row]:
        return [Row(f"subset{k}", seed=k, members=f"subset{k}.json") for k in range(2)]

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        return [replace(run.records[-1], name="memorization/ratio", run=run.row.name) for run in runs]


def test_another_study_of_member_files_needs_rows_and_a_report_only(trainings, read_config: ReadConfig) -> None:
    for k in range(2):
        Path(f"subset{k}.json").write_text(str(list(range(k, k + 9))))
    runner.study(Subsets([str(TINY)]), "studies/subsets", reuse=[], read_config=read_config)
    assert trainings.rows == ["subset0", "subset1"]
    kept = json.loads(Path("studies/subsets/subset1/members.json").read_text())
    assert kept["members"]["indices"] == list(range(1, 10))
    assert [record.run for record in read_records("studies/subsets/results.jsonl")] == ["subset0", "subset1"]


def test_step_and_speed_of_a_run() -> None:
    Path("run").mkdir()
    assert step_of(Path("run")) == 0
    Path("run/metrics.csv").write_text("step,train/loss\n2,1.0\n12,1.0\n")
    assert step_of(Path("run")) == 12
    assert seconds_per_step(ratio_curve([10, 30, 50], [0.0] * 3)) == pytest.approx(60)
    assert seconds_per_step(ratio_curve([10], [0.0])) is None
