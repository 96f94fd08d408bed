"""The store: the same bytes after any interruption and on any number of processes; of one model only."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mem.attribution.store import FeatureStore
from lightning_mem.evaluation import Workers

ROWS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def store_at(folder: Path, target: str = "a") -> FeatureStore:
    return FeatureStore(folder, {"target": target}, count=7, width=3, block=2)


def now(work: Callable[[], None]) -> None:
    work()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_run_that_was_stopped_goes_on_and_leaves_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def compute(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return ROWS[rows]

    def stopped(rows: Tensor) -> Tensor:
        if int(rows[0]) == 4:
            raise KeyboardInterrupt
        return ROWS[rows]

    store_at(tmp_path / "whole").fill(compute, Workers(), now)
    assert asked == [[0, 1], [2, 3], [4, 5], [6, 6]]
    with pytest.raises(KeyboardInterrupt):
        store_at(tmp_path / "parts").fill(stopped, Workers(), now)
    asked.clear()
    again = store_at(tmp_path / "parts")
    again.fill(compute, Workers(), now)
    assert asked == [[4, 5], [6, 6]]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert torch.equal(torch.cat(list(again.blocks())), ROWS.double())


def test_two_processes_leave_the_bytes_of_one(tmp_path: Path) -> None:
    store_at(tmp_path / "one").fill(lambda rows: ROWS[rows], Workers(), now)
    for rank in (1, 0):
        workers = Workers(rank, 2, gather=lambda rows: torch.stack([rows, rows]))
        store_at(tmp_path / "two").fill(lambda rows: ROWS[rows], workers, now if rank == 0 else lambda work: None)
        if rank == 1:
            assert sorted(contents(tmp_path / "two")) == ["00000001.npy", "00000003.npy"]
            (tmp_path / "two" / "manifest.json").write_bytes((tmp_path / "one" / "manifest.json").read_bytes())
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_features_of_another_model_or_a_damaged_store_are_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.fill(lambda rows: ROWS[rows], Workers(), now)
    with pytest.raises(ValueError, match=r"other features: target 'a' \(here 'b'\); remove it or name another store"):
        store_at(tmp_path, "b")
    np.save(store.file(1), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"00000001.npy must hold float32 \(2, 3\), found float32 \(2, 4\)"):
        list(store.blocks())
    store.file(1).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="00000001.npy cannot be read"):
        list(store.blocks())
    store.manifest_file.write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        store_at(tmp_path)
    store.manifest_file.unlink()
    with pytest.raises(ValueError, match="arrays but no manifest.json"):
        store_at(tmp_path)


def test_features_that_are_not_finite_or_of_another_width_are_not_kept(tmp_path: Path) -> None:
    spoilt = ROWS.clone()
    spoilt[3, 1] = torch.nan
    with pytest.raises(ValueError, match="feature of image 3 is not finite"):
        store_at(tmp_path).fill(lambda rows: spoilt[rows], Workers(), now)
    with pytest.raises(ValueError, match=r"features must be \[rows, 3\], got \(2, 2\)"):
        store_at(tmp_path).fill(lambda rows: ROWS[rows, :2], Workers(), now)
    assert [file.name for file in sorted(tmp_path.glob("*.npy"))] == ["00000000.npy"]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        FeatureStore(tmp_path / "none", {}, 0, 3)
