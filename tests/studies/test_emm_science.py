"""Slow: the verb with real processes, killed on the way, and the study's directions on digits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_study import FEW, TINY, init_args

from lightning_mem.data.plan import read_plan
from lightning_mem.records import TIME_FIELDS, Record, read_records
from lightning_mem.studies.runner import step_of

ROOT = Path(__file__).parent.parent.parent
EMM = ROOT / "configs" / "digits" / "studies" / "emm.yaml"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(config: Path) -> subprocess.Popen:
    """The verb in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "lightning_mem", "study", "--config", str(config)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def records(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in (*TIME_FIELDS, "run")} for line in found]


@pytest.mark.parametrize("how", ["terminal", "kill"])
def test_a_study_stopped_by_a_signal_continues_and_gives_the_same_records(fit, how: str) -> None:
    overrides = {"trainer": {"max_steps": 600, "val_check_interval": 100, "callbacks": [FEW]}}
    own = init_args(num_members=[20], overrides=overrides)
    study = {"class_path": "lightning_mem.studies.EffectiveMemorization", "init_args": own}
    Path("study.yaml").write_text(yaml.safe_dump({"study": study, "folder": "runs/one", "reuse": []}))
    row = Path("runs/one/n20_none_seed0")
    first = start(Path("study.yaml"))
    while step_of(row) < 150:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    if how == "terminal":  # Ctrl-C reaches the study and its training
        os.killpg(first.pid, signal.SIGINT)
    else:
        first.terminate()
    said = first.communicate()[0]
    assert first.returncode == 128 + (signal.SIGINT if how == "terminal" else signal.SIGTERM), said
    assert "the same command continues" in said
    assert [entry.state for entry in read_plan("runs/one/plan.jsonl")] == ["planned"]
    assert not (row / "summary.json").exists()
    assert 150 <= step_of(row) < 600
    second = start(Path("study.yaml"))
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert "| no labels | 20 | 1 |" in said
    Path("over.yaml").write_text(yaml.safe_dump(overrides))
    whole = fit("whole", "--config", "over.yaml", "--data.num_members", "20", config=TINY)
    assert records(row / "results.jsonl") == records(whole / "results.jsonl")


def test_more_images_are_copied_less_and_later_on_digits(tmp_path: Path) -> None:
    config = yaml.safe_load(EMM.read_text())
    given = config["study"]["init_args"]
    given["config"] = [str(ROOT / file) for file in given["config"]]
    given |= {"num_members": [24, 96], "labels": ["none"], "seeds": [0]}
    given["overrides"]["trainer"] |= {"max_steps": 800, "accelerator": "cpu"}
    Path("study.yaml").write_text(yaml.safe_dump({**config, "folder": "runs/emm", "reuse": []}))
    running = start(Path("study.yaml"))
    said = running.communicate()[0]
    assert running.returncode == 0, said

    def named(name: str, **definition: object) -> Record:
        about = definition.items()
        (found,) = (
            r
            for r in read_records("runs/emm/results.jsonl")
            if r.name == name and all(r.definition[key] == value for key, value in about)
        )
        return found

    few, many = (named("memorization/ratio", num_members=n) for n in (24, 96))
    assert few.value > 0.5
    assert few.low > many.high
    assert named("memorization/ratio_heldout", num_members=24).high < few.low
    assert named("onset/step", num_members=24, event="ratio reaches 0.1").value < 800
    assert named("onset/step", num_members=96, event="ratio reaches 0.1").value is None
    assert named("emm/optimum").value > 0.95
