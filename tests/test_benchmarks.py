"""The benchmarks run and write what they say; how fast anything is, is not a test's business."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lightning_mem.records import read_records

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("accelerate")
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    ("script", "options", "steps"),
    [
        ("training_step", ["--warmup", "1", "--steps", "1", "--batch_size", "4"], "steps_per_timing"),
        ("sampling", ["--steps", "2", "--batch_size", "2", "--num_samples", "4"], "num_steps"),
    ],
    indirect=["script"],
)
@pytest.mark.parametrize("pairs", [1, 3])
def test_a_benchmark_writes_a_ratio_with_its_definition(
    script: ModuleType, options: list[str], steps: str, pairs: int, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    script.main(["--pairs", str(pairs), "--out", str(out), *options])
    ours, peer, ratio = read_records(out)
    assert [r.name.rsplit("/", 1)[0] for r in (ours, peer, ratio)] == [f"time/{script.__name__}"] * 3
    assert [r.unit for r in (ours, peer, ratio)] == ["images/s", "images/s", "ratio"]
    assert ratio.name.endswith("/ratio")
    assert ratio.n == ratio.definition["pairs"] == pairs
    assert ratio.definition[steps] == int(options[options.index("--steps") + 1])
    assert ratio.definition["peer"].startswith("diffusers ")
    assert ratio.value > 0
    if pairs == 1:
        assert ratio.value == pytest.approx(ours.value / peer.value)
        assert ratio.low is ratio.high is None
    else:
        assert ratio.low <= ratio.value <= ratio.high


@pytest.mark.parametrize("script", ["training_step", "sampling"], indirect=True)
def test_a_wrong_option_is_named_and_nothing_is_written(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--pairs, --steps and --batch_size must be at least 1"):
        script.main(["--pairs", "0", "--out", str(tmp_path / "x.jsonl")])
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("script", ["sampling"], indirect=True)
def test_unequal_samplers_are_not_compared(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    original = script.sample_x0
    monkeypatch.setattr(script, "sample_x0", lambda *given, **options: original(*given, **options) + 1e-3)
    with pytest.raises(SystemExit, match="the two samplers disagree"):
        script.main(["--steps", "2", "--batch_size", "2", "--num_samples", "2", "--out", str(tmp_path / "x.jsonl")])
