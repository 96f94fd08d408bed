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
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from the root of the repository
    folder = tmp_path_factory.getbasetemp() / "study"  # the same for all: a row of several studies is parsed once
    text = file.read_text()
    assert text.startswith("# ")
    assert "?" in text.splitlines()[0]
    assert yaml.safe_load(text)["folder"] == f"runs/{file.stem}"
    parser = ArgumentParser()
    parser.add_function_arguments(runner.study, skip={"read_config"})
    given = parser.parse_object(yaml.safe_load(text) | {"folder": str(folder), "dry_run": True})
    whole = {row.name for row in parser.instantiate(given).study.rows()}
    own = given.study.init_args
    if "seeds" in own:
        own.seeds = (own.seeds or [0])[:1]
    for key in ("values", "num_members"):  # rows that differ by a number take the same way: the last one is enough
        if isinstance(own.get(key), list):
            own[key] = own[key][-1:]
    small = parser.instantiate(given)
    for key, few in (("shadows", 2), ("subsets", 2)):  # fewer than could be used; they differ by their seeds
        if getattr(small.study, key, 0):
            setattr(small.study, key, few)
    names = [row.name for row in small.study.rows()]
    assert whole.issuperset(name for name in names if not name.startswith("scores"))  # named after what is scored
    runner.study(**vars(small), read_config=read_config)
    shown = " ".join(capsys.readouterr().out.split())
    assert " to do; time: unknown" in shown
    assert names[0] in shown
    assert not folder.exists()


@pytest.mark.parametrize("file", PARTS, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_a_part_of_studies_says_what_it_is_and_is_used(file: Path) -> None:
    assert "?" in file.read_text().splitlines()[0]
    assert any(str(file.relative_to(ROOT)) in study.read_text() for study in STUDIES)
