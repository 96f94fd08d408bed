import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mem.metrics import (
    MemorizationRatio,
    NormalizedL2,
    duplicate_groups,
    memorization_ratio,
    memorized,
    nearest_neighbors,
    normalized_l2,
    wilson_interval,
)


def pictures(n, seed, size=8, channels=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=3):
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(-amount, amount + 1, images.shape, generator=draw)
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_planted_copies_have_rank_one_and_the_ratio_is_their_share(share):
    bank, fresh = pictures(200, seed=0), pictures(100, seed=1)
    copies = round(100 * share)
    samples = torch.cat([noisy(bank[50 : 50 + copies], seed=2), fresh[copies:]])
    distances, indices = nearest_neighbors(samples, bank, 2)
    assert indices[:copies, 0].tolist() == list(range(50, 50 + copies))
    assert memorization_ratio(distances) == share
    metric = MemorizationRatio(bank)
    metric.update(samples)
    assert metric.compute().item() == share


def test_farthest_instead_of_nearest_fails_the_planted_bank():
    # the bug of a public implementation: 1 / (distance + 1e-8) sorted as if it were a distance
    bank = pictures(200, seed=0)
    distances, _ = nearest_neighbors(noisy(bank[:50], seed=2), bank, 200)
    inverted = (1 / (distances + 1e-8)).sort(1).values[:, :2]
    assert memorization_ratio(inverted) != 1.0
    assert memorization_ratio(distances) == 1.0


def test_ratio_of_exactly_one_third_is_not_counted():
    assert memorized(torch.tensor([[1.0, 3.0]], dtype=torch.float64)).tolist() == [False]
    assert memorized(torch.tensor([[1.0, 3.0 + 1e-12]], dtype=torch.float64)).tolist() == [True]
    assert memorized(torch.tensor([[1.0, 3.0], [1.0, 3.00001], [1.0, 2.99999]])).tolist() == [False, True, False]


def test_one_third_survives_the_rounding_of_float32_distances():
    # sqrt(a)/255 and sqrt(9a)/255 rounded to float32: their quotient falls below 1/3 for a third of all a
    a = torch.arange(1, 5000, dtype=torch.float64)
    distances = (torch.stack([a, 9 * a], 1).sqrt() / 255).float()
    assert (distances[:, 0].double() / distances[:, 1].double() < 1 / 3).double().mean() > 0.3
    assert memorization_ratio(distances) == 0.0
    just_below = (torch.stack([a, 9 * a + 1], 1).sqrt() / 255).float()
    assert memorization_ratio(just_below) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2.0**-9, 0.5, 4.0, 255.0 * 2**10]))
def test_ratio_and_normalized_l2_do_not_depend_on_scale(seed, scale):
    distances = np.sort(np.random.default_rng(seed).random((40, 5)), 1)
    assert memorization_ratio(distances * scale) == memorization_ratio(distances)
    np.testing.assert_allclose(normalized_l2(distances * scale), normalized_l2(distances), rtol=1e-14)


def test_duplicated_bank_needs_groups():
    bank = pictures(40, seed=0)
    doubled = torch.cat([bank, bank])
    copies = noisy(bank, seed=1)
    naive, _ = nearest_neighbors(copies, doubled, 2)
    assert memorization_ratio(naive) == 0.0
    grouped, _ = nearest_neighbors(copies, doubled, 2, groups=duplicate_groups(doubled))
    assert memorization_ratio(grouped) == 1.0
    metric = MemorizationRatio(doubled)
    metric.update(copies)
    assert metric.compute() == 1.0
    exact = MemorizationRatio(doubled, groups=torch.arange(80))
    with pytest.raises(ValueError, match=r"row 0 has a second nearest distance of 0.*duplicate_groups"):
        exact.update(bank)


def test_bank_with_mirror_images_of_nearly_symmetric_pictures_needs_mirror():
    half = pictures(40, seed=0)[..., :4]
    bank = torch.cat([half, noisy(half, seed=1, amount=1).flip(-1)], dim=-1)
    flipped = torch.cat([bank, bank.flip(-1)])
    copies = noisy(bank, seed=2)
    values = {}
    for mirror in (False, True):
        metric = MemorizationRatio(flipped, mirror=mirror)
        metric.update(copies)
        values[mirror] = metric.compute().item()
    assert values == {False: 0.0, True: 1.0}


