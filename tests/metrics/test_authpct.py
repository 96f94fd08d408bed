import math
import pickle
import re

import numpy as np
import pytest
import torch

from lightning_mem.metrics import (
    Authenticity,
    authentic,
    authenticity,
    duplicate_groups,
    wilson_interval,
)


def pictures(n, seed, low=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, 3, 8, 8), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=3):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def by_definition(samples, bank):
    """One sample after another, in float64."""
    x, y = (np.asarray(rows, dtype=np.float64).reshape(len(rows), -1) for rows in (samples, bank))
    found = []
    for row in x:
        to_bank = ((y - row) ** 2).sum(1)
        nearest = to_bank.argmin()
        own = np.delete(((y - y[nearest]) ** 2).sum(1), nearest).min()
        found.append(to_bank[nearest] > own)
    return np.mean(found)


@pytest.mark.parametrize("seed", range(5))
def test_authenticity_is_its_definition(seed):
    draw = torch.Generator().manual_seed(seed)
    samples, bank = torch.randn(40, 5, generator=draw), torch.randn(30, 5, generator=draw)
    assert authenticity(samples, bank) == by_definition(samples, bank)
    assert 0 < authenticity(samples, bank) < 1
    images, pictured = pictures(20, seed), pictures(15, seed + 100)
    assert authenticity(images, pictured) == by_definition(images, pictured)


def test_copies_are_not_authentic_and_images_from_afar_are():
    bank = pictures(50, seed=0, low=100, high=156)
    samples = torch.cat([bank[:10], noisy(bank[10:20], seed=1), pictures(20, seed=2)])
    metric = Authenticity(bank)
    for part in samples.split([1, 30, 9]):
        metric.update(part)
    assert metric.compute() == authenticity(samples, bank) == 0.5
    assert metric.interval() == wilson_interval(20, 40)
    assert metric.higher_is_better


def test_unseen_images_of_the_same_source_are_authentic_about_half_of_the_time():
    # exchangeable: which of the two distances is larger is nearly a coin; so the value means nothing without a control
    draw = torch.Generator().manual_seed(0)
    values = [authenticity(torch.randn(100, 3, generator=draw), torch.randn(100, 3, generator=draw)) for _ in range(20)]
    assert 0.4 < np.mean(values) < 0.8


def test_equal_distances_are_not_authentic():
    assert authentic([1.0, 1.0, 1.5], [0, 1, 1], [1.0, 0.5]).tolist() == [False, True, True]
    bank = torch.tensor([[0.0], [1.0], [2.0]])
    assert authenticity(torch.tensor([[-1.0]]), bank) == 0.0


def test_duplicates_need_groups():
    bank = pictures(30, seed=0)
    doubled = torch.cat([bank, bank])
    copies = noisy(bank, seed=1)
    assert authenticity(copies, doubled) == 1.0  # each image's nearest other one is its double
    assert authenticity(copies, doubled, groups=duplicate_groups(doubled)) == 0.0
    metric = Authenticity(doubled)
    metric.update(copies)
    assert metric.compute() == 0.0


def test_swapped_sides_are_another_number():
    # the bug that a test by symmetry would miss: neighbours of samples among samples
    bank, samples = pictures(40, seed=0, low=100, high=156), pictures(40, seed=2)
    assert authenticity(samples, bank) == 1.0
    assert authenticity(bank, samples) == 0.0


def test_pickle_and_checkpoint_hold_no_bank():
    bank = pictures(30, seed=0)
    metric = Authenticity(bank)
    metric.update(bank[:3])
    assert pickle.loads(pickle.dumps(metric)).compute() == 0.0
    assert metric.state_dict() == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: authentic([], [], [1.0]), "distances must be floats [N >= 1], got torch.float32 (0,)"),
        (lambda: authentic([0.1], [0], [[1.0]]), "own_nearest must be floats"),
        (lambda: authentic([0.1, math.nan], [0, 0], [1.0]), "distances row 1 is nan"),
        (lambda: authentic([0.1], [0], [-1.0]), "own_nearest row 0 is -1.0"),
        (lambda: authentic([0.1], [1], [1.0]), "indices must be int64 [1] in 0 .. 0"),
        (lambda: authentic([0.1], [0, 0], [1.0]), "got torch.int64 (2,)"),
        (lambda: authenticity(torch.ones(2, 3), torch.ones(1, 3)), "at least two distinct images, got 1 among 1"),
        (lambda: authenticity(torch.ones(2, 3), torch.ones(4, 3), groups=[0, 0, 0, 0]), "got 1 among 4"),
        (lambda: Authenticity(pictures(1, 0)), "at least two distinct images, got 1 among 1"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
