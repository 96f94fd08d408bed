import math
import pickle
import re

import numpy as np
import pytest
import torch

from lightning_mem.metrics import (
    SamplePhases,
    nearest_neighbors,
    phase_shares,
    phase_threshold,
    sample_phases,
    wilson_interval,
)


def pictures(n, seed, size=8, channels=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=5):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def test_memorized_comes_before_spurious_and_both_thresholds_belong_to_the_near_side():
    members = [0.1, 0.2, 0.21, 0.3, 0.3]
    samples = [0.0, 0.5, 0.3, 0.31, 0.0]
    assert sample_phases(members, samples, delta_members=0.2, delta_samples=0.3).tolist() == [0, 0, 1, 2, 1]
    shares = phase_shares(members, samples, delta_members=0.2, delta_samples=0.3)
    assert shares == {"memorized": 0.4, "spurious": 0.4, "generalized": 0.2}


def planted():
    """30 copies of training images, 20 of a picture the bank does not hold, 50 fresh ones."""
    bank, attractor, fresh = pictures(100, seed=0), pictures(1, seed=1), pictures(50, seed=2)
    return bank, torch.cat([noisy(bank[:30], seed=3), noisy(attractor.repeat(20, 1, 1, 1), seed=4), fresh])


def test_planted_phases_are_found_with_thresholds_from_held_out_images():
    bank, samples = planted()
    heldout = pictures(100, seed=5)
    root = 8.0
    delta_members = phase_threshold(nearest_neighbors(heldout, bank, 1)[0][:, 0] / root)
    delta_samples = phase_threshold(nearest_neighbors(heldout, heldout, 2)[0][:, 1] / root)
    metric = SamplePhases(bank, delta_members, delta_samples)
    for part in samples.split([1, 60, 39]):
        metric.update(part)
    found = metric.compute()
    # of 50 fresh images one in a hundred is accepted below each threshold
    assert found["memorized"].item() == pytest.approx(0.3, abs=0.021)
    assert found["spurious"].item() == pytest.approx(0.2, abs=0.021)
    assert sum(found.values()).item() == pytest.approx(1, abs=1e-12)
    assert metric.phases()[:50].tolist() == [0] * 30 + [1] * 20


def test_a_sample_is_not_its_own_neighbour_but_an_equal_sample_is():
    bank, samples = pictures(20, seed=0), pictures(10, seed=1)
    alone, twice = SamplePhases(bank, 0.01, 0.01), SamplePhases(bank, 0.01, 0.01)
    alone.update(samples)
    twice.update(torch.cat([samples, samples[:2]]))
    assert alone.compute()["generalized"] == 1.0
    assert twice.phases().tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1]


def test_inverted_distances_fail_the_planted_phases():
    # the bug of the method's public code: 1 / (distance + 1e-8) compared as if it were a distance
    bank, samples = planted()
    to_members = nearest_neighbors(samples, bank, 100)[0].double() / 8
    to_samples = nearest_neighbors(samples, samples, 100)[0].double() / 8
    right = phase_shares(to_members[:, 0], to_samples[:, 1], delta_members=0.05, delta_samples=0.05)
    assert right == {"memorized": 0.3, "spurious": 0.2, "generalized": 0.5}
    inverted = [1 / (rows + 1e-8) for rows in (to_members[:, -1], to_samples[:, -1])]
    assert phase_shares(*inverted, delta_members=0.05, delta_samples=0.05) != right


def test_threshold_accepts_at_most_its_rate_of_further_unseen_images():
    draw = np.random.default_rng(0)
    accepted = [
        (draw.exponential(size=50) <= phase_threshold(draw.exponential(size=99), rate=0.05)).mean() for _ in range(400)
    ]
    # k = 5 of 100: the expectation is exactly 0.05
    assert np.mean(accepted) == pytest.approx(0.05, abs=4 * np.std(accepted) / 20)


