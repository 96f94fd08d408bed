"""Counterfactual removal: which images are left, and distances between models that are known to differ or not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_study import TINY, write_run
from untrained import write_untrained

from lightning_mem.data.split import read_indices
from lightning_mem.diffusion import sample
from lightning_mem.modules import load_target
from lightning_mem.studies import ReadConfig, RemovalStudy, Run
from lightning_mem.types import SampleSet

DRAWING: dict[str, Any] = {"sampler": "ddim", "num_steps": 2, "eta": 0.0, "block": 64}


@pytest.fixture
def explained(read_config: ReadConfig) -> Path:
    """A target that was explained: two samples, and scores of two methods for its 20 images."""
    write_run(read_config(["--config", str(TINY)]), Path("run"))
    write_untrained(Path("run"))
    folder = Path("run/attributions/own")
    images = sample(load_target("run"), [4, 5], seed=3, **DRAWING)
    SampleSet(images, torch.tensor([4, 5]), settings={**DRAWING, "sample_seed": 3}).save(folder / "samples/queries.npz")
    indices = read_indices("run/members.json", "members")
    scores = np.tile(np.arange(20.0, 0.0, -1.0), (2, 1))
    scores[1, 7] = 100.0
    np.savez(folder / "scores.npz", addresses=[4, 5], indices=indices, good=scores, random=-scores)
    return folder


def test_rows_are_trained_on_all_but_the_first_images_of_a_method(explained: Path) -> None:
    study = RemovalStudy("run", str(explained), remove=2, num_queries=2)
    rows = {row.name: row for row in study.rows()}
    assert list(rows) == ["query004_good", "query004_random", "query005_good", "query005_random"]
    members = read_indices("run/members.json", "members").tolist()
    for name, gone in (("query004_good", [0, 1]), ("query005_good", [7, 0]), ("query004_random", [19, 18])):
        own = study.settings(rows[name], "studies/none", {})
        kept = json.loads(Path(own["data"]["members"]).read_text())
        assert kept == [index for place, index in enumerate(members) if place not in gone]
        assert own["data"]["num_members"] is None
        assert own["seed_everything"] == yaml.safe_load(Path("run/config.yaml").read_text())["seed_everything"]
    assert not Path("studies").exists()  # a dry run leaves nothing
    assert study.removed(1, "good") == [members[7], members[0]]


def test_a_model_that_did_not_change_is_at_distance_0_and_gains_are_paired(
    explained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study = RemovalStudy("run", str(explained), remove=2, num_queries=2)
    other = write_untrained(Path("other"), seed=1)
    places = {"good": Path(other), "random": Path("run")}
    runs = [Run(row, places[row.kind], {}, []) for row in study.rows()]
    found = {record.name: record for record in study.report(runs, tmp_path)}
    changed = sample(load_target("other"), [4, 5], seed=3, **DRAWING).double()
    truth = ((changed - study.queries.images) / 255).square().mean((1, 2, 3)).sqrt()
    distance, gain = (found[f"attribution/good/removal_{what}"] for what in ("distance", "gain"))
    assert found["attribution/random/removal_distance"].value == 0
    assert distance.value == gain.value == pytest.approx(float(truth.mean()))
    assert (distance.low, distance.high) == pytest.approx((float(truth.min()), float(truth.max())), rel=0.2)
    assert gain.definition["claimed"]
    assert (gain.n, gain.definition["remove"], gain.definition["trainings"]) == (2, 2, 4)
    assert "| random | 0.000 [0.000, 0.000] |" in capsys.readouterr().out
    assert (tmp_path / "removal.png").is_file()
    assert study.report(runs[:3], tmp_path) == []  # one query is complete
    wrong = replace(study.queries, images=255 - study.queries.images)
    study.queries = wrong
    with pytest.raises(ValueError, match="holds other samples than run draws: explain it again"):
        study.report(runs, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remove": 20}, "remove must lie in 1 .. 19 and num_queries in 2 .. 2, got 20 and 2"),
        ({"methods": ["good"]}, "random among them, got"),
        ({"explained": "run"}, r"missing: \['run/scores.npz', 'run/samples/queries.npz'\]"),
    ],
)
def test_bad_settings_of_a_removal_are_refused(explained: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RemovalStudy(**{"target": "run", "explained": str(explained), "num_queries": 2, **options})
