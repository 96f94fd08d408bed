import math
import re

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_mem.metrics import data_copying, nearest_neighbors
from lightning_mem.metrics.three_sample import mann_whitney_z


def cloud(n, seed, d=4, centers=1):
    draw = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(centers, d)) * 20
    return torch.from_numpy(draw.normal(size=(n, d)) + means[np.arange(n) % centers])


@pytest.mark.parametrize("ties", [False, True])
def test_z_is_scipys(ties):
    draw = np.random.default_rng(0)
    first, second = draw.normal(0.3, 1, 40), draw.normal(0, 1, 55)
    if ties:
        first, second = first.round(1), second.round(1)
    options = {"alternative": "two-sided", "method": "asymptotic", "use_continuity": False}
    p = scipy.stats.mannwhitneyu(first, second, **options).pvalue
    z = mann_whitney_z(first, second)
    assert 2 * scipy.stats.norm.sf(abs(z)) == pytest.approx(p, rel=1e-10)
    assert z > 0 > mann_whitney_z(second, first) == pytest.approx(-z)
    assert mann_whitney_z(np.ones(5), np.ones(7)) == 0.0


def test_copies_are_far_below_zero_distant_samples_far_above_and_fresh_ones_near_it():
    members, heldout = cloud(200, seed=0), cloud(100, seed=1)
    copies = members[:100] + 0.01 * cloud(100, seed=2)
    assert data_copying(copies, members, heldout).value < -8
    assert data_copying(cloud(100, seed=3) * 3, members, heldout).value > 5
    assert abs(data_copying(cloud(100, seed=4), members, heldout).value) < 3
    one = data_copying(copies, members, heldout)
    near = [nearest_neighbors(rows, members, 1)[0][:, 0].numpy() for rows in (copies, heldout)]
    assert one.value == mann_whitney_z(*near)
    assert (one.left_out, one.weights.tolist(), one.deviation) == (0.0, [1.0], 1.0)


def test_without_copying_the_value_has_the_stated_deviation():
    values, deviations = [], []
    for run in range(60):
        members, heldout, samples = (cloud(60, seed=3 * run + part, centers=3) for part in range(3))
        found = data_copying(samples, members, heldout, cells=3, fewest=5)
        values.append(found.value)
        deviations.append(found.deviation)
    scores = np.array(values) / np.array(deviations)
    # both sides are compared with one training set, which is drawn anew each time: the mean is 0
    assert abs(scores.mean()) < 4 * scores.std() / math.sqrt(60)
    assert 0.7 < scores.std() < 1.35


def test_copying_in_one_region_is_seen_by_its_cell_and_weighted_by_heldout_images():
    members, heldout = cloud(300, seed=0, centers=3), cloud(150, seed=1, centers=3)
    samples = cloud(150, seed=2, centers=3)
    region = torch.arange(150) % 3 == 0
    samples[region] = members[:150][region] + 1e-3 * cloud(150, seed=3)[region]
    found = data_copying(samples, members, heldout, cells=3)
    assert sorted(found.scores.tolist())[0] < -7 < -3 < sorted(found.scores.tolist())[1]
    assert found.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert found.value == pytest.approx(found.scores.mean().item())
    # the same with a region that samples never reach: it is left out
    fewer = data_copying(samples[torch.arange(150) % 3 != 1], members, heldout, cells=3)
    assert len(fewer.scores) == 2
    assert fewer.left_out == 0.0


def test_samples_where_nothing_was_held_out_are_left_out_and_counted():
    members, samples = cloud(300, seed=0, centers=3), cloud(150, seed=2, centers=3)
    heldout = cloud(150, seed=1, centers=3)[torch.arange(150) % 3 != 2]
    assert data_copying(samples, members, heldout, cells=3).left_out == pytest.approx(1 / 3)


def test_images_and_arrays_give_the_same_as_their_pixels():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 1, 4, 4), generator=draw, dtype=torch.uint8)
    parts = images.split(30)
    truth = data_copying(*(part.flatten(1).double() / 255 for part in parts), cells=2, fewest=2)
    for given in (parts, [part.numpy() for part in parts]):
        found = data_copying(*given, cells=2, fewest=2)
        assert found.value == pytest.approx(truth.value)
    state, numpys = torch.get_rng_state(), np.random.mtrand.get_state()[1].tolist()
    first, again = (data_copying(*parts, cells=2, fewest=2, seed=1).value for _ in range(2))
    assert first == again
    assert torch.equal(state, torch.get_rng_state())
    assert numpys == np.random.mtrand.get_state()[1].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: data_copying(x, x, x, fewest=1), "fewest must be at least 2, got 1"),
        (lambda x: data_copying(x, x, x, cells=0), "cells must lie in 1 .. 10 (the training images), got 0"),
        (lambda x: data_copying(x, x, x, cells=11), "got 11"),
        (lambda x: data_copying(x, x, x), "no cell holds 20 samples and 20 held-out images (10 and 10 given, 1 cells)"),
        (lambda x: data_copying(x[:, :2], x, x, fewest=2), "rows of equal size, got (10, 2) and (10, 4)"),
        (lambda x: data_copying(x * math.nan, x, x, fewest=2), "row 0 holds a value that is not finite"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(cloud(10, seed=0))
