"""The curve against scikit-learn and against counting, its ties by hand, and whether its intervals cover."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_mem.metrics import roc, wilson_interval


def scores(seed: int, m: int, n: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which many are equal."""
    draw = np.random.default_rng(seed)
    return draw.normal(0.7, 1, m).round(levels), draw.normal(0, 1, n).round(levels)


@pytest.mark.parametrize("levels", [0, 1, 9])
def test_curve_and_area_are_those_of_scikit_learn(levels: int) -> None:
    members, heldout = scores(0, 83, 41, levels)
    found = roc(members, heldout)
    labels = np.repeat([1, 0], [83, 41])
    together = np.concatenate([members, heldout])
    fpr, tpr, thresholds = roc_curve(labels, together, drop_intermediate=False)
    np.testing.assert_allclose(found.fpr, fpr, rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.tpr, tpr, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(found.thresholds, thresholds)
    assert found.auc == pytest.approx(roc_auc_score(labels, together), abs=1e-14)
    assert found.balanced_accuracy == pytest.approx(((tpr + 1 - fpr) / 2).max(), abs=1e-14)
    assert (found.num_members, found.num_heldout) == (83, 41)


def test_the_area_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half() -> None:
    members, heldout = scores(1, 30, 20, 0)
    pairs = [(x > y) + 0.5 * (x == y) for x in members for y in heldout]
    assert roc(members, heldout).auc == pytest.approx(np.mean(pairs), abs=1e-15)
    assert roc([1.0, 2.0], [0.0]).auc == 1
    assert roc([0.0], [1.0, 2.0]).auc == 0
    assert roc([3.0, 3.0], [3.0]).auc == 0.5
    assert roc([0.0], [1.0, 2.0]).auc_folded == 1
    assert roc([math.inf, 0.0], [-math.inf]).auc == 1


def test_a_rate_is_read_off_the_steps_and_a_tie_is_taken_whole() -> None:
    # thresholds 5: (1, 0), 4: (2, 1), 3: (2, 3) with two held-out images at once, 2: (4, 3), 1: (4, 4)
    found = roc([5, 4, 2, 2], [4, 3, 3, 1])
    assert found.true_positives.tolist() == [0, 1, 2, 2, 4, 4]
    assert found.false_positives.tolist() == [0, 0, 1, 3, 3, 4]
    at = {0.0: 0.25, 0.24: 0.25, 0.25: 0.5, 0.5: 0.5, 0.74: 0.5, 0.75: 1.0, 1.0: 1.0}
    assert {fpr: found.tpr_at(fpr) for fpr in at} == at
    assert found.tpr_at(0.24, "nearest") == 0.5  # 0.25 is nearer than 0
    assert found.tpr_at(0.6, "nearest") == 1.0
    assert [found.threshold_at(fpr) for fpr in (0.0, 0.25, 0.8)] == [5, 4, 2]
    assert roc([1], [2]).threshold_at(0.5) == math.inf
    assert found.balanced_accuracy == 0.625  # at 5, at 4 and at 2
    assert [found.balanced_accuracy_at(x) for x in (6, 5, 4.5, 3, 0)] == [0.5, 0.625, 0.625, 0.375, 0.5]


def test_one_in_a_thousand_needs_a_thousand_and_decimal_rates_do_not_slip() -> None:
    members = torch.arange(1000) + 0.5
    for n, expected in ((1000, 1), (10000, 10), (999, 0)):
        found = roc(members, torch.arange(n) / n * 1000)
        assert int(found.false_positives[found._place(0.001)]) == expected
    found = roc(range(100), range(100))
    for percent in range(101):
        assert found.tpr_at(percent / 100) == percent / 100


def test_delong_is_the_variance_of_the_placements() -> None:
    members, heldout = scores(2, 40, 60, 1)
    wins = (members[:, None] > heldout) + 0.5 * (members[:, None] == heldout)
    error = math.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60)
    auc = wins.mean()
    half = stats.norm.ppf(0.95) * error / (auc * (1 - auc))
    low, high = roc(members, heldout).auc_interval(0.9)
    assert math.log(low / (1 - low)) == pytest.approx(math.log(auc / (1 - auc)) - half, abs=1e-12)
    assert math.log(high / (1 - high)) == pytest.approx(math.log(auc / (1 - auc)) + half, abs=1e-12)


def test_perfect_separation_is_not_certainty() -> None:
    low, high = roc(np.arange(10) + 20, np.arange(12)).auc_interval()
    assert high == 1
    # Newcombe's variance at the lower end puts the AUC seen exactly 1.96 standard errors away
    variance = low * (1 - low) * (1 + 10 * ((1 - low) / (2 - low) + low / (1 + low))) / 120
    assert (1 - low) / math.sqrt(variance) == pytest.approx(stats.norm.ppf(0.975), abs=1e-6)
    assert 0.7 < low < 0.95
    assert roc([0] * 5, [0] * 5).auc_interval() != (0.5, 0.5)


def test_intervals_cover_the_truth_of_two_gaussians() -> None:
    truth, at = stats.norm.cdf(1 / math.sqrt(2)), stats.norm.sf(stats.norm.isf(0.05) - 1)
    auc, rate = 0, 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        found = roc(draw.normal(1, 1, 60), draw.normal(0, 1, 80))
        low, high = found.auc_interval()
        auc += low <= truth <= high
        low, high = found.tpr_interval(0.05)
        assert low <= found.tpr_at(0.05) <= high
        rate += low <= at <= high
    assert auc >= 180
    assert rate >= 180


def test_the_rate_at_few_false_positives_is_as_unsure_as_it_is() -> None:
    members = np.arange(100) + 1000
    few, many = roc(members, np.arange(100)), roc(members, np.arange(10000) / 100)
    assert few.tpr_at(0.001) == many.tpr_at(0.001) == 1
    assert few.tpr_interval(0.001)[0] == 0  # none of 100 held-out images says where 1 in 1000 lies
    assert many.tpr_interval(0.001)[0] == pytest.approx(wilson_interval(100, 100, 0.975)[0])
    assert many.tpr_interval(0.001)[1] == 1


def test_a_folded_interval_begins_at_a_half_where_it_holds_one() -> None:
    one, other = scores(3, 40, 40, 9)
    low, high = roc(one, other).auc_interval()
    assert roc(other, one).auc_folded_interval() == pytest.approx((low, high), abs=1e-12)
    same = roc(one, one + 1e-6)
    assert same.auc_folded_interval()[0] == 0.5
    assert same.auc_folded_interval()[1] == pytest.approx(max(same.auc_interval()[1], 1 - same.auc_interval()[0]))


def test_what_is_no_score_or_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scores_heldout must be a non-empty \[N\], got \(0,\)"):
        roc([1.0], [])
    with pytest.raises(ValueError, match="scores_members holds 1 values that are NaN, of 2"):
        roc([math.nan, 1.0], [1.0])
    found = roc([1.0], [0.0])
    for call in (found.tpr_at, found.threshold_at, found.tpr_interval):
        with pytest.raises(ValueError, match=r"fpr must lie in \[0, 1\], a fraction, got 5"):
            call(5)
    with pytest.raises(ValueError, match="point must be at_most or nearest, got 'last'"):
        found.tpr_at(0.1, "last")  # type: ignore[arg-type]
