"""One process, two and three (gloo, CPU) measure the same numbers, train on the same data, and draw the same samples.

Everything that needs several processes runs in one start of three, see tests/ranks.py.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import yaml

from lightning_mem.cli import run
from lightning_mem.metrics import nearest_neighbors
from lightning_mem.modules import load_random_label
from lightning_mem.records import TIME_FIELDS

TINY = Path(__file__).parent / "tiny.yaml"
TINY_SURROGATE = Path(__file__).parent / "tiny_surrogate.yaml"
TINY_RANDOM_LABEL = Path(__file__).parent / "tiny_random_label.yaml"
TINY_ATTACK = Path(__file__).parent / "tiny_attack.yaml"
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
# dropout draws per process: off, so that the two trainings compute the same thing
TRAINING = ["--model.init_args.network.dropout", "0", "--trainer.max_steps", "20"]
TRAINING += ["--trainer.val_check_interval", "20", "--trainer.log_every_n_steps", "1"]
SAMPLING = ["--num_samples", "130", "--num_steps", "3"]
PLAIN = Path("samples") / "last_ema_seed0_0-130.json"
TINY_AUDIT = Path(__file__).parent / "tiny_audit.yaml"
TINY_ATTRIBUTION = Path(__file__).parent / "tiny_attribution.yaml"
ATTACKING = ["--config", str(TINY_ATTACK), "--attack.init_args.num_samples", "130"]


def protections(folder: Path) -> dict[str, Path]:
    """Configurations of ``sample``: gated guidance that never acts on some rows, and rejection of many samples."""
    defenses = "lightning_mem.defenses"
    # a classifier of 20 steps is surer than this of about every third x_t
    given = {"random_label": str(folder / "random_label1"), "tol": 0.495, "scale": 30.0}
    cpsample = {"class_path": f"{defenses}.CPSampleProtection", "init_args": given}
    nearest = {"class_path": f"{defenses}.NearestRejection", "init_args": {"threshold": 0.97}}
    together = {"class_path": "lightning_mem.diffusion.additions.Together", "init_args": {"parts": [cpsample, nearest]}}
    found = {}
    for name, guidance in (("protected", cpsample), ("rejected", together)):
        found[name] = folder / f"{name}.yaml"
        options = {"guidance": guidance, "num_samples": 130, "num_steps": 3, "max_tries": 3}
        found[name].write_text(yaml.safe_dump(options))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one process did (``*1``) and what two did (``*2``)."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    # 257 samples: no multiple of 64, of 2 ranks, or of a block a rank
    config.write_text(TINY.read_text().replace("num_samples: 70", "num_samples: 257"))

    def command(verb: str, name: str, *options: str, config: Path = config) -> list[str]:
        return [verb, "--config", str(config), "--trainer.default_root_dir", str(folder / name), *options]

    def classifier(name: str, config: Path, *options: str) -> list[str]:
        target = ["--model.init_args.target", str(folder / "measured1")]
        return command("fit", name, *target, *TRAINING, *options, config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(command("fit", "trained1", *TRAINING))
        run(command("fit", "measured1"))
        shutil.copytree(folder / "measured1", folder / "measured2")
        for name in ("measured1", "measured2"):
            os.remove(folder / name / "results.jsonl")
        run(command("validate", "measured1", "--data.batch_size", "7"))
        run(command("sample", "measured1", *SAMPLING))
        run(command("attack", "measured1", *ATTACKING))
        run(command("attack", "measured1", "--config", str(TINY_AUDIT), "--out", str(folder / "audit1")))
        run(command("attribute", "measured1", "--config", str(TINY_ATTRIBUTION)))
        run(classifier("surrogate1", TINY_SURROGATE))
        run(classifier("random_label1", TINY_RANDOM_LABEL))
        for name, file in protections(folder).items():
            run(command("sample", "measured1", "--config", str(file), "--out", str(folder / "one" / name)))
    guarded = [
        command("sample", "measured2", "--config", str(file), "--out", str(folder / "two" / name), *TWO)
        for name, file in protections(folder).items()
    ]
    (folder / "two").mkdir()
    for file in (folder / "one").glob("rejected_first.*"):  # the first try is there: no loop of Lightning begins
        shutil.copy(file, folder / "two")
    commands = folder / "commands.json"
    commands.write_text(
        json.dumps(
            [
                *reversed(guarded),
                command("fit", "trained2", *TRAINING, *TWO),
                command("validate", "measured2", "--data.batch_size", "64", *TWO),
                command("sample", "measured2", *SAMPLING, *TWO),
                command("attack", "measured2", *ATTACKING, *TWO),
                command("attack", "measured2", "--config", str(TINY_AUDIT), "--out", str(folder / "audit2"), *TWO),
                command("attribute", "measured2", "--config", str(TINY_ATTRIBUTION), *TWO),
                classifier("surrogate2", TINY_SURROGATE, *TWO),
                classifier("random_label2", TINY_RANDOM_LABEL, *TWO),
            ]
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    done = subprocess.run(
        [*launch, ranks.__file__, str(folder), str(commands)], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process finds."""
    bank, samples = ranks.bank_and_samples()
    search = {}
    for name, (cast, k, groups) in ranks.searches(bank).items():
        search[name] = ranks.plain(list(nearest_neighbors(cast(samples), cast(bank), k, groups=groups)))
    return {"metrics": ranks.measured(1, 0, None), "search": search}


PLACES = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


