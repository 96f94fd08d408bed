"""The verb finds planted copies in samples of any generator, writes what it found, and ends with a status."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from planting import Planted, patterns, write_npz, write_pngs

from lightning_mem.cli import main, run
from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import draw_samples, read_ledger
from lightning_mem.evaluation.evaluate import exceeded, parse_limits
from lightning_mem.evaluation.inputs import content_digest
from lightning_mem.evaluation.verb import evaluate
from lightning_mem.metrics import wilson_interval
from lightning_mem.modules import DenoiserModule
from lightning_mem.records import TIME_FIELDS, Record, read_records

TINY = Path(__file__).parent.parent / "tiny.yaml"


def status(*options: str) -> int | str | None:
    """Exit status of the command line; 0 when it returns."""
    try:
        main(["evaluate", *options])
    except SystemExit as stop:
        return stop.code
    return 0


def by_name(path: str | Path) -> dict[str, Record]:
    return {record.name: record for record in read_records(path)}


def test_planted_copies_are_found_through_the_verb(planted: Planted, capsys: pytest.CaptureFixture) -> None:
    assert status(*planted.write()) == 0
    found = by_name("samples_evaluation/results.jsonl")
    ratio = found["memorization/ratio"]
    assert (ratio.value, ratio.n) == (5 / 60, 60)
    assert (ratio.low, ratio.high) == pytest.approx(wilson_interval(5, 60))
    assert found["memorization/ratio_heldout"].value == 0.0
    assert found["memorization/copied_images"].value == 2.0
    assert found["memorization/extracted"].value == 5 / 60
    assert found["memorization/extracted_images"].value == 2.0
    assert found["memorization/eidetic_k"].value == 1.0
    assert found["memorization/ams/pixels/high"].value == found["memorization/normalized_l2"].value == 5 / 60
    assert found["memorization/ums/pixels/high"].value == 2 / 60
    assert {record.definition["samples_digest"] for record in found.values() if "sampl" in record.name} == {
        planted.samples.digest
    }
    rows = read_ledger("samples_evaluation/ledger.csv")
    assert [(row["index"], row["copies"], row["samples"]) for row in rows] == [("4", "3", "0 2 4"), ("7", "2", "1 3")]
    shown = " ".join(capsys.readouterr().out.split())
    assert "memorization/ratio 0.083 [0.036, 0.181] 0.000 [0.000, 0.060]" in shown
    assert "2 training images copied, most often (times, smallest RMS-L2): #4 3 0.000 #7 2 0.000" in shown
    assert Path("samples_evaluation/images/pairs_samples.png").stat().st_size > 5000


def test_training_images_may_be_named_by_a_table(planted: Planted) -> None:
    planted.write()
    write_pngs("pictures", planted.members)
    names = [f"pictures/{number:05d}.png" for number in range(40)]
    Path("members.csv").write_text("\n".join(["file,caption", *(f"{name},a digit" for name in names)]))
    assert status("--samples", "samples.npz", "--members", "members.csv", "--out", "named") == 0
    ratio = by_name("named/results.jsonl")["memorization/ratio"]
    assert (ratio.value, ratio.data_digest) == (5 / 60, content_digest(planted.members))
    assert [row["file"] for row in read_ledger("named/ledger.csv")] == [names[4], names[7]]


def test_a_folder_of_pngs_reads_as_the_same_images(planted: Planted) -> None:
    folder = write_pngs("gan", planted.samples.images)
    members, heldout = write_pngs("train", planted.members), write_npz("heldout.npz", planted.heldout)
    evaluate([folder], members=members, heldout=heldout)
    planted.write()
    evaluate(["samples.npz"], members="members.npz", heldout="heldout.npz")
    one, two = by_name("gan_evaluation/results.jsonl"), by_name("samples_evaluation/results.jsonl")
    assert len(one) > 40
    assert [(r.name, r.value, r.low, r.high) for r in one.values()] == [
        (r.name, r.value, r.low, r.high) for r in two.values()
    ]
    files = [(row["index"], row["file"]) for row in read_ledger("gan_evaluation/ledger.csv")]
    assert files == [("4", "train/00004.png"), ("7", "train/00007.png")]
    assert not list(Path("gan").glob("*evaluation*"))  # a second call must not read its own pictures as samples


def test_the_closed_form_optimum_copies_every_time(capsys: pytest.CaptureFixture) -> None:
    data = MemorizationDataModule(num_members=30, num_heldout=120)
    data.setup()
    target = EmpiricalDenoiser(data.members.images, DiffusionProcess()).target()
    draw_samples(target, 128, num_steps=20).save("optimum.npz")
    options = ["--samples", "optimum.npz", "--data.num_members", "30", "--data.num_heldout", "120"]
    assert status(*options, "--compare", "low", "--fail_above", "memorization/ratio=0.9") == 1
    found = by_name("optimum_evaluation/results.jsonl")
    assert found["memorization/ratio"].value == 1.0
    assert found["memorization/ratio_heldout"].value == 0.0
    assert found["memorization/phase/memorized"].value == 1.0
    assert found["memorization/ratio"].data_digest == data.members.digest
    assert capsys.readouterr().err.startswith("lower end of memorization/ratio is 0.9709, above the limit 0.9")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (["--fail-above", "memorization/ratio=0.09"], 0),
        (["--fail-above", "memorization/ratio=0.09", "--fail_above", "memorization/copied_images=1"], 1),
        (["--fail-above", "memorization/rato=0.01"], 2),
        (["--nonsense", "1"], 2),
    ],
)
def test_the_exit_status_says_whether_a_limit_was_passed(planted: Planted, limits: list[str], expected: int) -> None:
    assert status(*planted.write(), "--metrics", "[ratio,copied_images]", *limits) == expected


def test_the_lower_end_spares_a_model_what_chance_explains() -> None:
    records = [Record("memorization/ratio", 0.083, 60, 0, low=0.036, high=0.181)]
    limits = {"memorization/ratio": 0.05}
    assert exceeded(records, limits) == ["memorization/ratio is 0.083, above the limit 0.05"]
    assert exceeded(records, limits, "low") == []
    assert exceeded(records, {"memorization/ratio": 0.083}) == []  # above, not at


@pytest.mark.parametrize("limit", ["memorization/ratio", "=0.1", "a=b", "a=nan", "a="])
def test_a_limit_that_is_no_pair_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match="a limit is KEY=NUMBER"):
        parse_limits([limit])


def test_an_unknown_limit_lists_the_keys(planted: Planted) -> None:
    planted.write()
    with pytest.raises(
        ValueError, match="no such key: ratio; known are memorization/ratio, memorization/ratio_heldout"
    ):
        evaluate(["samples.npz"], members="members.npz", metrics=["ratio"], fail_above=["ratio=0.1"])


def test_a_limit_on_what_has_no_value_is_an_error(planted: Planted) -> None:
    planted.write()
    with pytest.raises(ValueError, match=r"memorization/phase/memorized has no value.*99 held-out images"):
        evaluate(["samples.npz"], members="members.npz", heldout="heldout.npz",
                 fail_above=["memorization/phase/memorized=0.1"])  # fmt: skip
    with pytest.raises(ValueError, match="recall/pixels/train has no interval"):
        evaluate(["samples.npz"], members="members.npz", fail_above=["recall/pixels/train=2"], compare="low")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, with so loose a threshold that an untrained network "copies"."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "looser.yaml"
    config.write_text(TINY.read_text().replace("num_steps: 3", "num_steps: 3\n        threshold: 0.97"))
    options = ["--trainer.default_root_dir", str(folder / "run"), "--trainer.max_steps", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(["fit", "--config", str(config), *options])
    return folder / "run"


@pytest.fixture
def folder(finished: Path) -> Path:
    """A copy of it to write into."""
    return Path(shutil.copytree(finished, "run"))


def plain(record: Record) -> dict:
    return {k: v for k, v in json.loads(record.to_json()).items() if k not in TIME_FIELDS}


def test_evaluating_a_run_gives_the_numbers_and_the_ledger_of_its_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, ledger = read_records(folder / "results.jsonl"), (folder / "ledger.csv").read_text()
    assert ledger.count("\n") > 3

    def build(*args: object, **kwargs: object) -> None:
        raise AssertionError("this verb needs no model")

    monkeypatch.setattr(DenoiserModule, "__init__", build)
    os.remove(folder / "ledger.csv")
    assert status("--samples", "run", "--config", "run/config.yaml") == 0
    again = {record.identity: plain(record) for record in read_records(folder / "results.jsonl")}
    assert {record.identity: plain(record) for record in fitted}.items() <= again.items()
    assert len(again) > len(fitted)  # and SIDE's scores, which fit leaves out
    assert (folder / "ledger.csv").read_text() == ledger


def test_a_run_is_found_from_its_samples_alone_and_its_images_are_checked(folder: Path) -> None:
    evaluate(["run"], metrics=["ratio"])
    members = json.loads((folder / "members.json").read_text())
    members["members"]["digest"] = "0" * 16
    (folder / "members.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match=r"run/members.json names members with the digest 0000.*source has changed"):
        evaluate(["run"], metrics=["ratio"])
    options = ["--samples", "run", "--config", "run/config.yaml", "--metrics", "[ratio]"]
    assert status(*options) == 2
    assert status(*options, "--data.num_members", "30") == 0  # no longer the run's: asked for


def test_samples_of_one_run_measured_against_another_stay_out_of_its_folder(folder: Path) -> None:
    before = (folder / "results.jsonl").read_text()
    evaluate(["run"], data={"num_members": 30, "num_heldout": 10}, metrics=["ratio"])
    assert (folder / "results.jsonl").read_text() == before
    assert by_name("run/samples/last_evaluation/results.jsonl")["memorization/ratio"].definition["bank_size"] == 30


def test_each_set_is_measured_on_its_own(planted: Planted) -> None:
    planted.write()
    write_npz("new.npz", patterns(30, 5))
    above = evaluate(
        ["samples.npz", "new.npz"], members="members.npz", out="both", metrics=["ratio"],
        fail_above=["memorization/ratio=0.01"],
    )  # fmt: skip
    assert above == ["memorization/ratio is 0.08333, above the limit 0.01"]
    assert by_name("both/new/results.jsonl")["memorization/ratio"].value == 0.0
    assert by_name("both/samples/results.jsonl")["memorization/ratio_heldout"].value is None


def test_repeated_samples_are_counted_and_told(planted: Planted, capsys: pytest.CaptureFixture) -> None:
    planted.write()
    images = planted.samples.images.clone()
    images[10:13] = images[20]
    write_npz("samples.npz", images)
    evaluate(["samples.npz"], members="members.npz")
    assert by_name("samples_evaluation/results.jsonl")["samples/duplicates"].value == 6 / 60  # three new, three copies
    assert "60 samples (6 repeat another)" in capsys.readouterr().out


def test_resized_samples_say_so_in_every_definition(planted: Planted) -> None:
    planted.write()
    write_npz("large.npz", planted.samples.images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"16 x 16 with 3 channel.*8 x 8 with 1: .*--resize true"):
        evaluate(["large.npz"], members="members.npz")
    evaluate(["large.npz"], members="members.npz", resize=True, metrics=["ratio"])
    ratio = by_name("large_evaluation/results.jsonl")["memorization/ratio"]
    assert "bicubic" in ratio.definition["samples_resize"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --samples .* or --checkpoints"),
        ({"samples": ["nothing.npz"], "members": "members.npz"}, "no file or folder nothing.npz"),
        ({"samples": ["samples.npz"]}, "say what the samples are compared with"),
        ({"samples": ["samples.npz"], "heldout": "heldout.npz"}, "--heldout goes with --members"),
        ({"samples": ["samples.npz"], "members": "members.npz", "data": {}}, "two training sets"),
        ({"samples": ["samples.npz"], "members": "members.npz", "pairs": 0}, "pairs must be at least 1, got 0"),
        ({"samples": ["empty"], "members": "members.npz"}, "holds no image"),
        ({"samples": ["samples.txt"], "members": "members.npz"}, "neither an .npz, .npy or .csv file nor a folder"),
        ({"samples": ["samples.npz"] * 2, "members": "members.npz"}, "two sets of samples would write to one folder"),
        ({"samples": ["samples.npz"], "members": "members.npz", "threshold": 1.5}, "threshold must lie in"),
        ({"samples": ["samples.npz"], "members": "same.npz"}, "two different training images, got 1"),
        ({"checkpoints": "none/*.ckpt"}, "no file matches --checkpoints 'none/"),
    ],
)
def test_bad_input_is_refused(planted: Planted, options: dict, message: str) -> None:
    planted.write()
    write_npz("same.npz", planted.members[:1].expand(3, -1, -1, -1))
    Path("empty").mkdir()
    Path("samples.txt").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(**options)


def test_images_of_several_sizes_or_damaged_ones_are_named(planted: Planted) -> None:
    planted.write()
    write_pngs("gan", planted.samples.images)
    write_pngs("other", torch.zeros(1, 1, 4, 8, dtype=torch.uint8))
    Path("other/00000.png").rename("gan/zz.png")
    with pytest.raises(ValueError, match=r"2 sizes \(.*zz.png is 4 x 8.*00000.png is 8 x 8"):
        evaluate(["gan"], members="members.npz")
    Path("gan/zz.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"gan/zz.png cannot be read as an image"):
        evaluate(["gan"], members="members.npz")
