"""The benchmarks run and write what they say; how fast anything is, is not a test's business."""

import importlib
import math
import mmap
import time
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


@pytest.mark.parametrize("script", ["gradients"], indirect=True)
def test_gradients_are_timed_against_both_peers_once_they_agree(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.jsonl"
    given = ["--pairs", "2", "--num_images", "2", "--num_timesteps", "2", "--out", str(out)]
    script.main(given)
    records = {record.name: record for record in read_records(out)}
    assert sorted(records) == sorted(
        f"time/gradients_{peer}/{side}" for peer in ("loop", "unbatched") for side in ("ours", "peer", "ratio")
    )
    for record in records.values():
        assert record.value > 0
        assert record.definition["disagreement"] < 1e-4
    monkeypatch.setattr(script.OneByOne, "unbatched", lambda self, out: self.loop(out).mul_(1.001))
    with pytest.raises(SystemExit, match="the gradients disagree by 0.001 of the largest"):
        script.main(given)
    with pytest.raises(SystemExit, match="--num_timesteps must be at least 1"):
        script.main(["--pairs", "0"])


@pytest.mark.parametrize("script", ["neighbors"], indirect=True)
def test_neighbours_are_compared_with_every_peer_and_checked(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    sizes = ["--queries", "12", "--bank", "150", "--few", "3", "--checked", "12", "--pairs", "2", "--threads", "1"]
    sizes += ["--mapped", "300", "--chunk_mib", "1", "--out", str(out)]
    script.main([*sizes, "--data", "patches", "noise"])
    records = {(r.name, r.definition.get("data")): r for r in read_records(out)}
    for data in ("patches", "noise"):
        for peer in ("cdist", "faiss", "sklearn", "broadcast"):
            assert records[f"neighbors/speedup/{peer}", data].value > 0
            assert records[f"neighbors/wrong/{peer}", data].value == 0
    assert records["neighbors/speedup/faiss", "patches"].n == 2
    assert {r.definition["storage"] for r in read_records(out) if r.name == "neighbors/extra_memory"} == {
        "resident",
        "mapped",
    }
    # the second nearest as the nearest: nothing may be recorded
    true = script.nearest_neighbors
    monkeypatch.setattr(script, "nearest_neighbors", lambda *given, **options: (None, true(*given)[1].roll(1, 0)))
    with pytest.raises(SystemExit, match="of our answers are not the nearest"):
        script.main([*sizes[:-1], str(tmp_path / "wrong.jsonl"), "--data", "patches"])
    assert not (tmp_path / "wrong.jsonl").exists()


def test_labels_tell_their_entropy_to_a_model_that_memorizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out, picture = tmp_path / "results.jsonl", tmp_path / "picture.png"
    options = ["--num_members", "16", "--eps", "0.05", "8", "--out", str(out), "--picture", str(picture)]
    importlib.import_module("divergence").main(options)
    found = {(r.definition["labels"], r.definition["eps"]): r.value for r in read_records(out)}
    assert found["unique", 0.05] == pytest.approx(-math.log(16))
    assert found["constant", 0.05] == found["constant", 8.0] == 0
    assert found["unique", 0.05] < found["unique", 8.0] < 0
    assert picture.stat().st_size > 5000


def test_memory_of_a_peak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("neighbors")
    # a mapping of its own: an allocator may hand out pages that the process already holds
    own = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ones = b"\1" * len(own)
    with script.peak_memory() as peak, own:
        own.write(ones)  # untouched pages take no memory
        time.sleep(0.05)
    assert 60 * 2**20 < peak["extra"] < 80 * 2**20
