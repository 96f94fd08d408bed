"""The curve of a finished run: the numbers of its own validations, and the same however often it was stopped."""

import json
import sys
from pathlib import Path

import pytest
from planting import write_npz

from lightning_mem.cli import run
from lightning_mem.data import MemorizationDataModule
from lightning_mem.evaluation import checkpoints
from lightning_mem.evaluation.verb import evaluate
from lightning_mem.records import TIME_FIELDS, read_records

TINY = Path(__file__).parent.parent / "tiny.yaml"
KEEP_ALL = """filename: "{step}"
        every_n_train_steps: 5
        save_top_k: -1
        save_on_train_epoch_end: false
        enable_version_counter: false
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept its checkpoints of steps 5 and 10, where it measured itself, and its last of step 12."""
    folder = tmp_path_factory.mktemp("finished")
    head = TINY.read_text().partition("filename: best")[0]
    config = folder / "config.yaml"
    config.write_text(f"{head}{KEEP_ALL}ckpt_path: null\nweights_only: true\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(["fit", "--config", str(config), "--trainer.default_root_dir", str(folder / "run")])
    return folder / "run"


def records(folder: str) -> list[dict]:
    lines = Path(folder, "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in (*TIME_FIELDS, "run")} for line in lines]


def test_a_stopped_curve_equals_one_that_was_never_stopped(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, own = str(finished / "checkpoints" / "*.ckpt"), ["ratio", "normalized_l2", "frechet"]
    evaluate(checkpoints=pattern, out="whole", metrics=own, pairs=1)
    found = {(r["name"], r["step"]): (r["value"], r["low"], r["high"], r["weights"]) for r in records("whole")}
    assert {step for _, step in found} == {5, 10, 12}
    measured = {(r.name, r.step): (r.value, r.low, r.high, r.weights) for r in read_records(finished / "results.jsonl")}
    for key in (("memorization/nearest_mean", 5), ("frechet/pixels/heldout", 10)):  # the settings are the run's
        assert found[key] == measured[key]

    original, calls = checkpoints.draw_samples, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "draw_samples", draw)
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate(checkpoints=pattern, out="parts", metrics=own, pairs=1)
    evaluate(checkpoints=pattern, out="parts", metrics=own, pairs=1)
    assert len(calls) == 2 + 2  # the first checkpoint was there
    assert records("parts") == records("whole")
    assert Path("parts/ledger.csv").read_text() == Path("whole/ledger.csv").read_text()
    assert Path("whole/images/curves.png").stat().st_size > 5000


def test_a_limit_holds_for_checkpoints_already_measured(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = str(finished / "checkpoints" / "step=1*.ckpt")
    calls = []
    original = checkpoints.draw_samples
    monkeypatch.setattr(checkpoints, "draw_samples", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    for _ in range(2):
        above = evaluate(
            checkpoints=pattern, out="out", metrics=["ratio", "normalized_l2"],
            fail_above=["memorization/nearest_mean=0.1", "memorization/ratio_unseen=1"],
        )  # fmt: skip
        assert len(above) == 1
        assert above[0].startswith("memorization/nearest_mean is 0.5")
    assert len(calls) == 1
    evaluate(checkpoints=pattern, out="out", metrics=["ratio"])  # another question
    evaluate(checkpoints=pattern, out="out", metrics=["ratio"], num_samples=65)  # other samples
    assert len(calls) == 3


def test_checkpoints_of_other_images_are_refused(finished: Path) -> None:
    pattern = str(finished / "checkpoints" / "last.ckpt")
    data = MemorizationDataModule(num_members=20, num_heldout=24)
    data.setup()
    write_npz("members.npz", data.members.images.flip(0))  # the same images in a file, in another order
    evaluate(checkpoints=pattern, members="members.npz", out="out", metrics=["ratio"])
    with pytest.raises(ValueError, match=r"last.ckpt was trained on the member set .*use the run's own config.yaml"):
        evaluate(checkpoints=pattern, data={"num_members": 30, "num_heldout": 10})
