"""Planted truth: bank rows and a little noise for a share p of the samples, fresh images for the rest."""

import math

import pytest
import torch

from lightning_mem.metrics import (
    Authenticity,
    EideticMemorization,
    MemorizationRatio,
    MemorizationScores,
    authentic,
    authenticity,
    average_memorization_score,
    eidetic_count,
    memorization_ratio,
    nearest_neighbors,
    normalized_l2,
    own_nearest_distances,
    phase_shares,
    unique_memorization_score,
)

NEAR = {"copy": (0.0, 0.05)}
SAMPLES = 60


def pictures(n, seed, low=0, high=256, size=8):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, 3, size, size), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=4):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def planted(share, size=8):
    """A bank of muted pictures, samples (copies of a third as many distinct rows, and loud fresh ones), those rows."""
    bank = pictures(200, seed=0, low=96, high=160, size=size)
    copies = round(SAMPLES * share)
    rows = torch.arange(copies) // 3 * 7 % 200
    return bank, torch.cat([noisy(bank[rows], seed=1), pictures(SAMPLES - copies, seed=2, size=size)]), rows


def nearest_first(samples, bank, k):
    return nearest_neighbors(samples, bank, k)


def farthest_first(samples, bank, k):
    """The bug of a public implementation: 1 / (distance + 1e-8) sorted as if it were a distance."""
    distances, indices = nearest_neighbors(samples, bank, len(bank))
    inverted, order = (1 / (distances + 1e-8)).sort(1)
    return inverted[:, :k], indices.gather(1, order)[:, :k]


def check(search, share):
    """Every rule finds the planted share, and the distinct rows, through ``search``."""
    bank, samples, rows = planted(share)
    copies = len(rows)
    distances, indices = search(samples, bank, 50)
    assert indices[:copies, 0].tolist() == rows.tolist()  # planted copies have rank one
    assert memorization_ratio(distances[:, :2]) == share
    assert (normalized_l2(distances) < 1).double().mean().item() == share
    rms = torch.full((SAMPLES, len(bank)), 10.0)
    rms.scatter_(1, indices, distances / math.sqrt(192))
    assert average_memorization_score(rms, NEAR, closer="smaller")["copy"] == share
    for pairs in ("any", "nearest"):
        unique = unique_memorization_score(rms, NEAR, closer="smaller", pairs=pairs)["copy"]
        assert unique == len(rows.unique()) / SAMPLES
    own = search(bank, bank, 2)[0][:, 1]
    assert 1 - authentic(distances[:, 0], indices[:, 0], own).double().mean().item() == pytest.approx(share, abs=1e-12)
    between = search(samples, samples, 2)[0][:, 1]
    phases = phase_shares(
        distances[:, 0] / math.sqrt(192), between / math.sqrt(192), delta_members=0.05, delta_samples=0.05
    )
    assert phases == {"memorized": share, "spurious": 0.0, "generalized": pytest.approx(1 - share, abs=1e-12)}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.8, 1.0])
def test_every_rule_finds_the_planted_share_and_the_distinct_rows(share):
    check(nearest_first, share)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8, 1.0])
def test_an_inverted_search_fails_the_same_check(share):
    with pytest.raises(AssertionError):
        check(farthest_first, share)


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("chunk_bytes", [None, 400_000])
def test_the_metric_classes_find_them_too_in_chunks(share, chunk_bytes):
    bank, samples, rows = planted(share)
    metrics = {
        "ratio": MemorizationRatio(bank, chunk_bytes=chunk_bytes),
        "scores": MemorizationScores(bank, NEAR, measure="rms_l2", chunk_bytes=chunk_bytes),
        "authenticity": Authenticity(bank, chunk_bytes=chunk_bytes),
        "eidetic": EideticMemorization(bank, 0.05, chunk_bytes=chunk_bytes),
    }
    for metric in metrics.values():
        for part in samples.split([1, 7, 31, 21]):
            metric.update(part)
    distinct = len(rows.unique())
    assert metrics["ratio"].compute() == share
    assert metrics["scores"].compute() == {"average/copy": share, "unique/copy": distinct / SAMPLES}
    assert 1 - metrics["authenticity"].compute().item() == pytest.approx(share, abs=1e-12)
    assert metrics["eidetic"].compute() == distinct
    assert metrics["eidetic"].indices().tolist() == sorted(set(rows.tolist()))


def test_a_copied_image_of_12288_values_is_at_distance_zero_exactly():
    bank = pictures(30, seed=0, size=64)
    distances, indices = nearest_neighbors(bank[5:15], bank, 2)
    assert bank[0].numel() == 12288
    assert distances[:, 0].tolist() == [0.0] * 10
    assert indices[:, 0].tolist() == list(range(5, 15))
    assert memorization_ratio(distances) == 1.0
    assert eidetic_count(bank[5:15], bank, 0.0).tolist() == [1] * 10
    assert authenticity(bank[5:15], bank) == 0.0
    assert own_nearest_distances(bank).min() > 0
    metric = MemorizationScores(bank, {"exact": (0.0, 1e-9)}, measure="rms_l2")
    metric.update(bank[5:15])
    assert metric.compute() == {"average/exact": 1.0, "unique/exact": 1.0}