def flat(value) -> list:
    """Numbers of a nested value in one list."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [number for part in value for number in flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(("world", "rank"), PLACES)
def test_every_metric_has_one_value_on_one_two_and_three_processes(
    runs: Path, alone: dict, world: int, rank: int
) -> None:
    found = json.loads((runs / f"ranks{world}_{rank}.json").read_text())["metrics"]
    assert found.keys() == alone["metrics"].keys()
    assert found["ratio"]["value"] == pytest.approx(16 / 47)  # every third sample is a copy, one row each
    for name, expected in alone["metrics"].items():
        if name == "eidetic":  # the interval's blocks go by the order in which a process saw its samples
            low, high = found[name].pop("interval")
            assert low <= found[name]["value"] <= high
            expected = {"value": expected["value"]}
        # sums of float64 features round in another order; everything else is counted
        same = flat(expected) if name != "frechet" else pytest.approx(flat(expected), rel=1e-9)
        assert flat(found[name]) == same, name


@pytest.mark.parametrize(("world", "rank"), PLACES)
def test_sharded_search_equals_the_search_of_one_process_to_the_bit(
    runs: Path, alone: dict, world: int, rank: int
) -> None:
    found = json.loads((runs / f"ranks{world}_{rank}.json").read_text())["search"]
    assert "the shards must hold each of 61 rows once" in found.pop("refused")
    assert found == alone["search"]


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
    one, two = (json.loads((runs / folder / PLAIN).read_text()) for folder in ("measured1", "measured2"))
    assert one == two
    assert one["n"] == 130


@pytest.mark.parametrize("name", ["protected", "rejected"])
def test_protected_sampling_on_two_processes_gives_the_same_samples_and_certificates(runs: Path, name: str) -> None:
    one, two = (json.loads((runs / folder / f"{name}.json").read_text()) for folder in ("one", "two"))
    assert one == two
    assert one["digest"] != json.loads((runs / "measured1" / PLAIN).read_text())["digest"]
    files = [runs / folder / f"{name}_certificates.csv" for folder in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 130
    assert len({row["gate_rate"] for row in rows}) > 1
    assert len({row["nearest"] for row in rows}) > 100
    assert {row["tries"] for row in rows} == ({"1"} if name == "protected" else {"1", "2", "3"})


# its batch norms see the global batch: with those of each process's half the first loss would be off already
@pytest.mark.parametrize("name", ["surrogate", "random_label"])
def test_a_classifier_on_two_processes_follows_the_same_curve(runs: Path, name: str) -> None:
    one, two = runs / f"{name}1", runs / f"{name}2"
    expected, found = curve(one, "train/loss"), curve(two, "train/loss")
    assert expected.keys() == found.keys() == set(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-4)
    assert curve(two, "val/loss") == pytest.approx(curve(one, "val/loss"), rel=1e-4)
    assert json.loads((one / "members.json").read_text()) == json.loads((two / "members.json").read_text())
    found, expected = ([(r["name"], r["n"], r["step"]) for r in records(folder)] for folder in (two, one))
    assert found == expected


def test_random_labels_are_equal_on_one_process_and_on_two_and_are_those_of_the_members(runs: Path) -> None:
    labels = [load_random_label(runs / name).labels for name in ("random_label1", "random_label2")]
    assert labels[0].digest == labels[1].digest
    assert torch.equal(labels[0].bits, labels[1].bits)
    assert (
        list(labels[1].digests) == json.loads((runs / "measured1" / "members.json").read_text())["members"]["digests"]
    )


def test_a_surrogate_answers_in_a_fresh_process_from_its_checkpoint_alone(runs: Path) -> None:
    assert ranks.answers(runs) == json.loads((runs / "answers.json").read_text())


def test_an_attack_on_two_processes_draws_the_same_samples_and_writes_the_same_records(runs: Path) -> None:
    one, two = (next((runs / folder / "attacks").iterdir()) for folder in ("measured1", "measured2"))
    assert one.name == two.name
    drawn = sorted(path.name for path in (one / "samples").glob("*.json"))
    assert drawn == ["closed_form.json", "unguided.json", "unguided_more.json"]
    for name in drawn:
        manifests = [json.loads((folder / "samples" / name).read_text()) for folder in (one, two)]
        assert manifests[0] == manifests[1]
    assert len(records(one)) > 20
    assert records(one) == records(two)


def test_every_other_attack_gives_the_same_records_on_two_processes(runs: Path) -> None:
    one, two = (
        [record for record in records(runs / f"audit{count}") if not record["name"].endswith("/seconds_per_image")]
        for count in (1, 2)
    )
    assert {record["name"].split("/")[1] for record in one} >= {
        "loss", "secmi", "pia", "gradient_norm", "sima", "pfami", "likelihood", "extraction", "inpainting", "amg",
        "rejection",
    }  # fmt: skip
    assert one == two


def test_attributions_on_two_processes_are_those_of_one(runs: Path) -> None:
    one, two = (next((runs / folder / "attributions").iterdir()) for folder in ("measured1", "measured2"))
    assert one.name == two.name
    own, other = ([r for r in records(folder) if not r["name"].endswith("/seconds")] for folder in (one, two))
    assert own == other
    assert {record["name"].split("/")[1] for record in own} == {"d_trak", "pixels_l2", "random"}
    scores = [dict(np.load(folder / "scores.npz")) for folder in (one, two)]
    assert scores[0]["d_trak"].shape == (70, 20)
    for name, values in scores[0].items():
        np.testing.assert_array_equal(values, scores[1][name])
