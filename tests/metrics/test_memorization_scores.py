import math
import pickle
import re

import numpy as np
import pytest
import torch

from lightning_mem.metrics import (
    MemorizationScores,
    PixelsExtractor,
    average_memorization_score,
    duplicate_groups,
    memorization_curves,
    nearest_neighbors,
    normalized_l2,
    unique_memorization_score,
    wilson_interval,
)
from lightning_mem.metrics import similarities as similarities_file
from lightning_mem.metrics.similarities import score_blocks

COSINES = {"low": (0.1, 0.3), "mid": (0.3, 0.6), "high": (0.6, math.inf)}
DISTANCES = {"close": (0.0, 0.2), "near": (0.2, 0.4), "far": (0.4, 0.42)}
RATIOS = {"close": (0.0, 1.0), "near": (1.0, 1.9), "far": (1.9, 2.0)}


def vectors(n, seed, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pictures(n, seed, size=4, channels=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=20):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def cosines(samples, bank):
    a, b = samples.numpy().astype(np.float64), bank.numpy().astype(np.float64)
    return (a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)).astype(np.float32)


def rms(samples, bank):
    a, b = (x.numpy().astype(np.float64).reshape(len(x), -1) / 255 for x in (samples, bank))
    return np.sqrt(((a[:, None] - b) ** 2).mean(2)).astype(np.float32)


@pytest.mark.parametrize("pairs", ["any", "nearest"])
@pytest.mark.parametrize("chunk_bytes", [None, 4000, 1])
def test_cosines_in_chunks_equal_the_functions_on_the_whole_matrix(pairs, chunk_bytes):
    bank, samples = vectors(50, seed=0), vectors(41, seed=1)
    samples[:7] = bank[3] * 2 + 0.1 * vectors(7, seed=2)
    groups = torch.arange(50) // 2 * 5
    thresholds = (0.2, 0.5, 0.9)
    metric = MemorizationScores(
        bank, COSINES, pairs=pairs, groups=groups, thresholds=thresholds, chunk_bytes=chunk_bytes
    )
    for part in samples.split([1, 20, 13, 7]):
        metric.update(part)
    truth = cosines(samples, bank)
    found = metric.compute()
    average = average_memorization_score(truth, COSINES)
    unique = unique_memorization_score(truth, COSINES, pairs=pairs, groups=groups)
    assert {k: v.item() for k, v in found.items()} == {
        **{f"average/{k}": v for k, v in average.items()},
        **{f"unique/{k}": v for k, v in unique.items()},
    }
    for curve, wanted in zip(
        metric.curves(), memorization_curves(truth, thresholds, pairs=pairs, groups=groups), strict=True
    ):
        assert torch.equal(curve, wanted)


@pytest.mark.parametrize("pairs", ["any", "nearest"])
def test_pixel_distances_equal_the_functions_on_the_whole_matrix(pairs):
    bank = pictures(30, seed=0)
    samples = torch.cat([noisy(bank[4:9], seed=1), bank[:2], pictures(12, seed=2)])
    metric = MemorizationScores(bank.numpy(), DISTANCES, measure="rms_l2", pairs=pairs, thresholds=(0.1, 0.4))
    metric.update(samples)
    truth = rms(samples, bank)
    average = average_memorization_score(truth, DISTANCES, closer="smaller")
    unique = unique_memorization_score(truth, DISTANCES, closer="smaller", pairs=pairs)
    assert average["close"] == unique["close"] == 7 / 19
    assert average["near"] > 0
    found = metric.compute()
    for name in DISTANCES:
        assert (found[f"average/{name}"].item(), found[f"unique/{name}"].item()) == (average[name], unique[name])
    assert torch.equal(metric.curves()[1], memorization_curves(truth, (0.1, 0.4), closer="smaller", pairs=pairs)[1])


def test_normalized_distances_are_those_of_carlinis_rule():
    bank = pictures(40, seed=0)
    samples = torch.cat([noisy(bank[:5], seed=1), pictures(10, seed=2)])
    metric = MemorizationScores(bank, RATIOS, measure="normalized_l2", k=10, alpha=0.5)
    metric.update(samples)
    nearest = normalized_l2(nearest_neighbors(samples, bank, 10)[0], alpha=0.5)
    assert metric.compute()["average/close"].item() == (nearest < 1).double().mean() == 5 / 15
    assert metric.compute()["average/near"].item() == ((nearest >= 1) & (nearest < 1.9)).double().mean()
    doubled = MemorizationScores(
        torch.cat([bank] * 20), RATIOS, measure="normalized_l2", k=10, groups=torch.arange(40).repeat(20)
    )
    doubled.update(samples)
    assert doubled.compute() == metric.compute()
    with pytest.raises(ValueError, match="row 0 has 10 neighbours at distance 0"):
        MemorizationScores(bank[:1].repeat(10, 1, 1, 1), RATIOS, measure="normalized_l2", k=10).update(bank[:1])


def test_the_matrix_is_never_held(monkeypatch):
    largest, original = [], score_blocks

    def watched(*given, **options):
        for at, where, scores in original(*given, **options):
            largest.append(scores.numel())
            yield at, where, scores

    monkeypatch.setattr("lightning_mem.metrics.memorization_scores.score_blocks", watched)
    metric = MemorizationScores(vectors(500, seed=0), COSINES, chunk_bytes=48 * 1000)
    metric.update(vectors(300, seed=1))
    assert max(largest) <= 1000
    assert sum(largest) == 300 * 500
    assert sum(state.numel() for state in metric.metric_state.values()) < 20 * 3 * 500 + 1000
    assert similarities_file.score_blocks is original


