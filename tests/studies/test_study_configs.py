"""Every shipped study parses, with all its rows, through the real command line."""

from pathlib import Path

import pytest
import yaml

from lightning_mem.cli import main

ROOT = Path(__file__).parent.parent.parent
ONE_SEED = ["--study.init_args.seeds", "[0]"]
STUDIES = sorted((ROOT / "configs").glob("*/studies/*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_answers_and_shows_its_rows(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from the root of the repository
    text = file.read_text()
    assert text.startswith("# ")
    assert "?" in text.splitlines()[0]
    assert yaml.safe_load(text)["folder"] == f"runs/{file.stem}"
    main(["study", "--config", str(file), "--folder", str(tmp_path / "study"), "--dry_run", "true", *ONE_SEED])
    shown = capsys.readouterr().out
    assert "trainings to do; time: unknown" in " ".join(shown.split())
    assert list(tmp_path.iterdir()) == []
