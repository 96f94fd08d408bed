"""A stopped and continued run equals one that was never stopped, bit for bit (raw, averaged, optimizer, files)."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mem.callbacks import evaluation
from lightning_mem.callbacks.run_folder import canonical_progress
from lightning_mem.cli import run
from lightning_mem.records import TIME_FIELDS

pytestmark = pytest.mark.usefixtures("no_curves")

TINY = Path(__file__).parent / "tiny.yaml"


def equal(a: object, b: object, where: str = "") -> None:
    """Both hold the same values, to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, where


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


def same_run(a: Path, b: Path) -> None:
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (a, b))
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        equal(one[part], other[part], part)
    assert one["global_step"] == other["global_step"]
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    assert records(a) == records(b)
    assert (a / "ledger.csv").read_text() == (b / "ledger.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(["fit", "--config", str(TINY), "--trainer.default_root_dir", str(folder)])
    return folder


# 20 members in batches of 8: an epoch is 3 batches; validations after 5 and 10
@pytest.mark.parametrize("stop", [7, 3, 5, 6, 10])
def test_two_parts_equal_one_run(fit, whole: Path, stop: int) -> None:
    part = fit("part/run", "--trainer.max_steps", str(stop))
    fit("part/run", "--ckpt_path", "last")
    same_run(whole, part)


def test_training_is_the_same_without_evaluation(fit, whole: Path) -> None:
    blind = fit("blind/run", "--trainer.limit_val_batches", "0")
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, blind))
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        equal(one[part], other[part], part)


def test_raw_and_averaged_weights_differ_so_that_an_exchange_would_be_seen(whole: Path) -> None:
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])


# evaluation calls draw_samples for averaged and raw weights: 1, 2 at step 5; 3, 4 at step 10
@pytest.mark.parametrize("call", [1, 2, 4])
def test_stopped_during_an_evaluation(fit, whole: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = evaluation.draw_samples, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "draw_samples", draw)
        with pytest.raises(SIGTERMException):
            fit("part/run")
    saved = torch.load("part/run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == (5 if call < 3 else 10)
    fit("part/run", "--ckpt_path", "last")
    same_run(whole, Path("part/run"))


def test_stopped_during_the_evaluation_after_the_last_step(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit("whole/run", "--trainer.max_steps", "10")
    original, calls = evaluation.draw_samples, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "draw_samples", draw)
        with pytest.raises(SIGTERMException):
            fit("part/run", "--trainer.max_steps", "10")
    fit("part/run", "--trainer.max_steps", "10", "--ckpt_path", "last")
    same_run(whole, Path("part/run"))
    assert json.loads(Path("part/run/summary.json").read_text())["memorization/ratio"]["step"] == 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_of_a_step(fit, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    from lightning_mem.modules import DenoiserModule

    original = DenoiserModule.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 6:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserModule, "training_step", step)
        with pytest.raises(SIGTERMException):
            fit("part/run")
    assert torch.load("part/run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    fit("part/run", "--ckpt_path", "last")
    same_run(whole, Path("part/run"))


def test_a_crash_resumes_from_the_last_validation(fit, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mem.modules import DenoiserModule

    original = DenoiserModule.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 8:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserModule, "training_step", step)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("part/run")
    assert torch.load("part/run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    fit("part/run", "--ckpt_path", "last")
    same_run(whole, Path("part/run"))


def test_resume_from_an_earlier_checkpoint_drops_what_came_after(fit, whole: Path) -> None:
    part = fit("part/run", "--trainer.max_steps", "7")
    os.rename("part/run/checkpoints/last.ckpt", "earlier.ckpt")
    os.remove("part/run/summary.json")
    fit("part/run", "--ckpt_path", "earlier.ckpt", "--trainer.max_steps", "11")  # logs past step 7
    fit("part/run", "--ckpt_path", "earlier.ckpt")
    same_run(whole, part)


def test_finished_folder_is_refused_with_both_ways_out(fit) -> None:
    fit("run", "--trainer.max_steps", "2")
    before = Path("run/metrics.csv").read_text()
    with pytest.raises(ValueError, match=r"finished run.*--ckpt_path last.*--trainer.default_root_dir"):
        fit("run")
    assert Path("run/metrics.csv").read_text() == before


def test_last_without_a_checkpoint_is_an_error(fit) -> None:
    with pytest.raises(ValueError, match="there is no run/checkpoints/last.ckpt"):
        fit("run", "--ckpt_path", "last")
    assert not Path("run/metrics.csv").exists()


def test_canonical_progress_counts_an_epoch_cut_short_as_unfinished() -> None:
    def counts(n: int) -> dict[str, int]:
        return {"ready": n, "started": n, "processed": n, "completed": n}

    state = {
        "epoch_progress": {"total": counts(3), "current": counts(3)},
        "epoch_loop.batch_progress": {"total": counts(7), "current": counts(1), "is_last_batch": False},
        "epoch_loop.val_loop.batch_progress": {"total": counts(2), "current": counts(2), "is_last_batch": True},
    }
    canonical_progress(state, pending_validation=False)
    assert state["epoch_progress"]["total"] == {"ready": 3, "started": 3, "processed": 2, "completed": 2}
    assert state["epoch_loop.batch_progress"]["current"] == counts(1)
