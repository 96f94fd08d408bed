"""Every test runs in a folder of its own, offline, and leaves nothing behind."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
TINY = TESTS / "tiny.yaml"

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub's library is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest fixture first: in one worker's first share of tests it is built once, and is not the tail."""
    items.sort(key=lambda item: item.path.name != "test_ddp.py")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-mem"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # the tests' networks are tiny, and two OpenMP processes on two cores wait for each other in busy loops
    torch.set_num_threads(1)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no curve, a fifth of a tiny run's time: for tests that start several and look at none."""
    from lightning_mem.callbacks import curves

    monkeypatch.setattr(curves, "draw_curves", lambda runs, path, title: None)


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Train the tiny run; options as on the command line; returns the run folder."""
    from lightning_mem.cli import run

    def call(folder: str = "run", *options: str, verb: str = "fit", config: Path = TINY) -> Path:
        run([verb, "--config", str(config), "--trainer.default_root_dir", folder, *options])
        return Path(folder)

    return call
