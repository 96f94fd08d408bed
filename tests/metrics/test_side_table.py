"""The arithmetic of SIDE's table 1 (arXiv:2410.02467 v7), from similarities made to hold its counts."""

from fractions import Fraction

import pytest
import torch

from lightning_mem.metrics import (
    SSCD_BANDS,
    MemorizationScores,
    average_memorization_score,
    unique_memorization_score,
)

# per cent as printed, AMS and UMS at low, mid, high; number of samples that the entries are whole numbers of
HQ_UNCOND = ((11.656, 0.596, 0.044), (2.120, 0.328, 0.040), 50_000)
HQ_COND = ((15.010, 1.310, 0.090), (2.624, 0.554, 0.082), 50_000)
ALL_UNCOND = ((5.000, 0.100, 0.000), (4.240, 0.100, 0.000), 50_000)
ALL_COND = ((8.712, 0.234, 0.010), (6.802, 0.234, 0.010), 50_000)
SMALL_COND = ((4.682, 0.098, 0.000), (4.706, 0.098, 0.000), 4_101)  # 192, 193 and 4; the 5,120 stated do not fit
HQ_SIDE_HIGH = ((0.0, 0.0, 0.141), (0.0, 0.0, 0.148), 100_000)  # 70.5 and 74 of 50,000: an average of two runs
INSIDE = {"low": 0.45, "mid": 0.55, "high": 0.65}


def whole(shares, n):
    """Nearest whole numbers of n to printed per cents."""
    return [round(Fraction(str(share)) * n / 100) for share in shares]


def hits_of(row):
    """Scores of the samples that hit, [hits, images]: every band has samples and images of its own, met in turn.

    With more images than samples a sample is as close to two of them; the rest of a bank's scores is 0.
    """
    hits, met = (whole(shares, row[2]) for shares in row[:2])
    scores = torch.zeros(sum(hits), sum(met))
    sample = image = 0
    for name, samples, images in zip(SSCD_BANDS, hits, met, strict=True):
        for turn in range(max(samples, images)):
            scores[sample + turn % samples, image + turn % images] = INSIDE[name]
        sample, image = sample + samples, image + images
    return scores


def features_of(scores):
    """Samples whose cosines with a basis are these scores; a last coordinate fills up their length."""
    return torch.cat([scores, (1 - scores.square().sum(1, keepdim=True)).sqrt()], 1)


def printed(scores, prefix=""):
    return tuple(round(100 * float(scores[prefix + name]), 3) for name in SSCD_BANDS)


def average_of(shares, n):
    """AMS of n samples of which the nearest whole number hits each band, as printed."""
    best = torch.zeros(n, 1)  # AMS sees nothing but the closest image
    names = [name for name, hits in zip(SSCD_BANDS, whole(shares, n), strict=True) for _ in range(hits)]
    best[: len(names), 0] = torch.tensor([INSIDE[name] for name in names])
    return printed(average_memorization_score(best, SSCD_BANDS))


@pytest.mark.parametrize("row", [HQ_UNCOND, HQ_COND, ALL_UNCOND, ALL_COND])
def test_baselines_on_faces_are_whole_numbers_of_50_000(row):
    assert all(Fraction(str(share)) * row[2] % 100 == 0 for shares in row[:2] for share in shares)
    assert average_of(row[0], row[2]) == row[0]


@pytest.mark.parametrize(("row", "stated"), [(HQ_UNCOND, 51_200), (HQ_COND, 51_200), (SMALL_COND, 5_120)])
def test_some_rows_do_not_fit_the_number_of_samples_that_the_paper_states(row, stated):
    assert average_of(row[0], stated) != row[0]
    assert average_of(row[0], row[2]) == row[0]


def test_both_scores_of_a_row_come_out_of_one_matrix():
    # all counts of this row divide by ten: a tenth of each, of 5,000, are the same shares
    row = (*ALL_UNCOND[:2], 5_000)
    hits = hits_of(row)
    assert hits.shape == (255, 217)
    scores = torch.cat([hits, torch.zeros(5_000 - 255, 217)])
    assert printed(average_memorization_score(scores, SSCD_BANDS)) == row[0]
    assert printed(unique_memorization_score(scores, SSCD_BANDS)) == row[1]
    assert printed(unique_memorization_score(scores, SSCD_BANDS, pairs="nearest")) == row[1]


@pytest.mark.parametrize("row", [SMALL_COND, HQ_SIDE_HIGH], ids=["CelebA Cond", "CelebA-HQ-FI SIDE"])
def test_the_metric_in_chunks_prints_ums_above_ams_where_all_pairs_count(row):
    hits, n = hits_of(row), row[2]
    images = hits.shape[1]
    misses = features_of(torch.zeros(2_000, images))
    options = {"thresholds": (0.4, 0.5, 0.6)}
    metrics = {
        pairs: MemorizationScores(torch.eye(images, images + 1), pairs=pairs, **options) for pairs in ("any", "nearest")
    }
    for metric in metrics.values():
        for part in features_of(hits).split(100):
            metric.update(part)
        for start in range(len(hits), n, 2_000):
            metric.update(misses[: n - start])
    found = {pairs: metric.compute() for pairs, metric in metrics.items()}
    assert (printed(found["any"], "average/"), printed(found["any"], "unique/")) == row[:2]
    assert any(more > less for less, more in zip(*row[:2], strict=True))
    assert printed(found["nearest"], "unique/") == printed(found["any"], "average/")  # one image to a sample here
    # from a threshold on: a band's counts and those of all closer ones
    for curve, shares in zip(metrics["any"].curves(), row[:2], strict=True):
        low, mid, high = whole(shares, n)
        assert (curve * n).tolist() == pytest.approx([low + mid + high, mid + high, high], abs=1e-9)


def test_bands_closed_at_both_ends_would_count_an_edge_twice_and_cumulative_counts_an_image_once():
    # a sample on each printed edge; one image is met in all three bands
    scores = torch.tensor([[0.4], [0.5], [0.6]])
    metric = MemorizationScores(torch.tensor([[1.0, 0.0]]), thresholds=(0.4, 0.5, 0.6))
    metric.update(features_of(torch.tensor([[0.41], [0.51], [0.61]])))
    for bands in (
        average_memorization_score(scores, SSCD_BANDS),
        average_memorization_score(scores + 0.01, SSCD_BANDS),
    ):
        assert list(bands.values()) == [1 / 3] * 3
    closed = [((scores >= low) & (scores <= high)).sum() for low, high in SSCD_BANDS.values()]
    assert sum(closed) == 5
    assert list(unique_memorization_score(scores, SSCD_BANDS).values()) == [1 / 3] * 3
    average, unique = metric.curves()
    assert torch.allclose(average, torch.tensor([3, 2, 1]).double() / 3)
    assert torch.allclose(unique, torch.ones(3).double() / 3)
