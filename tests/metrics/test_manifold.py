import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from lightning_mem.metrics import (
    PixelsExtractor,
    PrecisionRecallDensityCoverage,
    manifold_overlap,
    neighborhood_radii,
    prdc,
    precision_recall,
    wilson_interval,
)

NAMES = ("precision", "recall", "density", "coverage")


def features(n, d, seed, shift=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def pictures(n, seed, low=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, 1, 4, 4), generator=draw, dtype=torch.uint8)


def by_definition(samples, reference, k):
    """The four sums, on whole float64 matrices of direct differences."""
    x, y = np.asarray(samples, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    within_y = np.sqrt(((y[:, None] - y) ** 2).sum(2))
    within_x = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    between = np.sqrt(((x[:, None] - y) ** 2).sum(2))
    inside = between <= np.sort(within_y, 1)[:, k]
    return {
        "precision": inside.any(1).mean(),
        "recall": (between <= np.sort(within_x, 1)[:, k][:, None]).any(0).mean(),
        "density": inside.sum() / (k * len(x)),
        "coverage": inside.any(0).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_bytes", [None, 3000, 30000])
def test_all_four_are_their_definition_in_float64(k, chunk_bytes):
    samples, reference = features(60, 6, seed=0, shift=0.4, scale=0.9), features(75, 6, seed=1)
    found = prdc(samples, reference, k, chunk_bytes=chunk_bytes)
    truth = by_definition(samples, reference, k)
    assert found == pytest.approx(truth, abs=1e-12)
    assert all(0.1 < truth[name] < 0.99 for name in ("precision", "recall", "coverage"))
    assert len({round(value, 6) for value in truth.values()}) >= 3
    assert prdc(samples.numpy(), reference.double().numpy(), k) == found


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall_are_torch_fidelitys(k, save_cpu_ram):
    samples, reference = features(200, 16, seed=0, shift=0.2), features(300, 16, seed=1)
    options = {"prc_batch_size": 128, "save_cpu_ram": save_cpu_ram, "verbose": False}
    theirs = prc_features_to_metric(samples, reference, prc_neighborhood=k, **options)
    ours = precision_recall(samples, reference, k)
    assert ours == (pytest.approx(theirs["precision"], abs=1e-6), pytest.approx(theirs["recall"], abs=1e-6))
    assert 0.1 < min(ours) < max(ours) < 0.99
    assert ours[0] != ours[1]


def test_exact_copies_lie_on_edges_and_edges_belong_to_the_ball():
    # each image of a grid is at distance 1 from its neighbours: with k = 1 every ball reaches exactly to the next image
    grid = torch.arange(10.0)[:, None]
    found = prdc(grid, grid, 1)
    assert found["density"] == pytest.approx((2 * 2 + 8 * 3) / 10)  # itself and the images beside it
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0
    far = manifold_overlap(features(40, 2048, seed=0, shift=1000.0), features(40, 2048, seed=0, shift=1000.0), 3)
    assert (far.precision, far.coverage) == (1.0, 1.0)
    # a copy lies in its own ball and in each ball whose edge its original is: 1 + k balls on average
    assert far.density == pytest.approx(4 / 3)


def test_duplicates_shrink_balls_to_a_point_that_holds_exact_copies_only():
    reference = torch.cat([torch.zeros(4, 2), torch.eye(2) * 5, torch.eye(2) * 6])
    copies, near = torch.zeros(4, 2), torch.full((4, 2), 1e-3)
    assert neighborhood_radii(reference, 3)[:4].tolist() == [0.0] * 4
    assert manifold_overlap(copies, reference, 3).covered.sum(0)[:4].tolist() == [4] * 4
    assert manifold_overlap(near, reference, 3).covered.sum(0)[:4].tolist() == [0] * 4


def test_limits():
    reference = features(50, 4, seed=0)
    assert prdc(reference + 1000, reference) == dict.fromkeys(NAMES, 0.0)
    one_mode = reference[:1] + 1e-4 * features(50, 4, seed=1)
    found = prdc(one_mode, reference)
    assert found["precision"] == 1.0
    assert found["coverage"] < 0.3
    assert found["recall"] <= 1 / 50


def test_rows_of_either_side_in_another_order_change_nothing():
    samples, reference = features(60, 6, seed=0), features(75, 6, seed=1)
    shuffled = prdc(samples[torch.randperm(60)], reference[torch.randperm(75)])
    assert shuffled == pytest.approx(prdc(samples, reference), abs=1e-12)


def test_intervals_cover_the_expectation_over_the_samples():
    n, k, reference = 60, 3, features(80, 3, seed=0)
    radii = neighborhood_radii(reference, k)
    draw = torch.Generator().manual_seed(1)

    def overlaps(count):
        return [
            manifold_overlap(torch.randn(n, 3, generator=draw) + 0.8, reference, k, radii=radii) for _ in range(count)
        ]

    truth = {name: np.mean([getattr(run, name) for run in overlaps(200)]) for name in NAMES}
    runs = [run.intervals() for run in overlaps(200)]
    for name in ("precision", "density", "coverage"):
        covered = sum(run[name][0] <= truth[name] <= run[name][1] for run in runs)
        assert covered >= 180, name
        assert 0.1 < truth[name] < 0.95
    assert all(run["recall"] is None for run in runs)


def test_intervals_are_null_where_there_is_none():
    reference = features(50, 4, seed=0)
    few = manifold_overlap(reference[:10], reference).intervals()
    assert few == {"precision": wilson_interval(10, 10), "recall": None, "density": None, "coverage": None}
    assert manifold_overlap(reference, reference).intervals()["coverage"] is None  # all covered: no spread to judge by


def test_metric_in_unequal_batches_equals_the_function_and_gathers():
    extractor = PixelsExtractor()
    reference, images = pictures(70, seed=0), pictures(60, seed=1, low=20)
    flat = [rows.flatten(1) / 255 for rows in (images, reference)]
    truth = prdc(*flat, 3)
    metric = PrecisionRecallDensityCoverage(flat[1], extractor, 3)
    for part in images.split([1, 40, 19]):
        metric.update(part)
    assert {name: value.item() for name, value in metric.compute().items()} == truth
    merged = pickle.loads(pickle.dumps(metric))
    merged.features = torch.cat([*metric.features[1:], metric.features[0]])  # as a gathered state is
    merged._computed = None
    assert {name: value.item() for name, value in merged.compute().items()} == pytest.approx(truth, abs=1e-12)
    assert metric.overlap().intervals()["precision"] is not None
    assert metric.state_dict() == {}
    metric.reset()
    metric.update(reference)
    assert metric.compute()["precision"] == 1.0


def test_a_process_that_saw_no_image_gathers_with_the_others():
    extractor, reference, images = PixelsExtractor(), pictures(70, seed=0), pictures(60, seed=1, low=20)
    whole, empty = (PrecisionRecallDensityCoverage(reference.flatten(1) / 255, extractor, 3) for _ in range(2))
    whole.update(images)
    empty.sync(dist_sync_fn=lambda part, group=None: [part, whole.features[0]], distributed_available=lambda: True)
    assert empty.features.shape == whole.features[0].shape
    assert empty.overlap().values() == whole.overlap().values()
    empty.unsync()
    with pytest.raises(ValueError, match="at least 4 images for k = 3, got 0"):
        empty.overlap()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prdc(x[:5], x), "5 nearest others need at least 6 rows, got 5"),
        (lambda x: prdc(x, x[:3], 3), "3 nearest others need at least 4 rows, got 3"),
        (lambda x: prdc(x, x, 0), "k must be at least 1, got 0"),
        (lambda x: prdc(x, x[:, :2]), "features of one width, got (9, 4) and (9, 2)"),
        (lambda x: prdc(x, x * math.nan), "row 0 holds a value that is not finite"),
        (lambda x: manifold_overlap(x, x, radii=torch.ones(3)), "radii must be [9], one per reference image, got (3,)"),
        (lambda x: manifold_overlap(x, x, blocks=0), "blocks must be at least 1, got 0"),
        (lambda x: PrecisionRecallDensityCoverage(x[0], PixelsExtractor()), "got (4,)"),
        (lambda x: PrecisionRecallDensityCoverage(x[:3], PixelsExtractor()), "at least 6 rows, got 3"),
        (lambda x: PrecisionRecallDensityCoverage(x, PixelsExtractor(), block=0), "block must be at least 1"),
        (
            lambda x: PrecisionRecallDensityCoverage(x, PixelsExtractor()).update(pictures(2, 0)),
            "has 4 features, these",
        ),
        (
            lambda x: PrecisionRecallDensityCoverage(x, PixelsExtractor()).overlap(),
            "at least 6 images for k = 5, got 0",
        ),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(features(9, 4, seed=0))
