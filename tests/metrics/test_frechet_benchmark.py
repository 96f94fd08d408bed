"""The benchmark runs and writes what it says; how fast anything is, is not a test's business."""

import importlib
from pathlib import Path

import pytest

from lightning_mem.records import read_records

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("frechet")


@pytest.mark.parametrize("pairs", [1, 2])
def test_speedups_and_seconds_are_written_with_their_definition(script, pairs, tmp_path):
    out = tmp_path / "results.jsonl"
    shown = script.main(["--pairs", str(pairs), "--d", "24", "--n", "9", "--out", str(out)])
    records = read_records(out)
    assert len(records) == len(shown) == 8
    speedups = [r for r in records if r.name.startswith("frechet/speedup/")]
    assert [(r.name.rsplit("/", 1)[1], r.definition["case"]) for r in speedups] == [
        ("sqrtm", "full"),
        ("eigvals", "full"),
        ("sqrtm", "small"),
    ]
    for record in records:
        assert record.value > 0
        assert record.n == pairs
        assert record.definition["d"] == 24
        assert record.definition["n"] == (9 if record.definition["case"] == "small" else 1048)
        assert (record.low is None) == (pairs == 1)
    seconds = {(r.name.rsplit("/", 1)[1], r.definition["case"]): r.value for r in records if "/seconds/" in r.name}
    if pairs == 1:
        assert speedups[0].value == pytest.approx(seconds["sqrtm", "full"] / seconds["ours", "full"])
    script.main(["--pairs", str(pairs), "--d", "24", "--n", "9", "--out", str(out)])
    assert len(read_records(out)) == 8  # a second run replaces the first


def test_sides_that_disagree_are_not_compared(script, tmp_path, monkeypatch):
    original = script.frechet_distance
    monkeypatch.setattr(script, "frechet_distance", lambda *moments: original(*moments) * 1.00001)
    with pytest.raises(SystemExit, match="differ: not compared"):
        script.main(["--pairs", "1", "--d", "24", "--n", "9", "--out", str(tmp_path / "x.jsonl")])
    assert not (tmp_path / "x.jsonl").exists()


def test_a_wrong_option_is_named(script, tmp_path):
    with pytest.raises(SystemExit, match="--n in 2 .. d - 1, got 1, 2048 with 2048"):
        script.main(["--pairs", "1", "--n", "2048", "--out", str(tmp_path / "x.jsonl")])
