import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mem.metrics import (
    SSCD_BANDS,
    average_memorization_score,
    memorization_curves,
    unique_memorization_score,
)

BANDS = {"low": (0.4, 0.5), "mid": (0.5, 0.6), "high": (0.6, math.inf)}


def by_loops(scores, low, high, closer, pairs):
    """The definition, one pair after another."""
    hits, met = 0, set()
    for row in scores:
        best = max(row) if closer == "larger" else min(row)
        hits += low <= best < high
        met |= {j for j, s in enumerate(row) if low <= s < high and (pairs == "any" or j == list(row).index(best))}
    return hits / len(scores), len(met) / len(scores)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["larger", "smaller"]), st.sampled_from(["any", "nearest"]))
def test_scores_are_their_definition(seed, closer, pairs):
    scores = np.random.default_rng(seed).integers(0, 11, (7, 5)) / 10  # coarse: edges and ties occur
    average = average_memorization_score(scores, BANDS, closer=closer)
    unique = unique_memorization_score(scores, BANDS, closer=closer, pairs=pairs)
    for name, (low, high) in BANDS.items():
        assert (average[name], unique[name]) == by_loops(scores, low, high, closer, pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("closer", ["larger", "smaller"])
def test_score_on_an_edge_is_counted_once_in_the_band_it_opens(dtype, closer):
    edges = torch.tensor([[0.4], [0.5], [0.6], [0.7]], dtype=dtype)  # none of them is a binary fraction but 0.5
    bands = {"low": (0.4, 0.5), "mid": (0.5, 0.6), "high": (0.6, 0.7)}
    for scores in (
        average_memorization_score(edges, bands, closer=closer),
        unique_memorization_score(edges.T.expand(4, 4), bands, closer=closer),
    ):
        assert scores == {"low": 0.25, "mid": 0.25, "high": 0.25}


def test_runners_up_make_the_unique_score_exceed_the_average_one_unless_only_the_nearest_count():
    # one near copy whose original has three near relatives among the training images
    scores = torch.tensor([[0.9, 0.45, 0.44, 0.43], [0.1, 0.2, 0.1, 0.0]])
    assert average_memorization_score(scores, BANDS) == {"low": 0.0, "mid": 0.0, "high": 0.5}
    assert unique_memorization_score(scores, BANDS) == {"low": 1.5, "mid": 0.0, "high": 0.5}
    assert unique_memorization_score(scores, BANDS, pairs="nearest") == {"low": 0.0, "mid": 0.0, "high": 0.5}


def test_siblings_of_one_copy_reproduce_ums_above_ams_in_the_same_band():
    scores = torch.full((1000, 50), 0.3)
    scores[:10, :13] = 0.7  # ten samples, each near the same thirteen images
    assert average_memorization_score(scores, SSCD_BANDS)["high"] == 0.01
    assert unique_memorization_score(scores, SSCD_BANDS)["high"] == 0.013
    assert unique_memorization_score(scores, SSCD_BANDS, pairs="nearest")["high"] == 0.001


def test_many_samples_of_one_image_are_one_unique_image_and_duplicates_one_group():
    scores = torch.zeros(8, 6)
    scores[:, 2] = 0.9
    scores[:, 5] = 0.95  # image 5 is a duplicate of image 2
    assert average_memorization_score(scores, BANDS)["high"] == 1.0
    assert unique_memorization_score(scores, BANDS)["high"] == 2 / 8
    groups = torch.tensor([0, 1, 2, 3, 4, 2])
    assert unique_memorization_score(scores, BANDS, groups=groups)["high"] == 1 / 8


def test_curves_are_cumulative_and_differ_by_bands_at_their_edges():
    scores = torch.rand(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square() * 0.7
    for closer in ("larger", "smaller"):
        average, _ = memorization_curves(scores, [0.2, 0.3], closer=closer)
        band = average_memorization_score(scores, {"b": (0.2, 0.3)}, closer=closer)["b"]
        assert abs(average[0] - average[1]).item() == pytest.approx(band, abs=1e-12)
    average, unique = memorization_curves(scores, [0.0, 0.65, 2.0])
    best = scores.max(1).values
    assert average.tolist() == [1.0, (best >= 0.65).double().mean().item(), 0.0]
    assert unique.tolist() == [20 / 60, (scores.max(0).values >= 0.65).sum().item() / 60, 0.0]
    assert (
        memorization_curves(scores, [0.1], closer="smaller")[0].item() == (scores.min(1).values < 0.1).double().mean()
    )


def test_infinite_end_keeps_exact_copies_in_and_one_leaves_them_out():
    exact = torch.ones(1, 1)
    assert average_memorization_score(exact, {"high": (0.6, math.inf)})["high"] == 1.0
    assert average_memorization_score(exact, {"high": (0.6, 1.0)})["high"] == 0.0
    assert average_memorization_score(exact * 0, {"close": (0.0, 0.1)}, closer="smaller")["close"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: average_memorization_score(s, {}), "at least one band"),
        (lambda s: average_memorization_score(s, {"x": (0.5, 0.5)}), "band 'x' must be (low, high) with low < high"),
        (lambda s: average_memorization_score(s, {"x": (math.nan, 0.5)}), "got (nan, 0.5)"),
        (lambda s: average_memorization_score(s, BANDS, closer="nearer"), "larger, smaller, got 'nearer'"),
        (lambda s: unique_memorization_score(s, BANDS, pairs="all"), "any, nearest, got 'all'"),
        (lambda s: unique_memorization_score(s, BANDS, groups=[0, 1]), "int64 [3], one per training image, got"),
        (lambda s: average_memorization_score(s[0], BANDS), "got torch.float32 (3,)"),
        (lambda s: average_memorization_score(s[:0], BANDS), "got torch.float32 (0, 3)"),
        (lambda s: average_memorization_score(s.int(), BANDS), "got torch.int32 (2, 3)"),
        (lambda s: average_memorization_score(s / s, BANDS), "row 1 holds a score that is not finite"),
        (lambda s: memorization_curves(s, []), "at least one, got []"),
        (lambda s: memorization_curves(s, [math.nan]), "got [nan]"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
