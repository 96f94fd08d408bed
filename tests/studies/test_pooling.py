"""Intervals over seeds, crossings and power laws, against other libraries, numbers by hand and planted truths."""

import numpy as np
import pytest
from scipy import stats

from lightning_mem.studies import fit_power_law, level_crossing, pooled_share, seeds_interval
from lightning_mem.studies.onset import first_reach
from lightning_mem.studies.pooling import pooled_ratio


def test_interval_over_seeds_is_students() -> None:
    values = [0.31, 0.42, 0.29, 0.55]
    theirs = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert seeds_interval(values, level=0.9) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("values", "level"), [([0.5], 0.95), ([], 0.95), ([0.1, 0.2], 1.0)])
def test_interval_over_seeds_needs_two_of_them(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="at least 2 numbers and level lie in"):
        seeds_interval(values, level)


def test_one_seed_has_the_interval_of_its_samples() -> None:
    theirs = stats.binomtest(64, 256).proportion_ci(method="wilson")
    assert pooled_share([0.25], 256) == pytest.approx((0.25, theirs.low, theirs.high), abs=1e-12)


def test_seeds_that_agree_keep_the_doubt_of_their_samples() -> None:
    theirs = stats.binomtest(0, 300).proportion_ci(method="wilson")
    assert pooled_share([0.0, 0.0, 0.0], 100) == pytest.approx((0.0, 0.0, theirs.high), abs=1e-12)


def test_seeds_that_disagree_widen_the_interval_within_its_range() -> None:
    mean, low, high = pooled_share([0.2, 0.5, 0.8], 1000)
    half = stats.t.ppf(0.975, 2) * 0.3 / np.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.5, max(0, 0.5 - half), min(1, 0.5 + half)))


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares must lie in \[0, 1\] and be at least one, got \[1.5\]"):
        pooled_share([1.5], 10)
    with pytest.raises(ValueError, match="at least one"):
        pooled_share([], 10)


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_pooled_share_covers_the_truth(spread: float) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        truths = np.clip(0.4 + spread * rng.standard_normal(3), 0, 1)
        _, low, high = pooled_share([float(rng.binomial(256, truth)) / 256 for truth in truths], 256)
        covered += low <= 0.4 <= high
    assert covered >= 180


def test_crossing_of_the_cards_figures() -> None:
    # Gu et al.'s shipped figure, 32 x 32 unconditional: 0.92 at 1k, 0.61 at 2k
    assert level_crossing([1000, 2000], [0.92, 0.61], 0.9) == pytest.approx(1064.5, abs=0.05)
    assert level_crossing([500, 1000, 2000, 3000], [0.99, 0.92, 0.61, 0.35], 0.9) == pytest.approx(1064.5, abs=0.05)


def test_a_curve_that_comes_back_crosses_where_it_leaves_for_good() -> None:
    # the largest size at or above the level is 30
    assert level_crossing([10, 20, 30, 40], [1.0, 0.7, 0.9, 0.8], 0.9) == 30
    assert level_crossing([10, 20, 30, 40], [1.0, 0.7, 1.0, 0.8], 0.9) == pytest.approx(35)


@pytest.mark.parametrize("y", [[0.8, 0.5], [1.0, 0.95], [0.5, 0.9]])
def test_a_crossing_outside_the_sizes_is_none(y: list[float]) -> None:
    assert level_crossing([10, 20], y, 0.9) is None


@pytest.mark.parametrize(("x", "y"), [([20, 10], [1.0, 0.0]), ([10], [1.0, 0.0]), ([10, 10], [1.0, 0.0])])
def test_sizes_of_a_crossing_ascend(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="x must ascend and have as many numbers as y"):
        level_crossing(x, y, 0.9)


def test_a_planted_power_law_is_found() -> None:
    x = [32, 64, 64, 128, 256]
    law = fit_power_law(x, [300 * n**0.8 for n in x])
    assert (law.slope, law.low, law.high, law.scale) == pytest.approx((0.8, 0.8, 0.8, 300), rel=1e-6)
    assert law(1000) == pytest.approx(300 * 1000**0.8)


