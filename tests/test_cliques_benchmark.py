"""The benchmark of cliques runs, checks what it times, and writes what it says."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lightning_mem.records import read_records

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--count", "200", "--side", "8", "--pairs", "2", "--threads", "1"]


@pytest.fixture
def cliques(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cliques")


def test_it_times_both_parts_against_a_peer_that_agrees(cliques: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    cliques.main([*SMALL, "--out", str(out)])
    records = read_records(out)
    assert [r.name.removeprefix("cliques/") for r in records] == [
        f"{part}/{what}"
        for _ in range(2)
        for part in ("distances", "cliques")
        for what in ("ratio", "seconds/ours", "seconds/peer")
    ]
    assert {r.definition["planted"] for r in records} == {"10", "10 150"}
    assert all(r.value > 0 and r.definition["vertices"] == 200 and r.definition["precision"] == 1 for r in records)
    assert {r.definition["peer"].split()[0] for r in records} == {"scipy", "networkx"}


def test_a_clique_that_is_not_found_is_not_recorded(
    cliques: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cliques, "largest_cliques", lambda distances, delta: [])
    with pytest.raises(SystemExit, match="few: the planted cliques were not found"):
        cliques.main([*SMALL, "--out", str(tmp_path / "x.jsonl")])
    with pytest.raises(SystemExit, match="--side a multiple of 4"):
        cliques.main(["--side", "10"])
    assert not (tmp_path / "x.jsonl").exists()
