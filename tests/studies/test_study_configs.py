"""Every shipped study parses, with all its rows, through the real command line."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_mem.studies import ReadConfig, runner

ROOT = Path(__file__).parent.parent.parent
STUDIES = sorted((ROOT / "configs").glob("*/studies/*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/studies/*/*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_answers_and_shows_its_rows(
    file: Path,
    read_config: ReadConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from the root of the repository
    text = file.read_text()
    assert text.startswith("# ")
    assert "?" in text.splitlines()[0]
    assert yaml.safe_load(text)["folder"] == f"runs/{file.stem}"
    parser = ArgumentParser()
    parser.add_function_arguments(runner.study, skip={"read_config"})
    given = parser.parse_object(yaml.safe_load(text) | {"folder": str(tmp_path / "study"), "dry_run": True})
    names = [row.name for row in parser.instantiate(given).study.rows()]
    given.study.init_args.seeds = (given.study.init_args.seeds or [0])[:1]
    if "values" in given.study.init_args:  # all take the same way: the last one is enough
        given.study.init_args["values"] = given.study.init_args["values"][-1:]
    runner.study(**vars(parser.instantiate(given)), read_config=read_config)
    shown = " ".join(capsys.readouterr().out.split())
    assert " to do; time: unknown" in shown
    assert names[0] in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", PARTS, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_a_part_of_studies_says_what_it_is_and_is_used(file: Path) -> None:
    assert "?" in file.read_text().splitlines()[0]
    assert any(str(file.relative_to(ROOT)) in study.read_text() for study in STUDIES)