def test_the_slopes_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat([32, 48, 64, 96, 128, 192], 2).astype(float)
    covered = 0
    for _ in range(200):
        law = fit_power_law(x.tolist(), (12 * x**1.1 * np.exp(0.2 * rng.standard_normal(len(x)))).tolist())
        covered += law.low <= 1.1 <= law.high
    assert 180 <= covered < 200


def test_slope_and_interval_are_those_of_least_squares() -> None:
    x, y = [32, 48, 64, 64, 128], [410.0, 500.0, 790.0, 640.0, 1600.0]
    theirs = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, 3) * theirs.stderr
    law = fit_power_law(x, y)
    expected = (theirs.slope, theirs.slope - half, theirs.slope + half, np.exp(theirs.intercept), 5)
    assert (law.slope, law.low, law.high, law.scale, law.points) == pytest.approx(expected, rel=1e-9)


def test_a_flat_law_has_slope_zero() -> None:
    law = fit_power_law([20, 24, 30], [5, 5, 5])
    assert (law.slope, law.low, law.high) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 1, 2]), ([1, 2], [1])])
def test_a_power_law_needs_positive_points(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="a power law needs at least 3 positive points at 2 or more places"):
        fit_power_law(x, y)


def test_a_level_is_reached_between_two_evaluations() -> None:
    assert first_reach([100, 200, 300], [0.0, 0.05, 0.25], 0.1) == pytest.approx(225)
    assert first_reach([100, 200], [0.4, 0.2], 0.1) == pytest.approx(25)  # from 0 at step 0
    assert first_reach([100, 200, 300], [0.1, 0.0, 0.9], 0.1) == 100
    assert first_reach([100, 200], [0.0, 0.09], 0.1) is None
    with pytest.raises(ValueError, match="equally many and level above 0"):
        first_reach([100], [0.1], 0.0)


def test_a_ratio_is_pooled_on_the_logarithmic_scale() -> None:
    logs = np.log([2.0, 4.0, 2.5])
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert pooled_ratio([2.0, 4.0, 2.5]) == pytest.approx(tuple(np.exp([logs.mean(), low, high])), abs=1e-12)
    turned = pooled_ratio([0.5, 0.25, 0.4])  # the other arm over this one
    assert turned == pytest.approx((np.exp(-logs.mean()), np.exp(-high), np.exp(-low)), abs=1e-12)


def test_seeds_that_agree_on_a_ratio_keep_the_doubt_of_their_samples() -> None:
    assert pooled_ratio([2.0], [(1.0, 4.0)]) == pytest.approx((2.0, 1.0, 4.0))
    root = 2 ** (1 / np.sqrt(4))  # four equal doubts leave half of one, on the logarithmic scale
    assert pooled_ratio([2.0] * 4, [(1.0, 4.0)] * 4) == pytest.approx((2.0, 2 / root, 2 * root))


def test_a_ratio_without_doubt_or_logarithm_has_no_ends() -> None:
    assert pooled_ratio([1.5]) == (1.5, None, None)
    assert pooled_ratio([0.0, 1.0], [(0.0, 0.1), (0.5, 2.0)]) == (0.5, None, None)
    with pytest.raises(ValueError, match=r"ratios must be at least 0 and one per interval, got \[-1.0\]"):
        pooled_ratio([-1.0])


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_pooled_ratio_covers_the_truth(spread: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        errors = np.full(3, 0.1)
        logs = rng.normal(np.log(1.7), spread, 3) + rng.normal(0, errors)
        ends = [tuple(np.exp([log - 0.196, log + 0.196])) for log in logs]
        _, low, high = pooled_ratio(list(np.exp(logs)), ends)
        covered += low <= 1.7 <= high
    assert covered >= 180
