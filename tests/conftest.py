"""Every test runs in a folder of its own, offline, and leaves nothing behind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
TINY = TESTS / "tiny.yaml"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-mem"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # the tests' networks are tiny, and two OpenMP processes on two cores wait for each other in busy loops
    torch.set_num_threads(1)


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Train the tiny run; options as on the command line; returns the run folder."""
    from lightning_mem.cli import run

    def call(folder: str = "run", *options: str, verb: str = "fit", config: Path = TINY) -> Path:
        run([verb, "--config", str(config), "--trainer.default_root_dir", folder, *options])
        return Path(folder)

    return call
