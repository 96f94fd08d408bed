"""The verb ``attribute``: one command, everything once, and training images that stay at home."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule
from untrained import write_untrained

from lightning_mem.attribution import Attributions, PixelSimilarity, QueryOptions, RandomScores
from lightning_mem.callbacks import Gallery, WandbTracking
from lightning_mem.cli import run
from lightning_mem.data import DigitsSource, MemorizationDataModule
from lightning_mem.evaluation import blocks
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer

TESTS = Path(__file__).parent.parent
TINY = TESTS / "tiny.yaml"
SHIPPED = sorted((TESTS.parent / "configs").glob("*/attributions/*.yaml"))
MODEL: Any = LightningModule()
"""Verbs take the network from the checkpoint."""


class LockedDigits(DigitsSource):
    """Digits that no one may read before the queries are on disk."""

    def read(self, index: int, image_size: int, channels: int) -> Any:
        if not list(Path("run/attributions").glob("*/samples/queries.npz")):
            raise PermissionError("a training image was read before the queries were drawn")
        return super().read(index, image_size, channels)


def test_one_command_explains_a_run_and_a_second_one_draws_and_scores_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_untrained(Path("run"), step=7)
    methods = [{"class_path": f"lightning_mem.attribution.{name}"} for name in ("PixelSimilarity", "RandomScores")]
    own = {"methods": methods, "queries": {"num": 5, "num_steps": 2}, "pictures": 2}
    file = {"attribution": {"class_path": "lightning_mem.attribution.Attributions", "init_args": own}}
    Path("own.yaml").write_text(yaml.safe_dump(file))
    options = ["--config", str(TINY), "--config", "own.yaml", "--trainer.default_root_dir", target]
    run(["attribute", *options, "--data.source", f"{__name__}.LockedDigits"])
    (folder,) = Path(target, "attributions").iterdir()
    assert folder.name.startswith("attributions-")
    assert "pixels_l2" in capsys.readouterr().out
    records = read_records(folder / "results.jsonl")
    assert {record.step for record in records} == {7}
    assert {record.name.split("/")[1] for record in records} == {"pixels_l2", "random"}
    assert {path.name for path in folder.iterdir()} == {
        "images", "results.jsonl", "samples", "scores", "scores.npz", "tables",
    }  # fmt: skip
    monkeypatch.setattr(blocks, "sample", None)
    monkeypatch.setattr(RandomScores, "scores", None)
    verb = Attributions([PixelSimilarity(), RandomScores()], QueryOptions(num=5, num_steps=2, seed=0), pictures=2)
    trainer = MemorizationTrainer(default_root_dir=target, accelerator="cpu", logger=False, enable_progress_bar=False)
    again = trainer.attribute(MODEL, verb, MemorizationDataModule(LockedDigits(), 20, 24, flip=True))
    assert [json.loads(r.to_json())["value"] for r in again] == [r.value for r in records]


@pytest.mark.parametrize(("upload", "sent"), [("samples", []), ("none", []), ("pairs", ["attributions/attribution"])])
def test_training_images_reach_wandb_only_where_the_gallery_uploads_pairs(
    upload: Any, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    monkeypatch.setattr(WandbTracking, "log_image", lambda self, key, images, **given: logged.append(key))
    target = write_untrained(Path("run"))
    trainer = MemorizationTrainer(
        default_root_dir=target, accelerator="cpu", logger=WandbTracking(), enable_progress_bar=False,
        callbacks=[Gallery(upload=upload)],
    )  # fmt: skip
    verb = Attributions([PixelSimilarity()], QueryOptions("heldout", 2), pictures=1)
    trainer.attribute(MODEL, verb, MemorizationDataModule(None, 6, 4))
    assert logged == [f"attribution/{key}" for key in sent]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_says_what_it_answers_and_explains_a_run(file: Path) -> None:
    text = file.read_text()
    assert "?" in text.splitlines()[0]
    assert f"lightning-mem attribute --config runs/digits/config.yaml --config {file.relative_to(TESTS.parent)}" in text
    target = write_untrained(Path("run"))
    few = ["--attribution.init_args.pictures", "1" if file.stem == "similarity" else "0"]
    few += ["--attribution.init_args.queries.num", "3", "--data.num_heldout", "4", "--data.num_members", "3"]
    options = ["--config", str(TINY), "--config", str(file), "--trainer.default_root_dir", target, *few]
    if "runs/ensembles" in text:
        with pytest.raises(ValueError, match="runs/ensembles holds none"):
            run(["attribute", *options])
        return
    run(["attribute", *options, "--out", "out"])
    methods = {record.name.split("/")[1] for record in read_records("out/results.jsonl")}
    assert len(methods) == len(yaml.safe_load(text)["attribution"]["init_args"]["methods"])
    assert Path("out/images/attribution.png").is_file() == (file.stem == "similarity")
