"""What a run leaves behind: ledger, pictures, metrics.csv, summary, W&B."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from run_records import curve

from lightning_mem.callbacks import Gallery, MetricsCSV, summarize
from lightning_mem.evaluation import Measure, Reference
from lightning_mem.records import write_records
from lightning_mem.types import SampleSet


def patterns(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_metrics_csv_continues_and_widens() -> None:
    MetricsCSV("run").log_metrics({"a": 0.1, "epoch": 0, "time/share": 9.0}, step=1)
    logger = MetricsCSV("run")
    logger.log_metrics({"a": 0.2}, step=2)
    logger.log_metrics({"b": 0.3}, step=2)
    assert Path("run/metrics.csv").read_text() == "step,a,b\n1,0.1,\n2,0.2,\n2,,0.3\n"
    logger.drop_after(1, keep_validation=True)
    assert Path("run/metrics.csv").read_text() == "step,a\n1,0.1\n"


def test_an_owed_validation_drops_its_row_only() -> None:
    logger = MetricsCSV("run")
    logger.log_metrics({"train/loss": 0.5}, step=5)
    logger.log_metrics({"val/loss": 0.6}, step=5)
    logger.drop_after(5, keep_validation=False)
    assert Path("run/metrics.csv").read_text() == "step,train/loss\n5,0.5\n"


def test_summary_says_what_is_left_open() -> None:
    write_records("run/results.jsonl", curve([0.0, 0.2, 0.4]))
    Path("run/ledger.csv").write_text(
        "step,weights,index,copies,nearest,samples\n10,ema,7,9,0.1,0\n20,ema,3,5,0.2,1 2\n20,ema,4,1,0.1,3\n"
    )
    summary = summarize("run", "checkpoints/best.ckpt")
    assert summary["onset_step"] == 10
    assert summary["memorization/ratio"]["step"] == 20
    assert summary["most_copied"] == [
        {"index": 3, "copies": 5, "nearest": 0.2},
        {"index": 4, "copies": 1, "nearest": 0.1},
    ]
    json.dumps(summary)


@pytest.mark.parametrize(("upload", "training_images"), [("samples", False), ("pairs", True), ("none", False)])
def test_training_images_leave_the_machine_only_when_asked(upload: str, training_images: bool) -> None:
    """A stand-in W&B logger records what it would be sent."""
    from lightning.pytorch.loggers import WandbLogger

    class Recorder(WandbLogger):
        def __init__(self) -> None:
            self.images, self.tables = [], []

        def log_image(self, key, images, step=None):
            self.images += images

        def log_table(self, key, columns=None, data=None, step=None, **kwargs):
            self.tables.append((columns, data))

    class Run:
        default_root_dir = "run"
        loggers = (Recorder(),)

    bank = patterns(10)
    reference = Reference.from_images(bank, patterns(10, 1))
    samples = SampleSet(torch.cat([bank[:3], patterns(3, 2)]), torch.arange(6))
    Gallery(pairs=4, upload=upload).on_evaluation(Run(), samples, reference, Measure(reference)(samples), step=5)
    logger = Run.loggers[0]
    assert bool(logger.tables) is training_images
    if training_images:
        columns, rows = logger.tables[0]
        assert columns == ["sample", "index", "image", "nearest member", "distance", "ratio"]
        assert len(rows) == 4
        assert {row[1] for row in rows[:3]} == {0, 1, 2}
    assert all("samples_" in path for path in logger.images)
    # local pictures always
    for name in ("samples_step000005.png", "pairs_step000005.png"):
        with Image.open(Path("run/images") / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_resumed_run_is_the_same_wandb_run_in_the_run_folder(fit) -> None:
    options = ["--trainer.logger", "lightning_mem.callbacks.WandbTracking"]
    run = fit("run", *options, "--trainer.max_steps", "2")
    wandb.finish()
    fit("run", *options, "--trainer.max_steps", "4", "--ckpt_path", "last")
    wandb.finish()
    names = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert 1 <= len(names) <= 2  # two parts of one run, unless they fell into one second
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1
    assert not Path("wandb").exists()