def test_summed_and_maximised_states_of_three_ranks_equal_one_process():
    bank, samples = vectors(60, seed=0, d=4), vectors(200, seed=1, d=4)
    whole = MemorizationScores(bank, COSINES, thresholds=(0.5,), pairs="nearest")
    whole.update(samples, torch.arange(200))
    ranks = [MemorizationScores(bank, COSINES, thresholds=(0.5,), pairs="nearest") for _ in range(3)]
    for rank, rows in zip(ranks, torch.randperm(200).split([100, 99, 1]), strict=True):
        rank.update(samples[rows], rows)
    merged = MemorizationScores(bank, COSINES, thresholds=(0.5,), pairs="nearest")
    for name, reduction in merged._reductions.items():
        states = torch.stack([getattr(rank, name) for rank in ranks])
        setattr(merged, name, reduction(states))
    merged._update_count = 1
    assert merged.compute() == whole.compute()
    assert merged.intervals() == whole.intervals()
    assert all(torch.equal(a, b) for a, b in zip(merged.curves(), whole.curves(), strict=True))


def test_extractor_turns_images_into_features_on_both_sides():
    bank = pictures(20, seed=0)
    samples = torch.cat([noisy(bank[:3], seed=1), pictures(5, seed=2)])
    by_images = MemorizationScores(bank, {"high": (0.99, math.inf)}, extractor=PixelsExtractor())
    by_features = MemorizationScores(bank.flatten(1) / 255, {"high": (0.99, math.inf)})
    by_images.update(samples)
    by_features.update(samples.flatten(1) / 255)
    assert by_images.compute() == by_features.compute()
    assert by_images.compute()["average/high"] == by_images.compute()["unique/high"] == 3 / 8


def test_average_interval_is_wilsons_and_unique_one_is_null_for_a_handful():
    bank = vectors(30, seed=0, d=64)
    metric = MemorizationScores(bank, {"high": (0.9, math.inf)})
    metric.update(torch.cat([bank[:5], vectors(35, seed=1, d=64)]))
    assert metric.intervals() == {"average/high": wilson_interval(5, 40), "unique/high": None}


@pytest.mark.parametrize("pairs", ["any", "nearest"])
def test_unique_interval_covers_the_expected_score_at_its_n(pairs):
    # each of n samples copies one of 300 images at random with probability 0.4: expectation by the definition
    n, members, share = 400, 300, 0.4
    truth = members * (1 - (1 - share / members) ** n) / n
    bank = torch.eye(members)
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        copies = torch.rand(n, generator=draw) < share
        chosen = torch.randint(members, (n,), generator=draw)
        samples = torch.ones(n, members)  # cosine with every image: 0.058
        samples[copies] = bank[chosen[copies]]
        metric = MemorizationScores(bank, {"high": (0.6, math.inf)}, pairs=pairs)
        metric.update(samples)
        low, high = metric.intervals()["unique/high"]
        covered += low <= truth <= high
    assert covered >= 180


def test_pickle_clone_reset_and_checkpoint_hold_no_bank():
    bank = vectors(30, seed=0)
    metric = MemorizationScores(bank, COSINES)
    metric.update(bank[:5])
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert other.compute() == metric.compute()
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    metric.reset()
    metric.update(bank[:6])
    assert metric.compute()["average/high"] == 1.0
    assert int(metric.block_sizes.sum()) == 6


def test_duplicates_of_the_bank_count_once_with_their_groups():
    bank = pictures(10, seed=0)
    doubled = torch.cat([bank, bank])
    options = {"bands": {"copy": (0.0, 0.01)}, "measure": "rms_l2"}
    plain, grouped = (
        MemorizationScores(doubled, groups=groups, **options) for groups in (None, duplicate_groups(doubled))
    )
    for metric in (plain, grouped):
        metric.update(bank)
    assert plain.compute()["unique/copy"] == 2.0
    assert grouped.compute()["unique/copy"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: MemorizationScores(b, {"x": (1, 0)}), "got (1, 0)"),
        (lambda b: MemorizationScores(b, COSINES, measure="l2"), "cosine, rms_l2, normalized_l2, got 'l2'"),
        (lambda b: MemorizationScores(b, COSINES, pairs="all"), "got 'all'"),
        (lambda b: MemorizationScores(b, COSINES, groups=torch.arange(3)), "int64 [5], one per training image"),
        (lambda b: MemorizationScores(b, COSINES, blocks=1), "blocks must be at least 2, got 1"),
        (lambda b: MemorizationScores(b, COSINES, k=1), "got 1 and 0.5"),
        (lambda b: MemorizationScores(b, COSINES, thresholds=[math.nan]), "got [nan]"),
        (lambda b: MemorizationScores(b[:0], COSINES), "at least one image, got shape (0, 8)"),
        (lambda b: MemorizationScores(b, COSINES, chunk_bytes=0).update(b), "chunk_bytes must be positive, got 0"),
        (lambda b: MemorizationScores(b, COSINES).update(b[:, :3]), "rows of one size, got (5, 3) and (5, 8)"),
        (lambda b: MemorizationScores(b, COSINES).update(b, torch.arange(2)), "int64 [5], one per sample, got (2,)"),
        (lambda b: MemorizationScores(b, COSINES).update(b * math.nan), "samples row 0 holds a value that is not"),
        (lambda b: MemorizationScores(b, COSINES).update(b * 0), "samples row 0 has length 0"),
        (lambda b: MemorizationScores(b, COSINES).intervals(), "0 samples"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(vectors(5, seed=0))


def test_integers_other_than_uint8_are_refused():
    with pytest.raises(TypeError, match="samples must be uint8 or floating point, got torch.int64"):
        MemorizationScores(vectors(5, seed=0), COSINES).update(torch.ones(2, 8, dtype=torch.int64))
