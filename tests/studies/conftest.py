"""Fixtures of the studies' tests."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_study import Trainings, init_args

from lightning_mem.studies import EffectiveMemorization, ReadConfig, Settings, emm, runner


@pytest.fixture(scope="session")
def read_config() -> ReadConfig:
    """Of a command line that is built once for all tests; equal texts are parsed once."""
    from lightning_mem import cli

    found: list[ReadConfig] = []

    def borrow(read_config: ReadConfig) -> None:
        """Keep what a verb on folders is given."""
        found.append(read_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        patch.setitem(cli.FOLDER_VERBS, "borrow", borrow)
        cli.run(["borrow"])
    known: dict[tuple[str, ...], str] = {}

    def content(option: str) -> str:
        return Path(option).read_text() if "\n" not in option and Path(option).is_file() else option

    def read(options: Sequence[str], verb: str = "fit") -> dict[str, Any]:
        key = (verb, *map(content, options))
        if key not in known:
            known[key] = json.dumps(found[0](options, verb))
        return json.loads(known[key])

    return read


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, read_config: ReadConfig) -> Trainings:
    """No processes and no pictures: rows are written down."""
    found = Trainings(read_config)
    monkeypatch.setattr(runner, "run_row", found.run)
    monkeypatch.setattr(emm, "draw_emm", lambda records, curves, path, onset_ratio: path.touch())
    return found


@pytest.fixture
def study(read_config: ReadConfig) -> Callable[..., Path]:
    """Run a study of the tiny run; returns its folder."""

    def call(
        folder: str = "studies/one",
        dry_run: bool = False,
        train: bool = True,
        reuse: list[str] | None = None,
        **changes: Any,
    ) -> Path:
        own = init_args(**changes)
        small = EffectiveMemorization(**{**own, "overrides": Settings(own["overrides"])})
        runner.study(small, folder, dry_run, train, reuse, read_config=read_config)
        return Path(folder)

    return call