def test_threshold_is_an_order_statistic_and_says_the_minimum_of_images():
    distances = torch.arange(1, 100, dtype=torch.float64)
    assert phase_threshold(distances.flip(0), rate=0.01) == 1.0
    assert phase_threshold(distances, rate=0.05) == 5.0
    with pytest.raises(ValueError, match=r"a rate of 0.01 needs at least 99 held-out images, got 98"):
        phase_threshold(distances[:98], rate=0.01)
    assert [phase_threshold(distances[: round(1 / r - 1)], rate=r) for r in (0.5, 0.2, 0.1, 0.05, 0.02)] == [1.0] * 5


def test_interval_of_memorized_is_wilsons_and_pairs_have_none():
    bank, samples = planted()
    metric = SamplePhases(bank, 0.05, 0.05)
    metric.update(samples)
    assert metric.intervals() == {"memorized": wilson_interval(30, 100), "spurious": None, "generalized": None}


def test_a_process_that_saw_no_sample_gathers_with_the_others():
    bank, samples = planted()
    whole, empty = SamplePhases(bank, 0.05, 0.05), SamplePhases(bank, 0.05, 0.05)
    whole.update(samples)
    others = {4: samples, 1: whole.to_members[0]}  # by the number of dimensions, which a gather needs equal

    def gather(part, group=None):
        assert part.dtype == others[part.ndim].dtype
        return [part, others[part.ndim]]

    empty.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert empty.phases().tolist() == whole.phases().tolist()
    empty.unsync()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        empty.phases()


def test_gathered_states_of_three_ranks_equal_one_process_and_no_checkpoint_holds_images():
    bank, samples = planted()
    whole = SamplePhases(bank, 0.05, 0.05)
    whole.update(samples)
    ranks = [SamplePhases(bank, 0.05, 0.05) for _ in range(3)]
    for rank, part in zip(ranks, samples[torch.randperm(100)].split([1, 70, 29]), strict=True):
        rank.update(part)
    merged = SamplePhases(bank, 0.05, 0.05)
    for name in ("samples", "to_members"):  # what a reduction by concatenation does under DDP
        setattr(merged, name, torch.cat([part for rank in ranks for part in getattr(rank, name)]))
    merged._update_count = 1
    assert merged.compute() == whole.compute()
    assert merged.intervals() == whole.intervals()
    assert pickle.loads(pickle.dumps(whole)).compute() == whole.compute()
    assert whole.state_dict() == {}
    whole.reset()
    whole.update(samples[:2])
    assert whole.compute()["memorized"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_phases([0.1], [0.1], delta_members=-1, delta_samples=0.1), "delta_members must be at least 0"),
        (
            lambda: sample_phases([0.1], [0.1], delta_members=1, delta_samples=math.nan),
            "delta_samples must be at least",
        ),
        (lambda: sample_phases([0.1], [0.1, 0.2], delta_members=1, delta_samples=1), "of the same samples, got 1, 2"),
        (lambda: sample_phases([0.1, -0.1], [0.1, 1.0], delta_members=1, delta_samples=1), "to_members row 1 is -0.1"),
        (lambda: sample_phases([0.1], [math.inf], delta_members=1, delta_samples=1), "to_samples row 0 is inf"),
        (lambda: sample_phases([], [], delta_members=1, delta_samples=1), "floats [N >= 1], got torch.float32 (0,)"),
        (lambda: phase_threshold([[0.1]], 0.5), "got torch.float32 (1, 1)"),
        (lambda: phase_threshold([0.1], 1.0), "rate must lie in (0, 1), got 1.0"),
        (lambda: SamplePhases(pictures(3, 0), -0.1, 0.1), "delta_members must be at least 0, got -0.1"),
        (lambda: SamplePhases(pictures(3, 0) / 255, 0.1, 0.1), "bank must be uint8"),
        (lambda: SamplePhases(pictures(3, 0), 0.1, 0.1).update(pictures(3, 0, size=4)), "got (1, 4, 4)"),
        (lambda: SamplePhases(pictures(3, 0), 0.1, 0.1).phases(), "needs at least 2 samples, got 0"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
