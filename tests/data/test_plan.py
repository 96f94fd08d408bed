"""The plan: rows, their states, one file that is never half written, one worker at a time."""

import json
import subprocess
from pathlib import Path

import pytest

from lightning_mem.data.plan import Entry, Plan, Row, claimed, merge, read_plan


def test_later_settings_win_key_by_key_and_lists_as_a_whole() -> None:
    base = {"a": {"x": 1, "y": 2}, "list": [1, 2], "kept": 0}
    assert merge(base, {"a": {"y": 3}, "list": [4]}) == {"a": {"x": 1, "y": 3}, "list": [4], "kept": 0}
    assert base == {"a": {"x": 1, "y": 2}, "list": [1, 2], "kept": 0}


def test_a_row_decides_seed_data_and_folder_over_its_overrides() -> None:
    row = Row("a", seed=7, num_members=20, overrides={"data": {"labels": "true", "seed": 1}, "model": {"x": 1}})
    assert row.settings("runs/study") == {
        "seed_everything": 7,
        "data": {"labels": "true", "seed": 7, "num_members": 20, "members": None},
        "model": {"x": 1},
        "trainer": {"default_root_dir": "runs/study/a"},
    }


def test_a_row_that_builds_on_others_may_leave_its_members_to_the_recipe() -> None:
    row = Row("b", seed=3, needs=["a"], overrides={"model": {"x": 1}})
    assert row.settings("runs/study") == {
        "seed_everything": 3,
        "data": {"seed": 3},
        "model": {"x": 1},
        "trainer": {"default_root_dir": "runs/study/b"},
    }


def test_an_attack_has_a_seed_and_a_folder_and_leaves_the_data_of_its_target_alone() -> None:
    row = Row("b", seed=3, verb="attack", needs=["a"], overrides={"attack": {"x": 1}})
    assert row.settings("runs/study") == {"seed_everything": 3, "out": "runs/study/b", "attack": {"x": 1}}
    for given in ({}, {"needs": ["a"], "num_members": 2}):
        with pytest.raises(ValueError, match="row b "):
            Row("b", verb="attack", **given)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a row's name holds letters"):
        Row(name, num_members=2)


@pytest.mark.parametrize("given", [{}, {"num_members": 2, "members": "m.json"}])
def test_a_row_has_a_number_or_a_file_of_members(given: dict) -> None:
    with pytest.raises(ValueError, match="row a needs num_members or members, one of them"):
        Row("a", **given)


def test_states_outlive_the_process_and_follow_the_names() -> None:
    rows = [Row("a", num_members=2, overrides={"data": {"flip": True}}), Row("b", members="m.json")]
    plan = Plan("study", rows)
    plan.update("b", state="failed", reason="power cut", folder="study/b", digest="1f", data_digest="2e")
    plan.save()
    again = Plan("study", [Row("c", num_members=3), *rows])
    assert [(entry.row.name, entry.state) for entry in again] == [("c", "planned"), ("a", "planned"), ("b", "failed")]
    assert again["b"] == plan["b"]
    again.save()
    assert [entry.row for entry in read_plan("study/plan.jsonl")] == [Row("c", num_members=3), *rows]
    chain = Row("d", verb="attack", needs=["a", "b"], kind="attack")
    Plan("study", [*rows, chain]).save()
    assert read_plan("study/plan.jsonl")[-1].row == chain


def test_one_line_a_row_with_its_state_and_members() -> None:
    Plan("study", [Row("a", num_members=2)]).save()
    (line,) = Path("study/plan.jsonl").read_text().splitlines()
    shown = json.loads(line)
    assert (shown["name"], shown["num_members"], shown["seed"], shown["state"]) == ("a", 2, 0, "planned")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the plan has no rows"),
        ([Row("a", num_members=2), Row("a", num_members=3)], "two rows are called a"),
        ([Row("b", needs=["a"]), Row("a", num_members=2)], "row b needs a: rows that it builds on stand before it"),
    ],
)
def test_a_plan_needs_rows_with_names_of_their_own_in_an_order_that_can_be_run(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan("study", rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"name": "b", "num_mem', "line 2"),
        ('{"state": "done"}', r"line 2: a line of a plan is a JSON object with a name"),
        ('{"name": "b", "num_members": 2, "state": "lost"}', "line 2: state must be one of planned, running, done"),
        ('{"name": "b"}', "line 2: row b needs num_members or members"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str, message: str) -> None:
    Path("plan.jsonl").write_text(Entry(Row("a", num_members=2)).to_json() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"plan.jsonl, {message}"):
        read_plan("plan.jsonl")


def test_a_folder_is_held_by_one_process_at_a_time() -> None:
    refused = pytest.raises(ValueError, match=r"study is being worked on by process \d+ on .*wait for it")
    with claimed("study"), refused, claimed("study"):
        pytest.fail("two hold it")
    with claimed("study"):
        pass


def test_a_training_that_outlives_its_study_keeps_the_next_one_out() -> None:
    with claimed("study") as lock:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(ValueError, match="or by a training it started"), claimed("study"):
        pytest.fail("the child holds it")
    child.communicate()
    with claimed("study"):
        pass
