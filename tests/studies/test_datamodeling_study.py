"""The study of datamodeling scores: its rows are those of LiRA's shadow models; and all of it on a tiny recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_study import TINY, write_run
from untrained import write_untrained

from lightning_mem.cli import run
from lightning_mem.data import DigitsSource, MemorizationDataModule
from lightning_mem.data.pool import PoolSource
from lightning_mem.records import read_records
from lightning_mem.studies import DatamodelingStudy, MembershipStudy, ReadConfig, Settings, runner
from lightning_mem.studies.recipe import deciding
from lightning_mem.studies.runner import study as run_study

CALM = {"class_path": "lightning_mem.callbacks.EMA", "init_args": {"decay": 0.5}}
GRADIENTS = {"num_timesteps": 2, "dimensions": 64}


def files() -> dict[str, str]:
    source = {"class_path": "lightning_mem.data.PoolSource", "init_args": {"source": {"class_path": "DigitsSource"}}}
    source["init_args"] |= {"count": 12}
    method: dict[str, Any] = {"class_path": "lightning_mem.attribution.DTRAK", "init_args": {"gradients": GRADIENTS}}
    methods = [method, {"class_path": "lightning_mem.attribution.RandomScores"}]
    sizes = {"num_queries": 4, "num_calibration": 2, "num_timesteps": 2, "num_draws": 1, "resamples": 20}
    given = {"methods": methods, "num_steps": 2, **sizes}
    scores = {"class_path": "lightning_mem.attribution.DatamodelingScores", "init_args": given}
    trainer = {"max_steps": 2, "val_check_interval": 2, "callbacks": [CALM], "logger": False}
    own: dict[str, Any] = {
        "pool": {"data": {"source": source, "num_members": 6, "num_heldout": 6, "flip": False}, "trainer": trainer},
        "subset": {"trainer": {"log_every_n_steps": 1}},
        "whole": {"data": {"num_members": 12, "num_heldout": 0}},
        "scores": {"attribution": scores}, "lira": {}, "attacks": {},
    }  # fmt: skip
    for name, content in own.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: f"{name}.yaml" for name in own}


def study(**changes: Any) -> DatamodelingStudy:
    at = files()
    recipe: dict[str, Any] = {key: [at[key]] for key in ("pool", "subset", "whole")}
    own = {"config": [str(TINY)], **recipe, "attribution": [at["scores"]], "subsets": 3}
    return DatamodelingStudy(**{**own, **changes})


def settings_of(study: Any, row: Any, read_config: ReadConfig) -> dict[str, Any]:
    own = yaml.safe_dump(study.settings(row, "runs", {}))
    options = [part for file in (*study.files(row), own) for part in ("--config", file)]
    return deciding(read_config(options))


def test_halves_are_the_shadow_models_of_a_membership_study(read_config: ReadConfig) -> None:
    own = study(seed=1, subsets=9)
    lira = MembershipStudy(
        [str(TINY)], ["attacks.yaml"], [], pool=["pool.yaml"], shadow=["subset.yaml"], lira=["lira.yaml"], shadows=9,
        seeds=[1],
    )  # fmt: skip
    shadows = [row for row in lira.rows() if row.kind == "shadow"]
    halves = [row for row in own.rows() if row.kind == "subset"]
    assert len(shadows) == len(halves) == 9
    for place in (0, 8):
        assert settings_of(lira, shadows[place], read_config) == settings_of(own, halves[place], read_config)


def test_trained_again_a_half_has_the_same_images_in_another_order() -> None:
    rows = {row.name: row for row in study().rows()}
    assert list(rows) == [
        "whole_seed0", *(f"subset0{place}_seed0" for place in range(3)),
        *(f"subset0{place}_seed0_training1" for place in range(3)), "scores_seed0_3x2",
    ]  # fmt: skip
    found = []
    for name in ("subset02_seed0", "subset02_seed0_training1"):
        settings = rows[name].settings("runs")
        own = {key: settings["data"].get(key) for key in ("seed", "split_seed", "num_members")}
        data = MemorizationDataModule(PoolSource(DigitsSource(), 12), num_heldout=6, image_size=8, batch_size=4, **own)
        data.setup()
        batch = next(iter(data.train_dataloader()))
        found.append((settings["seed_everything"], data.members.indices.tolist(), batch["index"].tolist()))
    assert found[0][1] == found[1][1]
    assert found[0][0] != found[1][0]
    assert found[0][2] != found[1][2]


def test_a_fully_used_pool_has_unseen_images_around_it() -> None:
    data = MemorizationDataModule(PoolSource(DigitsSource(), 12), 12, 0, image_size=8)
    data.setup()
    pool = set(data.source.places.tolist())
    fresh = data.fresh(30)
    assert len(fresh) == 30
    assert not pool & set(fresh.indices.tolist())


def test_the_study_scores_its_models_and_reports_and_then_has_nothing_left(
    read_config: ReadConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run_row(verb: str, options: list[str], *args: Any) -> int:
        ran.append(verb)
        if verb == "fit":  # what a training of no step leaves
            config = read_config(options)
            folder = Path(config["trainer"]["default_root_dir"])
            write_run(config, folder)
            write_untrained(folder, seed=len(ran))
        else:
            run([verb, *options])
        return 0

    monkeypatch.setattr(runner, "run_row", run_row)

    def call() -> None:
        run_study(study(trainings=1), "runs/scores", reuse=[], read_config=read_config)

    call()
    assert ran == ["fit"] * 4 + ["attribute"]
    records = read_records("runs/scores/results.jsonl")
    found = {(record.name, record.definition["queries"]): record for record in records}
    for kind in ("model", "heldout"):
        score = found["attribution/d_trak/lds", kind]
        assert (score.n, score.definition["subsets"], score.definition["num_members"]) == (4, 3, 12)
        assert score.definition["lam_chosen_on"] == "other queries"
        assert -1 <= score.low <= score.high <= 1
        assert found["attribution/d_trak/gradients", kind].value > 0
    assert "linear datamodeling score" in capsys.readouterr().out
    assert Path("runs/scores/datamodeling.png").is_file()
    assert "| d_trak |" in Path("runs/scores/datamodeling.md").read_text()
    call()
    assert len(ran) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subsets": 2}, "subsets must be at least 3, got 2"),
        ({"trainings": 0}, "trainings must be at least 1, got 0"),
        ({"whole": ["nowhere.yaml"]}, r"all must exist; missing: \['nowhere.yaml'\]"),
        ({"overrides": Settings({})}, ""),
    ],
)
def test_numbers_and_files_of_the_study_are_checked(changes: dict[str, Any], words: str) -> None:
    if not words:
        assert len(study(**changes).rows()) == 8
        return
    with pytest.raises(ValueError, match=words):
        study(**changes)
