"""Onset: the first evaluation beyond doubt."""

import pytest
from run_records import curve, record

from lightning_mem.evaluation import onset


@pytest.mark.parametrize(
    ("lows", "expected"),
    [([0.0, 0.02, 0.05, 0.5], 20), ([0.0, 0.05, 0.02, 0.5, 0.6], 30), ([0.0, 0.0, 0.5], None), ([0.03, 0.03], None)],
)
def test_onset_needs_two_evaluations_above_the_control(lows: list[float], expected: int | None) -> None:
    assert onset(curve(lows)) == expected


def test_onset_compares_at_equal_n_only() -> None:
    assert onset(curve([0.5, 0.6], n=99)) is None


def test_a_last_test_with_more_samples_is_no_next_evaluation() -> None:
    last = [record("memorization/ratio", 20, 0.5, 0.6, 400), record("memorization/ratio_heldout", 20, 0.0, 0.03, 400)]
    assert onset([*curve([0.0, 0.0, 0.5]), *last]) is None
