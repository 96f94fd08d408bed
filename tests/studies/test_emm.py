"""The study's claims, from runs whose numbers were planted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from tiny_study import TINY, ratio_curve

from lightning_mem.data.plan import Row
from lightning_mem.records import Record
from lightning_mem.studies import EffectiveMemorization, ReadConfig, Run
from lightning_mem.studies.emm_picture import draw_emm
from lightning_mem.studies.onset import SEPARATED
from lightning_mem.studies.optimum import optimum_ratio

STEPS = list(range(100, 2401, 100))
SIZES = [16, 20, 25, 40]


def planted(row: Row, n: int = 1000) -> Run:
    """A ratio that grows from 0 in proportion to steps per image, half as fast again under random labels."""
    assert row.num_members is not None
    speed = (1 + 0.02 * (row.seed - 1)) * (1.5 if row.overrides["data"]["labels"] == "random" else 1.0)
    ratios = [min(1.0, speed * step / (120 * row.num_members)) for step in STEPS]
    return Run(row, Path("runs") / row.name, {}, ratio_curve(STEPS, ratios, n))


def small(**changes) -> EffectiveMemorization:
    given = {"num_members": SIZES, "labels": ["none", "random"], "labels_num_members": [40], "optimum": False}
    return EffectiveMemorization([str(TINY)], **{**given, **changes})


def named(records: Sequence[Record], name: str, **definition: object) -> list[Record]:
    about = definition.items()
    return [r for r in records if r.name == name and all(r.definition[key] == value for key, value in about)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], Path]:
    study, folder = small(), tmp_path_factory.mktemp("study")
    return study.report([planted(row) for row in study.rows()], folder), folder


@pytest.fixture
def records(reported: tuple[list[Record], Path]) -> list[Record]:
    return reported[0]


def test_every_cell_has_every_seed_once_and_the_first_seed_comes_first() -> None:
    rows = small().rows()
    assert len({row.name for row in rows}) == len(rows) == 3 * 5
    assert {row.seed for row in rows[:5]} == {0}
    random = [row for row in rows if row.overrides["data"]["labels"] == "random"]
    assert {(row.num_members, row.overrides["data"]["num_classes"]) for row in random} == {(40, 10)}


def test_ratios_are_means_over_seeds_at_the_last_step(records: list[Record]) -> None:
    (ratio,) = named(records, "memorization/ratio", num_members=40, labels="none")
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5  # the seeds have 0.49, 0.50 and 0.51
    assert (ratio.value, ratio.n, ratio.step, ratio.definition["seeds"]) == (pytest.approx(0.5), 3000, 2400, 3)
    theirs = stats.binomtest(1500, 3000).proportion_ci(method="wilson")
    assert (ratio.low, ratio.high) == pytest.approx((min(theirs.low, 0.5 - half), max(theirs.high, 0.5 + half)))
    assert [r.value for r in named(records, "memorization/ratio_heldout")] == [0.0] * 5


def test_the_highest_ratio_is_another_number_than_the_last() -> None:
    study = small(num_members=[16], labels=["none"], seeds=[0])
    (row,) = study.rows()
    run = Run(row, Path(), {}, ratio_curve([100, 200, 300], [0.2, 0.8, 0.6]))
    found = study.report([run], Path())
    assert [r.value for r in named(found, "memorization/ratio")] == [0.6]
    assert [r.value for r in named(found, "emm/highest")] == [0.8]
    assert named(found, "emm/crossing") == []


def test_after_equally_many_passes_all_sizes_are_alike(records: list[Record]) -> None:
    # planted: the ratio is steps / (120 images); 2400 steps on the largest set are 60 per image
    found = named(records, "emm/equal_passes", labels="none")
    assert [record.step for record in found] == [60 * n for n in SIZES]
    assert [record.value for record in found] == pytest.approx([0.5] * 4)
    assert {record.definition["steps_per_image"] for record in found} == {60}


def test_the_crossing_is_interpolated_with_an_interval_over_seeds(records: list[Record]) -> None:
    (crossing,) = named(records, "emm/crossing", labels="none")
    assert crossing.unit == "images"
    # means at 20 and 25 images: (0.98 + 1 + 1) / 3 and 0.8
    assert crossing.value == pytest.approx(20 + 5 * (0.98 + 2 - 2.7) / (0.98 + 2 - 2.4))
    # of the seeds: 0.98 -> 0.784, 1 -> 0.8, 1 -> 0.816
    each = [20 + 5 * 0.08 / 0.196, 20 + 5 * 0.1 / 0.2, 20 + 5 * 0.1 / 0.184]
    theirs = stats.t.interval(0.95, 2, loc=sum(each) / 3, scale=stats.sem(each))
    assert (crossing.low, crossing.high) == pytest.approx(theirs, rel=1e-3)


def test_a_crossing_outside_the_sizes_has_no_value() -> None:
    study = small(num_members=[25, 40], labels=["none"])
    (crossing,) = named(study.report([planted(row) for row in study.rows()], Path()), "emm/crossing")
    assert crossing.value is crossing.low is crossing.high is None
    assert crossing.definition["seeds_that_cross"] == 0


def test_the_gain_by_labels_is_paired_by_seed(records: list[Record]) -> None:
    (gain,) = named(records, "emm/gain")
    each = [0.735 - 0.49, 0.75 - 0.5, 0.765 - 0.51]
    theirs = stats.t.interval(0.95, 2, loc=0.25, scale=stats.sem(each))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, *theirs))
    assert (gain.definition["labels"], gain.definition["against"], gain.n) == ("random", "none", 3)


def test_onset_in_proportion_to_the_images_has_slope_one(records: list[Record]) -> None:
    (slope,) = named(records, "onset/slope", labels="none", event="ratio reaches 0.1")
    assert slope.value == pytest.approx(1, abs=1e-9)
    assert slope.low < 1 < slope.high
    assert (slope.n, slope.definition["sizes"]) == (12, "16 20 25 40")
    steps = {
        r.definition["num_members"]: r.value
        for r in named(records, "onset/step", labels="none", event="ratio reaches 0.1")
    }
    each = [12 / (1 + 0.02 * (seed - 1)) for seed in range(3)]  # steps per image
    assert steps == pytest.approx({n: n * sum(each) / 3 for n in SIZES})


def test_a_size_where_a_run_never_got_there_has_no_onset_and_leaves_the_slope() -> None:
    study = small(num_members=[16, 20, 25, 300], labels=["none"])
    found = study.report([planted(row) for row in study.rows()], Path())
    (late,) = named(found, "onset/step", num_members=300, event="ratio reaches 0.1")
    assert late.value is None
    assert late.definition["runs_that_got_there"] == 0
    (slope,) = named(found, "onset/slope", event="ratio reaches 0.1")
    assert slope.definition["sizes"] == "16 20 25"


def test_onset_by_the_rule_of_the_summaries_lies_on_the_grid(records: list[Record]) -> None:
    steps = named(records, "onset/step", labels="none", event=SEPARATED)
    assert all(0 < record.value <= 2400 for record in steps)
    # control 0 of 1000 has upper end 0.0038; the first evaluation with a lower end above it, at every size
    assert [record.value for record in steps] == [100.0] * 4


def test_names_and_definitions_tell_all_records_apart(records: list[Record]) -> None:
    assert len({record.identity for record in records}) == len(records)
    assert all(record.run == "pooled" for record in records)


def test_table_and_picture_are_written_also_for_one_cell(reported: tuple[list[Record], Path]) -> None:
    table = (reported[1] / "emm.md").read_text()
    assert "| no labels | 40 | 3 | 0.500 [" in table
    assert "* random labels at 40 images: ratio 0.250 [" in table
    study = small(num_members=[16], labels=["none"], seeds=[0])
    (row,) = study.rows()
    found = study.report([planted(row)], Path())
    draw_emm(found, {("none", 16): [planted(row).records]}, Path("again.png"))
    assert (reported[1] / "emm.png").stat().st_size > Path("again.png").stat().st_size > 10_000


@pytest.mark.parametrize("labels", ["none", "true", "random", "unique"])
def test_samples_of_the_closed_form_are_copies(read_config: ReadConfig, labels: str) -> None:
    options = ["--data.labels", labels, *(["--data.num_classes", "50"] if labels == "random" else [])]
    config = read_config(["--config", str(TINY), "--data.num_members", "64", *options])
    (like,) = (record for record in ratio_curve([10], [0.2]) if record.name == "memorization/ratio")
    drawing = {"num_samples": 64, "sampler": "ddim", "num_steps": 20, "eta": 0.0, "sample_seed": 0}
    like = replace(like, definition={**like.definition, **drawing})
    row = Row("a", num_members=64)
    record = optimum_ratio(Run(row, Path("runs/a"), config, [like]))
    assert record is not None
    assert (record.name, record.value, record.n) == ("emm/optimum", 1.0, 64)
    assert (record.definition["labels"], record.definition["num_members"]) == (labels, 64)


def test_a_module_without_a_process_has_no_optimum() -> None:
    config = {"model": {"init_args": {}}}
    assert optimum_ratio(Run(Row("a", num_members=2), Path("runs/a"), config, [])) is None
