"""The verb ``attack``: one command, a folder of its own, training images last, and everything once."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from victim import write_surrogate, write_target

from lightning_mem.attacks import SIDE, PseudoLabels, SurrogateGuidance
from lightning_mem.cli import run
from lightning_mem.data import DigitsSource, MemorizationDataModule
from lightning_mem.evaluation import blocks
from lightning_mem.modules import load_classifier
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer
from lightning_mem.types import SampleSet

TESTS = Path(__file__).parent.parent
TINY, ATTACK = TESTS / "tiny.yaml", TESTS / "tiny_attack.yaml"
CONFIGS = TESTS.parent / "configs"


class LockedDigits(DigitsSource):
    """Digits that no one may read before the attack's last arm is on disk."""

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        drawn = list(Path("victim/attacks").glob("side-*/samples/unguided_more.npz"))
        if not drawn:
            raise PermissionError("a training image was read before scoring")
        return super().read(index, image_size, channels)


def trainer_of(folder: str) -> MemorizationTrainer:
    return MemorizationTrainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)


MODEL: Any = LightningModule()
"""Verbs take the network from the checkpoint."""


def attack(folder: str = "victim", source: DigitsSource | None = None, out: str | None = None, **options: Any) -> Path:
    """Run the verb without the command line; returns the folder of its results."""
    settings = yaml.safe_load(ATTACK.read_text())["attack"]["init_args"] | options
    labels = PseudoLabels(**settings.pop("pseudo_labels")["init_args"])
    data = MemorizationDataModule(source, 20, 24, flip=True)
    trainer_of(folder).attack(MODEL, SIDE(pseudo_labels=labels, sample_seed=0, **settings), data, out=out)
    return Path(out) if out else next(Path(folder, "attacks").iterdir())


def plain(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "when", "run", "config_digest")} for line in lines]


def test_one_command_attacks_a_run_and_a_second_one_adds_nothing(
    target: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--config", str(TINY), "--config", str(ATTACK), "--trainer.default_root_dir", target]
    run(["attack", *files, "--data.source", f"{__name__}.LockedDigits"])
    folder = next(Path(target, "attacks").iterdir())
    shown = capsys.readouterr()
    assert "closed_form" in shown.out
    assert folder.name.startswith("side-")
    records = read_records(folder / "results.jsonl")
    assert {record.definition["surrogate"] for record in records} == {
        "none", "closed_form", "selection", "selection_equal_cost"
    }  # fmt: skip
    assert {record.step for record in records} == {7}
    assert all(record.name.startswith("attack/side/") for record in records)
    drawn = {path.name for path in (folder / "samples").glob("*.npz")}
    assert drawn == {"unguided.npz", "closed_form.npz", "unguided_more.npz"}
    before = plain(folder)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(blocks, "sample", refuse)
    attack(source=LockedDigits())
    assert plain(folder) == before
    assert not list(Path(target).glob("attacks/*/samples/*.blocks"))


def test_training_images_read_too_early_would_be_seen(target: str) -> None:
    with pytest.raises(PermissionError, match="before scoring"):
        attack(source=LockedDigits(), selection=False)


def test_a_stopped_attack_continues_and_ends_as_if_it_had_not_been(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(target, "other")
    whole = attack(folder="other")
    original, calls = blocks.sample, []

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:  # pseudo-labels take two blocks, the unguided arm two: the guided arm stops in its second
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "sample", draw)
        with pytest.raises(RuntimeError, match="power cut"):
            attack()
        part = attack()
    assert len(calls) == 6 + 1 + 1  # one block of the guided arm, and one that pays for equal cost
    for name in ("unguided", "closed_form", "unguided_more"):
        digests = {SampleSet.load(folder / "samples" / f"{name}.npz").digest for folder in (whole, part)}
        assert len(digests) == 1
    assert plain(whole) == plain(part)


def test_results_of_another_draw_are_not_mixed(target: str) -> None:
    attack(selection=False, out="here")
    with pytest.raises(ValueError, match=r"unguided.npz holds another draw .* choose another --out"):
        attack(selection=False, num_samples=65, out="here")


def test_another_model_than_the_run_trained_on_is_refused(target: str) -> None:
    digest = {"digest": "0", "indices": []}
    Path(target, "members.json").write_text(json.dumps({"members": digest, "heldout": digest}))
    with pytest.raises(ValueError, match=r"members.json names members with the digest 0"):
        attack()


def test_a_folder_that_holds_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no trained network"):
        attack(folder="nowhere")


def test_samples_are_drawn_under_guidance_by_a_class_or_by_drawn_ones(target: str) -> None:
    surrogate = write_surrogate(target, 4, {"num_targets": 3})
    trainer = trainer_of(target)

    def sample(**options: Any) -> SampleSet:
        given = SurrogateGuidance(surrogate, **options) if options else None
        found = trainer.sample(MODEL, num_samples=66, num_steps=2, guidance=given)
        assert found is not None
        return found

    plain, one, drawn = sample(), sample(label=1, guidance_scale=30.0), sample(guidance_scale=30.0)
    assert len({found.digest for found in (plain, one, drawn)}) == 3
    assert torch.equal(sample(label=1, guidance_scale=0.0).images, plain.images)
    assert one.settings["guidance_scale"] == 30
    assert len(list(Path(target, "samples").glob("last_raw_seed0_0-66*.npz"))) == 4
    classifier, t = load_classifier(surrogate), torch.zeros(66, dtype=torch.int64)
    log_p = [classifier(found.images / 127.5 - 1, t).log_softmax(1)[:, 1].mean() for found in (plain, one)]
    assert log_p[1] > log_p[0]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 4 to 4"):
        sample(label=4)
    other = SurrogateGuidance(write_surrogate(write_target(Path("other"), seed=1), 3, {}))
    with pytest.raises(ValueError, match="was trained for the target"):
        trainer.sample(MODEL, num_samples=2, num_steps=2, guidance=other)


def test_the_shipped_attack_lies_over_the_shipped_run() -> None:
    files = [CONFIGS / "digits" / "denoiser.yaml", CONFIGS / "digits" / "attacks" / "side.yaml"]
    given = [part for file in files for part in ("--config", str(file))]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        run(["attack", *given, "--print_config"])
    assert stop.value.code == 0
    found = yaml.safe_load(out.getvalue())["attack"]
    assert found["class_path"] == "lightning_mem.attacks.SIDE"
    assert (found["init_args"]["guidance_scale"], found["init_args"]["interval"]) == (10.0, None)
