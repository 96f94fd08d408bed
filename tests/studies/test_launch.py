"""A signal stops the training, not the study in the middle of it."""

import os
import signal
from pathlib import Path

import pytest

from lightning_mem.studies import launch
from lightning_mem.studies.launch import Stop, last_words, run_row

CHILD = """#!/bin/sh
echo "$@"
trap 'echo saved; exit 143' TERM
touch ready
while [ ! -e leave ]; do sleep 0.01; done
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A descriptor to inherit; the interpreter is a script that waits for SIGTERM or a file called ``leave``."""
    script = tmp_path / "python"
    script.write_text(CHILD)
    script.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(script))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    return os.open(tmp_path / "lock", os.O_CREAT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_child_to_save_and_is_remembered(lock: int, number: signal.Signals) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]

    def look() -> None:
        if Path("ready").exists():
            os.kill(os.getpid(), number)

    with Stop().listening() as stop:
        code = run_row("fit", ["--config", "a.yaml"], Path("rows/a.log"), stop, lock, look)
    assert (code, stop.signal) == (143, number)
    assert Path("rows/a.log").read_text() == "-m lightning_mem fit --config a.yaml\nsaved\n"
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_child_that_ends_by_itself_gives_its_status_and_adds_to_its_log(lock: int) -> None:
    Path("a.log").write_text("first part\n")
    Path("leave").touch()
    with Stop().listening() as stop:
        assert run_row("attack", ["x"], Path("a.log"), stop, lock, lambda: None) == 0
    assert stop.signal is None
    assert Path("a.log").read_text() == "first part\n-m lightning_mem attack x\n"


def test_a_signal_between_two_rows_ends_the_next_one_at_once(lock: int) -> None:
    stop = Stop()
    stop.signal = signal.SIGTERM
    assert run_row("fit", ["x"], Path("a.log"), stop, lock, lambda: None) in (143, -signal.SIGTERM)


def test_last_words_are_the_last_line_that_says_something() -> None:
    assert last_words(Path("a.log")) == ""
    Path("a.log").write_text("Traceback\nValueError: too few\n(LIGHTNING_MEM_TRACEBACK=1 shows where)\n\n")
    assert last_words(Path("a.log")) == "ValueError: too few"
