import math

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_mem.metrics import (
    bootstrap_interval,
    frechet_distance_from_features,
    jackknife_interval,
    wilson_interval,
)

RUNS = 200
ENOUGH = 0.9 * RUNS  # of intervals at 95 %: 3.2 standard errors of a right one below its expectation of 190


def covered(intervals, truth):
    return sum(low <= truth <= high for low, high in intervals)


def test_wilson_covers_a_binomial_share():
    counts = np.random.default_rng(0).binomial(512, 0.05, RUNS)
    assert covered([wilson_interval(int(count), 512) for count in counts], 0.05) >= ENOUGH


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (10, 10), (37, 512), (0, 1), (1, 1)])
def test_wilson_equals_scipy(successes, n):
    truth = scipy.stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
    low, high = wilson_interval(successes, n, level=0.9)
    assert (low, high) == (pytest.approx(truth.low, abs=1e-14), pytest.approx(truth.high, abs=1e-14))
    assert (low == 0.0) == (successes == 0)
    assert (high == 1.0) == (successes == n)


def test_bootstrap_covers_a_paired_difference_of_means():
    draw = np.random.default_rng(0)
    intervals = []
    for run in range(RUNS):
        shared = draw.normal(0, 5, 60)  # the starting noise: 5 times what differs between the arms
        first, second = shared + draw.normal(0.5, 1, 60), shared + draw.normal(0, 1, 60)
        intervals.append(
            bootstrap_interval(lambda a, b: (a - b).mean(), torch.tensor(first), second, resamples=150, seed=run)
        )
    assert covered(intervals, 0.5) >= ENOUGH
    widths = [high - low for low, high in intervals]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(2 / 60), rel=0.1)  # pairing kept the shared part out


def test_bootstrap_depends_on_its_seed_and_on_nothing_else():
    data = torch.rand(30, dtype=torch.float64)
    first = bootstrap_interval(torch.mean, data, resamples=50, seed=1)
    torch.rand(3)
    assert bootstrap_interval(torch.mean, data, resamples=50, seed=1) == first
    assert bootstrap_interval(torch.mean, data, resamples=50, seed=2) != first
    state = torch.get_rng_state()
    bootstrap_interval(torch.mean, data, resamples=50)
    assert torch.equal(state, torch.get_rng_state())


def test_jackknife_covers_the_frechet_distance_at_its_n():
    n, d = 150, 4
    draw = torch.Generator().manual_seed(0)

    def sets(count):
        a = torch.randn(count, n, d, generator=draw, dtype=torch.float64)
        b = torch.randn(count, n, d, generator=draw, dtype=torch.float64) * 1.3 + 0.5
        return a, b

    truth = np.mean([frechet_distance_from_features(a, b) for a, b in zip(*sets(1000), strict=True)])
    intervals = [
        jackknife_interval(lambda rows, a=a, b=b: frechet_distance_from_features(a[rows], b[rows]), n)
        for a, b in zip(*sets(RUNS), strict=True)
    ]
    assert covered(intervals, truth) >= ENOUGH


def test_jackknife_covers_the_number_of_distinct_values_where_the_bootstrap_does_not():
    n, values = 300, 400
    truth = values * (1 - (1 - 1 / values) ** n)  # expected number of distinct values among n uniform draws
    draw = torch.Generator().manual_seed(0)
    samples = torch.randint(values, (RUNS, n), generator=draw)
    intervals = [jackknife_interval(lambda rows, s=s: len(s[rows].unique()), n) for s in samples]
    assert covered(intervals, truth) >= ENOUGH
    plain = [bootstrap_interval(lambda s: len(s.unique()), s, resamples=40) for s in samples[:40]]
    assert covered(plain, truth) == 0


def test_jackknife_of_a_mean_is_students_interval_of_block_means():
    data = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = jackknife_interval(lambda rows: data[rows].mean(), 40, blocks=40, level=0.9)
    truth = scipy.stats.t.interval(0.9, 39, data.mean(), scipy.stats.sem(data.numpy()))
    assert (low, high) == (pytest.approx(truth[0]), pytest.approx(truth[1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(5, 4), "got 5 of 4"),
        (lambda: wilson_interval(-1, 4), "got -1 of 4"),
        (lambda: wilson_interval(0, 0), "got 0 of 0"),
        (lambda: wilson_interval(1, 2, level=95), r"\(0, 1\), got 95"),
        (lambda: bootstrap_interval(torch.mean, torch.rand(5), resamples=3), "at least 20, got 3"),
        (lambda: bootstrap_interval(torch.mean, torch.rand(5), torch.rand(6)), r"\[5, 6\] rows"),
        (lambda: bootstrap_interval(torch.mean), r"got \[\] rows"),
        (lambda: bootstrap_interval(lambda x: x.mean() / 0, torch.rand(5)), "a resample is inf"),
        (lambda: jackknife_interval(lambda rows: 1.0, 10), "2 .. n = 10, got 20"),
        (lambda: jackknife_interval(lambda rows: math.nan, 30), "all rows is nan"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
