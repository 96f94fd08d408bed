"""What a sweep of SIDE says: hits pooled over seeds, gains paired by seed, table and picture, and what is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy import stats
from sweeping import planted, sweep
from tiny_study import ratio_curve

from lightning_mem.data.plan import Row
from lightning_mem.records import Record
from lightning_mem.studies import Run
from lightning_mem.studies.side_sweep import peak_over_ends

LAMBDAS = [0.0, 1.0, 2.0, 4.0]
HITS = {0: [0.20, 0.40, 0.50, 0.10], 1: [0.22, 0.50, 0.46, 0.16], 2: [0.18, 0.42, 0.48, 0.10]}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], Path]:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = sweep(values=LAMBDAS, surrogate=None, seeds=[0, 1, 2])
        runs = []
        for row in study.rows():
            runs.append(Run(row, Path(row.name), {}, ratio_curve([12], [0.2]) if row.kind == "target" else of(row)))
        return study.report(runs, folder), folder


def of(row: Row) -> list[Record]:
    base = HITS[row.seed][0]
    place = LAMBDAS.index(float(row.name.split("_")[1]))
    return planted({"none": base, "closed_form": HITS[row.seed][place]})


def named(records: Sequence[Record], name: str, **definition: object) -> list[Record]:
    return [r for r in records if r.name == name and definition.items() <= r.definition.items()]


def test_hits_are_pooled_over_seeds_with_samples_behind_them(reported: tuple[list[Record], Path]) -> None:
    (hits,) = named(reported[0], "attack/side/hits", surrogate="closed_form", value="2.0")
    half = stats.t.ppf(0.975, 2) * stats.sem([0.5, 0.46, 0.48])
    theirs = stats.binomtest(720, 1500).proportion_ci(method="wilson")
    assert (hits.value, hits.n, hits.definition["seeds"]) == (pytest.approx(0.48), 1500, 3)
    assert (hits.low, hits.high) == pytest.approx((min(theirs.low, 0.48 - half), max(theirs.high, 0.48 + half)))
    assert (hits.definition["parameter"], hits.definition["rule"], hits.run) == ("lambda", "1/3", "pooled")
    assert "target_digest" not in hits.definition
    (unique,) = named(reported[0], "attack/side/unique_share", surrogate="closed_form", value="2.0")
    assert (unique.low, unique.high) == pytest.approx((0.24 - half / 2, 0.24 + half / 2))
    (ratio,) = named(reported[0], "memorization/ratio")
    assert (ratio.value, ratio.n) == (pytest.approx(0.2), 300)


def test_gains_are_paired_by_seed(reported: tuple[list[Record], Path]) -> None:
    (gain,) = named(reported[0], "sweep/gain", of="hits", value="2.0")
    theirs = stats.t.interval(0.95, 2, loc=0.28, scale=stats.sem([0.30, 0.24, 0.30]))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.28, *theirs))
    zero = named(reported[0], "sweep/gain", of="hits", value="0.0")[0]
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)
    assert named(reported[0], "sweep/gain", surrogate="none") == []


def test_ends_and_peak_are_paired_and_the_peaks_place_is_not_the_seeds_own(reported) -> None:
    (ends,) = named(reported[0], "sweep/ends", of="hits", surrogate="closed_form")
    assert ends.value == pytest.approx((-0.10 - 0.06 - 0.08) / 3)
    (peak,) = named(reported[0], "sweep/peak", of="hits", surrogate="closed_form")
    # the others' mean is highest at 2 for each seed but seed 2, whose others are 0.45 at 1 and 0.48 at 2
    each = [0.50 - 0.20, 0.46 - 0.22, 0.48 - 0.18]
    theirs = stats.t.interval(0.95, 2, loc=sum(each) / 3, scale=stats.sem(each))
    assert (peak.value, peak.low, peak.high) == pytest.approx((sum(each) / 3, *theirs))
    (flat,) = named(reported[0], "sweep/peak", of="hits", surrogate="none")
    assert flat.value == 0.0
    bands = {r.definition["of"]: r.value for r in named(reported[0], "sweep/ends", surrogate="closed_form")}
    assert bands == pytest.approx({"hits": -0.08, "ams/high": -0.04, "unique_share": -0.04, "ums/high": -0.02})


def test_a_peak_where_others_have_theirs_is_no_gain_by_choice() -> None:
    assert peak_over_ends([0.1, 0.9, 0.2, 0.3], [[0.0, 0.1, 0.6, 0.0]]) == pytest.approx(0.2 - 0.3)
    assert peak_over_ends([0.1, 0.4, 0.2], [[1.0, 0.0, 1.0]]) == pytest.approx(0.2)


def test_names_and_definitions_tell_all_pooled_records_apart(reported: tuple[list[Record], Path]) -> None:
    assert len({record.identity for record in reported[0]}) == len(reported[0])


def test_table_and_picture_show_every_value_beside_the_unguided_line(reported: tuple[list[Record], Path]) -> None:
    table = (reported[1] / "sweep.md").read_text()
    assert (
        "| lambda | arm | seeds | hits | over unguided | above unguided | held-out control | distinct images |" in table
    )
    assert "| 0.0 | unguided | 3 | 0.200 [" in table
    assert "| 2.0 | closed-form surrogate | 3 | 0.480 [" in table
    assert "* closed-form surrogate: hits at its peak 0.280 [" in table
    assert "* closed-form surrogate: hits at 4.0 -0.080 [" in table
    assert "* the targets themselves: memorization ratio 0.200 [" in table
    assert (reported[1] / "sweep.png").stat().st_size > 10_000


def test_one_seed_and_some_of_the_values_are_reported_too(tmp_path: Path) -> None:
    study = sweep(values=LAMBDAS[1:], surrogate=None, seeds=[0], logarithmic=True)
    rows = [row for row in study.rows() if row.kind == "attack"][:2]
    found = study.report([Run(row, Path(row.name), {}, of(row)) for row in rows], tmp_path)
    assert [r.value for r in named(found, "attack/side/hits", surrogate="closed_form")] == [0.40, 0.50]
    assert [r.value for r in named(found, "sweep/ends", of="hits", surrogate="closed_form")] == [pytest.approx(0.1)]
    assert named(found, "sweep/peak") == []
    (target,) = (row for row in study.rows() if row.kind == "target")
    early = study.report([Run(target, Path("t"), {}, ratio_curve([12], [0.2]))], tmp_path)
    assert [record.name for record in early] == ["memorization/ratio"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": ["missing.yaml"]}, r"attack must name .* missing: \['missing.yaml'\]"),
        ({"attack": []}, "attack must name at least one file"),
        ({"values": [1, 1]}, r"values must hold at least one and none twice, got \['1', '1'\]"),
        ({"values": []}, "values must hold at least one"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"sets": {}}, "sets must name a setting that takes the value"),
        (
            {"sets": {"surrogate": ["x"]}, "surrogate": None},
            "sets must name .* one of the surrogate, and time_independent, need its files",
        ),
        ({"time_independent": True, "surrogate": None}, "need its files, got sets .* and surrogate None"),
        ({"logarithmic": True, "values": [0.0, 1.0]}, r"a logarithmic axis needs positive numbers, got \[0.0, 1.0\]"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**changes)
