"""One process and two (DDP, gloo, CPU) measure the same numbers and train on the same data."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mem.records import TIME_FIELDS

TINY = Path(__file__).parent / "tiny.yaml"
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def command(*options: str) -> None:
    """The command line in a process of its own, as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mem", *options], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def records(folder: Path) -> list[dict]:
    dropped = {*TIME_FIELDS, "run", "config_digest"}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in dropped} for line in lines]


def curve(folder: Path, key: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """257 samples: no multiple of 64, of 2 ranks, or of a block a rank."""
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text().replace("num_samples: 70", "num_samples: 257"))
    return path


def test_validate_gives_the_same_records_on_one_process_and_on_two(fit, config: Path) -> None:
    run = fit("one", config=config)
    shutil.copytree(run, "two")
    os.remove("two/results.jsonl")
    os.remove("one/results.jsonl")
    fit("one", "--data.batch_size", "7", verb="validate", config=config)
    command("validate", "--config", str(config), "--trainer.default_root_dir", "two", "--data.batch_size", "64", *TWO)
    one, two = records(Path("one")), records(Path("two"))
    assert len(one) > 5
    assert one == two
    digests = [json.loads(Path(f, "samples", "last.json").read_text()) for f in ("one", "two")]
    assert digests[0]["n"] == 257
    assert digests[0] == digests[1]


def test_training_on_two_processes_follows_the_same_curve(fit, config: Path) -> None:
    # dropout draws per process: off, so that the two runs compute the same thing
    options = ["--model.init_args.network.dropout", "0", "--trainer.max_steps", "20"]
    options += ["--trainer.val_check_interval", "20", "--trainer.log_every_n_steps", "1"]
    one = fit("one", *options, config=config)
    command("fit", "--config", str(config), "--trainer.default_root_dir", "two", *options, *TWO)
    expected, found = curve(one, "train/loss"), curve(Path("two"), "train/loss")
    assert expected.keys() == found.keys() == set(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-4)
    assert json.loads(Path("one/members.json").read_text()) == json.loads(Path("two/members.json").read_text())


def test_sampling_on_two_processes_gives_the_same_digest(fit, config: Path) -> None:
    run = fit("one", config=config)
    fit("one", "--num_samples", "130", "--num_steps", "3", verb="sample", config=config)
    options = ["--num_samples", "130", "--num_steps", "3", "--out", "two.npz"]
    command("sample", "--config", str(config), "--trainer.default_root_dir", str(run), *options, *TWO)
    one = json.loads((run / "samples" / "last_ema_seed0_0-130.json").read_text())
    assert one == json.loads(Path("two.json").read_text())
