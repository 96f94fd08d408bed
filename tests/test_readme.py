"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_finds_the_copies(capsys: pytest.CaptureFixture) -> None:
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.S)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 17
    exec(compile(code[1], "README.md", "exec"), {})
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["memorization/ratio"] == "1.000"
    assert shown["memorization/ratio_heldout"] == "0.000"


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"(?:configs|docs|benchmarks)/[\w/]+\.(?:yaml|png|py|jsonl)", README)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_option_it_names_is_known(capsys: pytest.CaptureFixture) -> None:
    from lightning_mem.cli import main

    for verb in ("fit", "sample"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
    known = capsys.readouterr().out
    options = set(re.findall(r"--((?:data|trainer)\.\w+|num_samples|ckpt_path)", README))
    assert len(options) > 6
    assert [option for option in options if f"--{option}" not in known] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    block = README.split("<!-- test command -->")[1].split("<!-- end -->")[0]
    assert len(re.findall(r"^python -m pip", block, re.M)) == 1


def test_the_constraints_name_no_address() -> None:
    assert not re.search(r"https?://|--index|--find-links|file:", (ROOT / "constraints.txt").read_text())