def test_normalized_l2_by_hand():
    assert normalized_l2(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [1.0]
    assert normalized_l2(torch.full((2, 50), 0.7)).tolist() == [pytest.approx(2.0)] * 2
    assert normalized_l2(torch.tensor([[0.0, 1.0]]), alpha=0.3).tolist() == [0.0]
    truth = np.sort(np.random.default_rng(0).random((10, 50)), 1)
    np.testing.assert_allclose(normalized_l2(truth, 0.25), truth[:, 0] / (0.25 * truth.mean(1)), rtol=1e-14)


def test_normalized_l2_metric_counts_copies_and_says_its_k():
    bank, fresh = pictures(30, seed=0), pictures(10, seed=1)
    metric = NormalizedL2(bank)
    assert metric.k == 30
    assert NormalizedL2(torch.cat([bank, bank]), k=50).k == 30
    metric.update(torch.cat([noisy(bank[:6], seed=2), fresh]))
    assert metric.compute() == 6 / 16


METRICS = {"ratio": MemorizationRatio, "normalized_l2": NormalizedL2}


@pytest.fixture(params=METRICS)
def metric_class(request):
    return METRICS[request.param]


def test_unequal_batches_and_summed_states_equal_one_batch(metric_class):
    bank = pictures(60, seed=0)
    samples = torch.cat([noisy(bank[:13], seed=2), pictures(28, seed=1)])
    whole = metric_class(bank)
    whole.update(samples)
    ranks = [metric_class(bank) for _ in range(3)]
    for rank, size in zip(ranks, [(1, 20), (7,), (13,)], strict=True):
        for batch in size:
            rank.update(samples[:batch])
            samples = samples[batch:]
    assert len(samples) == 0
    merged = metric_class(bank)
    for name in ("hits", "total"):  # what a reduction by sum does under DDP
        setattr(merged, name, sum(getattr(rank, name) for rank in ranks))
    merged._update_count = 1
    assert merged.compute() == whole.compute() == 13 / 41
    assert whole.interval() == wilson_interval(13, 41)
    assert all(
        reduction == torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in whole._reductions.values()
    )


def test_pickle_clone_reset_and_checkpoint(metric_class):
    bank = pictures(60, seed=0)
    metric = metric_class(bank)
    metric.update(noisy(bank[:5], seed=1))
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        other.update(pictures(5, seed=2))
        assert other.compute() == 0.5
    assert metric.compute() == 1.0
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    metric.persistent(True)
    assert set(metric.state_dict()) == {"hits", "total"}  # never the bank
    metric.reset()
    metric.update(pictures(5, seed=2))
    assert metric.compute() == 0.0


def test_forward_gives_the_batch_and_keeps_the_sum():
    bank = pictures(60, seed=0)
    metric = MemorizationRatio(bank)
    assert metric(noisy(bank[:5], seed=1)) == 1.0
    assert metric(pictures(15, seed=2)) == 0.0
    assert metric.compute() == 0.25


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (torch.rand(0, 2), "torch.float32 (0, 2)"),
        (torch.rand(3, 1), "(3, 1)"),
        (torch.rand(3), "(3,)"),
        (torch.ones(3, 2, dtype=torch.int64), "torch.int64"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), "row 1 holds a distance that is not finite"),
        (torch.tensor([[0.0, float("inf")]]), "row 0 holds a distance that is not finite"),
        (torch.tensor([[0.0, 1.0], [2.0, 1.0]]), "row 1 must hold ascending distances >= 0, got [2.0, 1.0]"),
        (torch.tensor([[-1.0, 1.0]]), "got [-1.0, 1.0]"),
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "row 1 has"),
    ],
)
def test_malformed_distances_are_refused(distances, message):
    for function in (memorization_ratio, normalized_l2):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(distances)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold):
    for call in (
        lambda: memorization_ratio(torch.tensor([[0.0, 1.0]]), threshold),
        lambda: MemorizationRatio(pictures(3, seed=0), threshold=threshold),
    ):
        with pytest.raises(ValueError, match=re.escape(f"threshold must lie in (0, 1), got {threshold}")):
            call()


def test_other_wrong_values_are_refused(metric_class):
    bank = pictures(5, seed=0)
    with pytest.raises(ValueError, match=r"bank must be uint8 .* torch.float32"):
        metric_class(bank.float())
    with pytest.raises(ValueError, match="at least two distinct images, got 1 among 3"):
        metric_class(bank[:1].repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"int64 \[5\], one per bank row, got \(4,\)"):
        metric_class(bank, groups=torch.arange(4))
    with pytest.raises(ValueError, match="groups and mirror=True"):
        metric_class(bank, groups=torch.arange(5), mirror=True)
    metric = metric_class(bank)
    with pytest.raises(ValueError, match=r"bank's shape \(3, 8, 8\), got \(3, 16, 16\)"):
        metric.update(pictures(2, seed=0, size=16))
    with pytest.raises(ValueError, match=r"images must be uint8 .* torch.float32"):
        metric.update(bank / 255)
    with pytest.raises(ValueError, match="0 images"), pytest.warns(UserWarning, match="before the ``update``"):
        metric_class(bank).compute()
    for options, message in [({"k": 1}, "got 1"), ({"alpha": 0.0}, "got 0.0"), ({"cut": 2.0}, r"\(0, 2\).* got 2.0")]:
        with pytest.raises(ValueError, match=message):
            NormalizedL2(bank, **options)
    with pytest.raises(ValueError, match="alpha must be positive, got -1"):
        normalized_l2(torch.tensor([[0.0, 1.0]]), alpha=-1)
