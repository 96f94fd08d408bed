"""One process and two (DDP, gloo, CPU) measure the same numbers, train on the same data, and draw the same samples.

All verbs of two processes run in one pair of processes: starting one takes longer than what it then does.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mem.cli import run
from lightning_mem.records import TIME_FIELDS

TINY = Path(__file__).parent / "tiny.yaml"
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
PAIR = """
import json, sys
import torch
torch.set_num_threads(1)
commands = json.loads(sys.argv.pop())
from lightning_mem.cli import run
for command in commands:
    run(command)
torch.distributed.destroy_process_group()
"""

# dropout draws per process: off, so that the two trainings compute the same thing
TRAINING = ["--model.init_args.network.dropout", "0", "--trainer.max_steps", "20"]
TRAINING += ["--trainer.val_check_interval", "20", "--trainer.log_every_n_steps", "1"]
SAMPLING = ["--num_samples", "130", "--num_steps", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one process did (``*1``) and what two did (``*2``)."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    # 257 samples: no multiple of 64, of 2 ranks, or of a block a rank
    config.write_text(TINY.read_text().replace("num_samples: 70", "num_samples: 257"))

    def command(verb: str, name: str, *options: str) -> list[str]:
        return [verb, "--config", str(config), "--trainer.default_root_dir", str(folder / name), *options]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(command("fit", "trained1", *TRAINING))
        run(command("fit", "measured1"))
        shutil.copytree(folder / "measured1", folder / "measured2")
        for name in ("measured1", "measured2"):
            os.remove(folder / name / "results.jsonl")
        run(command("validate", "measured1", "--data.batch_size", "7"))
        run(command("sample", "measured1", *SAMPLING))
    script = folder / "pair.py"
    script.write_text(PAIR)
    commands = [
        command("fit", "trained2", *TRAINING, *TWO),
        command("validate", "measured2", "--data.batch_size", "64", *TWO),
        command("sample", "measured2", *SAMPLING, *TWO),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*launch, json.dumps(commands)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    return folder


def records(folder: Path) -> list[dict]:
    dropped = {*TIME_FIELDS, "run", "config_digest"}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in dropped} for line in lines]


def curve(folder: Path, key: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}


def test_validate_gives_the_same_records_whatever_processes_and_batch_size(runs: Path) -> None:
    one, two = records(runs / "measured1"), records(runs / "measured2")
    assert len(one) > 5
    assert one == two
    digests = [json.loads((runs / name / "samples" / "last.json").read_text()) for name in ("measured1", "measured2")]
    assert digests[0]["n"] == 257
    assert digests[0] == digests[1]


def test_training_on_two_processes_follows_the_same_curve(runs: Path) -> None:
    expected, found = curve(runs / "trained1", "train/loss"), curve(runs / "trained2", "train/loss")
    assert expected.keys() == found.keys() == set(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-4)
    members = [json.loads((runs / name / "members.json").read_text()) for name in ("trained1", "trained2")]
    assert members[0] == members[1]


def test_sampling_on_two_processes_gives_the_same_digest(runs: Path) -> None:
    name = Path("samples") / "last_ema_seed0_0-130.json"
    one, two = (json.loads((runs / folder / name).read_text()) for folder in ("measured1", "measured2"))
    assert one == two
    assert one["n"] == 130
