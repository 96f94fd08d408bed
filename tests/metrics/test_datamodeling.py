import numpy as np
import pytest
import scipy.stats
import torch

from lightning_mem.metrics import (
    compare_datamodeling_scores,
    linear_datamodeling_score,
    rank_correlation,
    subset_predictions,
)

RUNS = 200
ENOUGH = 0.9 * RUNS  # see test_intervals.py

SCORES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]], dtype=torch.float64)
MASKS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
OUTPUTS = torch.tensor([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]], dtype=torch.float64)
ANCHOR = [1.0, 0.8660254037844387]  # methods/pitfalls.md, section 3: dattri's fixture, ties in the second query


def problem(queries=5, images=12, subsets=9, seed=0):
    """Scores, subsets and the outputs of models that add the scores up, without noise."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, images, generator=draw, dtype=torch.float64)
    masks = torch.rand(subsets, images, generator=draw) < 0.5
    outputs = (scores[None] * masks[:, None]).sum(-1)
    return scores, masks, outputs


def test_datamodeling_score_is_that_of_the_published_fixture():
    found = linear_datamodeling_score(SCORES, MASKS, OUTPUTS)
    assert found.tolist() == pytest.approx(ANCHOR, abs=1e-12)
    assert linear_datamodeling_score(-SCORES, MASKS, OUTPUTS).tolist() == pytest.approx([-r for r in ANCHOR], abs=1e-12)


def test_datamodeling_score_equals_scipy_with_ties():
    draw = np.random.default_rng(0)
    scores = draw.integers(-2, 3, (6, 10)).astype(float)  # whole numbers: many ties
    masks = draw.random((15, 10)) < 0.5
    outputs = draw.integers(0, 4, (15, 6)).astype(float)
    truth = [scipy.stats.spearmanr(masks @ scores[q], outputs[:, q]).statistic for q in range(6)]
    assert linear_datamodeling_score(scores, masks, outputs).tolist() == pytest.approx(truth, abs=1e-12)


def test_true_subset_effects_score_one_and_their_negative_minus_one():
    scores, masks, outputs = problem()
    for sign in (1, -1):
        found = linear_datamodeling_score(sign * scores, masks, outputs.exp())  # ranks do not feel the exponential
        assert found.tolist() == pytest.approx([sign] * 5, abs=1e-12)


def test_score_of_a_constant_query_is_nan_and_no_comparison_hides_it():
    scores, masks, outputs = problem()
    outputs[:, 2] = 0.5
    found = linear_datamodeling_score(scores, masks, outputs)
    assert found.isnan().tolist() == [False, False, True, False, False]
    with pytest.raises(ValueError, match="1 of 5 queries have no score by plain"):
        compare_datamodeling_scores({"plain": subset_predictions(scores, masks)}, outputs)


@pytest.mark.parametrize(
    ("scores", "masks", "outputs", "words"),
    [
        (SCORES.T, MASKS, OUTPUTS, r"scores must be \[queries, images\].*\(4, 2\) and \(3, 4\)"),
        (SCORES, MASKS.T, OUTPUTS, r"of the same images, got \(2, 4\) and \(4, 3\)"),
        (SCORES, MASKS, OUTPUTS.T, r"\[subsets, queries\].*\(3, 2\) and \(2, 3\)"),
        (SCORES, MASKS.long(), OUTPUTS, "masks must be bool"),
        (SCORES, MASKS[:1], OUTPUTS[:1], "at least 2 subsets"),
        (SCORES * torch.nan, MASKS, OUTPUTS, "8 of 8 scores are not finite"),
        (SCORES, MASKS, OUTPUTS / 0, "6 of 6 outputs are not finite"),
    ],
)
def test_axes_in_the_wrong_order_and_bad_numbers_are_refused(scores, masks, outputs, words):
    with pytest.raises(ValueError, match=words):
        linear_datamodeling_score(scores, masks, outputs)


def test_resamples_draw_subsets_and_queries_and_pair_the_methods():
    _, _, outputs = problem(queries=8, subsets=20)
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predictions = {"true": outputs, "noisy": outputs + 2 * noise, "same": outputs.exp()}
    found = compare_datamodeling_scores(predictions, outputs, resamples=100)
    assert found.scores["true"] == pytest.approx(1) == found.interval("true")[0]
    assert found.difference("true", "same") == (0, 0, 0)  # on the same resamples
    low, high = found.interval("noisy")
    assert low < found.scores["noisy"] < high < 1
    assert found.difference("noisy", "true") == pytest.approx((found.scores["noisy"] - 1, low - 1, high - 1))
    narrow = compare_datamodeling_scores(predictions, outputs, resamples=100, level=0.5)
    assert low < narrow.interval("noisy")[0] < narrow.interval("noisy")[1] < high
    again = compare_datamodeling_scores(predictions, {**dict.fromkeys(predictions, outputs)}, resamples=100)
    assert again.interval("noisy") == (low, high)
    with pytest.raises(ValueError, match="one shape"):
        compare_datamodeling_scores(predictions, {**dict.fromkeys(predictions, outputs), "true": outputs[:, :3]})


def test_interval_covers_the_score_of_a_normal_world_whose_subsets_are_shared_by_all_queries():
    """Predictions and outputs of a query have a correlation of its own, and half of their noise is the subset's."""
    draw, subsets, queries = torch.Generator().manual_seed(0), 12, 12

    def noise():
        shared = torch.randn(subsets, 1, generator=draw, dtype=torch.float64)
        return (shared + torch.randn(subsets, queries, generator=draw, dtype=torch.float64)) / 2**0.5

    hits = {"score": 0, "difference": 0}
    spread = torch.linspace(-0.15, 0.15, 101, dtype=torch.float64)
    truth, other = (float((6 / torch.pi * torch.asin((mean + spread) / 2)).mean()) for mean in (0.6, 0.3))
    for run in range(RUNS):
        place = torch.randint(len(spread), (queries,), generator=draw)
        outputs = noise()
        both = {}
        for name, mean in (("good", 0.6), ("poor", 0.3)):
            rho = mean + spread[place]
            both[name] = rho * outputs + (1 - rho**2).sqrt() * noise()
        found = compare_datamodeling_scores(both, outputs, resamples=40, seed=run)
        low, high = found.interval("good")
        hits["score"] += low <= truth <= high
        _, low, high = found.difference("good", "poor")
        hits["difference"] += low <= truth - other <= high
    assert min(hits.values()) >= ENOUGH
    only_queries = float(rank_correlation(both["good"], outputs).std()) / queries**0.5
    low, high = found.interval("good")
    assert high - low > 2 * 1.96 * only_queries  # most of the doubt is in the subsets
