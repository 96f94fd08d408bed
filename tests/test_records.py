import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mem.records import Record, atomic_write, digest, drop_records, read_records, write_records

RATIO = Record(
    name="memorization/ratio",
    value=0.25,
    n=64,
    step=100,
    low=0.16,
    high=0.37,
    weights="ema",
    definition={"threshold": 1 / 3, "bank_size": 1000, "extractor": None},
)


def test_a_record_survives_the_file():
    write_records("results.jsonl", [RATIO])
    assert read_records("results.jsonl") == [RATIO]
    (line,) = Path("results.jsonl").read_text().splitlines()
    assert json.loads(line)["definition"] == RATIO.definition
    assert {"name", "value", "low", "high", "n", "step", "weights", "seed", "unit", "seconds"} <= json.loads(
        line
    ).keys()
    assert read_records("elsewhere.jsonl") == []


def test_identity_is_name_step_weights_and_definition():
    same = [
        replace(RATIO, value=0.5),
        replace(RATIO, n=1, low=None, high=None, seconds=3.0, when="later", machine="other", seed=4, run="b"),
        replace(RATIO, definition=dict(reversed(RATIO.definition.items()))),
    ]
    assert {record.identity for record in same} == {RATIO.identity}
    others = [
        replace(RATIO, name="memorization/ratio_heldout"),
        replace(RATIO, step=101),
        replace(RATIO, weights="raw"),
        replace(RATIO, definition={**RATIO.definition, "threshold": 0.5}),
        replace(RATIO, definition={}),
    ]
    assert len({record.identity for record in [RATIO, *others]}) == 6
    (line,) = [RATIO.to_json()]
    assert Record.from_json(line).identity == RATIO.identity
    tuples = replace(RATIO, definition={"bands": (0.5, 0.75)})
    assert Record.from_json(tuples.to_json()).identity == tuples.identity


def test_a_record_measured_again_is_replaced_where_it_stands():
    steps = [replace(RATIO, step=step) for step in (1, 2, 3)]
    write_records("results.jsonl", steps)
    again = replace(steps[1], value=0.75)
    new = replace(RATIO, step=4)
    write_records("results.jsonl", [again, new])
    assert read_records("results.jsonl") == [steps[0], again, steps[2], new]


def test_records_past_a_step_are_dropped():
    steps = [replace(RATIO, step=step) for step in (1, 5, 6, 10)]
    write_records("results.jsonl", steps)
    drop_records("results.jsonl", after_step=5)
    assert read_records("results.jsonl") == steps[:2]
    drop_records("results.jsonl", after_step=0)
    assert read_records("results.jsonl") == []
    drop_records("absent.jsonl", after_step=0)
    assert not Path("absent.jsonl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_cannot_hold_are_refused_and_the_file_survives(value):
    write_records("results.jsonl", [RATIO])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records("results.jsonl", [replace(RATIO, step=1), replace(RATIO, value=value, step=2)])
    assert read_records("results.jsonl") == [RATIO]
    assert sorted(os.listdir(".")) == ["results.jsonl"]


@pytest.mark.parametrize("line", ["{", '{"name": "a", "value": 1}', "[1, 2]", "3", '"text"', "null", "half a li"])
def test_a_line_that_is_no_record_is_named(line):
    Path("results.jsonl").write_text(f"{RATIO.to_json()}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 3"):
        read_records("results.jsonl")


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match=r"\['n', 'step'\]"):
        Record.from_json('{"name": "a", "value": 1}')


def test_records_of_later_versions_are_read():
    line = json.dumps({**json.loads(RATIO.to_json()), "a_field_of_tomorrow": 1})
    assert Record.from_json(line) == RATIO


def test_the_old_file_survives_a_block_that_raises():
    path = Path("folder/file.txt")
    with atomic_write(path) as file:
        file.write("old")

    def fail():
        with atomic_write(path) as file:
            file.write("new and half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir("folder") == ["file.txt"]


def test_a_reader_sees_the_old_file_until_the_block_ends():
    Path("file.bin").write_bytes(b"old")
    with atomic_write("file.bin", "wb") as file:
        file.write(b"new")
        file.flush()
        assert Path("file.bin").read_bytes() == b"old"
    assert Path("file.bin").read_bytes() == b"new"
    assert Path("file.bin").stat().st_mode & 0o444 == 0o444  # a temporary file is readable by its owner only


def test_digests_are_fixed_forever():
    # what is written in checkpoints and records must be found again by later versions
    assert digest("a") == "1f0033aa97a57b85"
    assert digest({"b": 1, "a": [1, 2]}) == "0a3e5afb718eb362"
    assert digest(np.arange(6, dtype=np.uint8).reshape(2, 3)) == "1d89fa195abfa0eb"


def test_equal_contents_have_equal_digests_and_others_do_not(tmp_path):
    array = np.arange(10_000, dtype=np.int32).reshape(5000, 2)
    np.save("array.npy", array)
    equal = [array, torch.from_numpy(array), np.asfortranarray(array), np.load("array.npy", mmap_mode="r")]
    assert len({digest(part) for part in equal}) == 1
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    last = array.copy()
    last[-1, -1] += 1
    others = [array, last, array.astype(np.int64), array.reshape(2500, 4), array[:-1], array.tobytes(), array.tolist()]
    assert len({digest(part) for part in others}) == len(others)
    assert len({digest("ab"), digest("a", "b"), digest("b", "a"), digest("a"), digest(b"a"), digest()}) == 6
    assert len({digest(np.zeros((0, 3))), digest(np.zeros((0, 4))), digest(np.float64(0))}) == 3
