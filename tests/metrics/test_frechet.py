import pickle
import re
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.data import Dataset

from lightning_mem.metrics import (
    FeatureStatistics,
    FrechetDistance,
    InceptionExtractor,
    PixelsExtractor,
    cached_statistics,
    extract_features,
    frechet_distance,
    frechet_distance_from_features,
)


def pictures(n, size=4, channels=3, seed=0, low=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def gaussian_features(n, d, seed, scale=1.0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)) @ np.diag(np.linspace(0.1, scale, d)) + draw.normal(size=d)


def by_sqrtm(a, b):
    """The textbook formula, through scipy's matrix root."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)


def test_two_unit_gaussians_one_apart_in_2048_dimensions_are_2048_apart():
    eye = torch.eye(2048)
    assert frechet_distance(torch.zeros(2048), eye, torch.ones(2048), eye) == 2048


def test_no_scipy_is_on_the_way(monkeypatch):
    features = [torch.from_numpy(gaussian_features(n, 6, seed)) for n, seed in ((40, 0), (5, 1))]
    truth = frechet_distance_from_features(*features)
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    assert frechet_distance_from_features(*features) == truth


def test_diagonal_gaussians_by_hand():
    s1, s2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 0.25])
    truth = ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum() + 0.5**2 * 3
    assert frechet_distance(np.zeros(3), np.diag(s1), np.full(3, 0.5), np.diag(s2)) == pytest.approx(truth, rel=1e-12)


def test_rotated_gaussians_by_hand():
    # commuting covariances: the distance is that of the eigenvalues
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    w1, w2 = np.arange(1.0, 7), np.arange(6.0, 0, -1)
    found = frechet_distance(np.zeros(6), q @ np.diag(w1) @ q.T, np.zeros(6), q @ np.diag(w2) @ q.T)
    assert found == pytest.approx(((np.sqrt(w1) - np.sqrt(w2)) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("d", [2, 17, 64])
def test_full_form_equals_scipys_matrix_root(d):
    a, b = gaussian_features(300, d, seed=1), gaussian_features(400, d, seed=2, scale=2.0)
    one, two = FeatureStatistics.from_features(a), FeatureStatistics.from_features(b)
    assert frechet_distance(one.mu, one.sigma, two.mu, two.sigma) == pytest.approx(by_sqrtm(a, b), rel=1e-6)
    assert frechet_distance_from_features(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-6)


def test_full_form_equals_scipys_matrix_root_on_the_falling_spectrum_of_images():
    # eigenvalues over eight orders of magnitude, as deep features have
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.normal(size=(128, 128)))[0]
    a, b = (draw.normal(size=(3000, 128)) * np.logspace(0, -4, 128) @ turn * scale for scale in (1.0, 1.2))
    one, two = FeatureStatistics.from_features(a), FeatureStatistics.from_features(b)
    assert frechet_distance(one.mu, one.sigma, two.mu, two.sigma) == pytest.approx(by_sqrtm(a, b), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 30, 63])
def test_covariance_without_full_rank_takes_the_other_way_to_the_same_distance(rank):
    # adding a little to the diagonal makes the Cholesky factor exist: a limit, approached from above
    a, b = gaussian_features(rank + 1, 64, seed=1), gaussian_features(300, 64, seed=2)
    one, two = FeatureStatistics.from_features(a), FeatureStatistics.from_features(b)
    found = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    gaps = [
        abs(frechet_distance(one.mu, one.sigma + size * torch.eye(64), two.mu, two.sigma) - found)
        for size in (1e-3, 1e-5, 1e-7, 1e-9)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2e-3 * found
    assert frechet_distance(two.mu, two.sigma, one.mu, one.sigma) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (10, 100), (100, 10), (39, 41), (40, 40), (2, 2)])
def test_small_side_equals_the_full_form(n, m):
    a, b = gaussian_features(n, 40, seed=1), gaussian_features(m, 40, seed=2)
    one, two = FeatureStatistics.from_features(a), FeatureStatistics.from_features(b)
    full = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    assert frechet_distance_from_features(a, b) == pytest.approx(full, rel=1e-6)
    assert frechet_distance_from_features(b, a) == pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize("n", [5, 200])
def test_same_data_is_zero_apart_and_never_less(n):
    features = gaussian_features(n, 50, seed=0)
    assert 0 <= frechet_distance_from_features(features, features) < 1e-10
    one = FeatureStatistics.from_features(features)
    assert 0 <= frechet_distance(one.mu, one.sigma, one.mu, one.sigma) < 1e-5


def test_rank_deficient_covariances_give_a_real_number():
    a, b = gaussian_features(3, 30, seed=1), gaussian_features(4, 30, seed=2)
    one, two = FeatureStatistics.from_features(a), FeatureStatistics.from_features(b)
    found = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    assert isinstance(found, float)
    cross = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / np.sqrt(2 * 3)
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.cov(a.T).trace() + np.cov(b.T).trace() - 2 * cross
    assert found == pytest.approx(truth, rel=1e-6)


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def by_torch_fidelity(a, b, weights, layer):
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Images(a),
        input2=Images(b),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=len(a),
        feature_extractor_weights_path=str(weights),
        feature_layer_fid=layer,
    )
    return found["frechet_inception_distance"]


@pytest.mark.parametrize("size", [32, 64, 299])
def test_64_feature_distance_is_torch_fidelitys(inception_file, size):
    a, b = pictures(6, size, seed=0), pictures(6, size, seed=1, low=40, high=140)
    extractor = InceptionExtractor(inception_file, "64")
    metric = FrechetDistance(extract_features(a, extractor, block=6), extractor, block=6)
    metric.update(b)
    truth = by_torch_fidelity(a, b, inception_file, "64")
    assert truth > 0
    assert metric.compute().item() == pytest.approx(truth, rel=1e-4)


def test_2048_features_are_torch_fidelitys(inception_file):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    images = pictures(2, 64)
    options = {"feature_extractor_weights_path": str(inception_file), "cuda": False, "verbose": False}
    theirs = create_feature_extractor("inception-v3-compat", ["2048"], **options)
    found = extract_featuresdict_from_input_id(
        1, theirs, input1=Images(images), batch_size=2, save_cpu_ram=True, **options
    )
    ours = extract_features(images, InceptionExtractor(inception_file), block=2)
    torch.testing.assert_close(ours, found["2048"], rtol=1e-4, atol=1e-4 * found["2048"].abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 299])
def test_2048_feature_distance_is_torch_fidelitys(inception_file, size):
    a, b = pictures(20, size, seed=0), pictures(20, size, seed=1, low=40, high=140)
    extractor = InceptionExtractor(inception_file)
    one, two = (extract_features(images, extractor, block=20) for images in (a, b))
    truth = by_torch_fidelity(a, b, inception_file, "2048")
    assert frechet_distance_from_features(one, two) == pytest.approx(truth, rel=1e-4)


def test_metric_in_unequal_batches_and_summed_states_equals_the_function():
    extractor = PixelsExtractor()
    reference, images = pictures(200, seed=0), pictures(150, seed=1, high=128)
    truth = frechet_distance_from_features(reference.flatten(1) / 255, images.flatten(1) / 255)
    whole = FrechetDistance(extract_features(reference, extractor), extractor)
    whole.update(images)
    assert whole.compute().item() == pytest.approx(truth, rel=1e-9)
    ranks = [FrechetDistance(cached_statistics(reference, extractor), extractor, block=7) for _ in range(3)]
    for rank, parts in zip(ranks, [[images[:100], images[100:101]], [images[101:133]], [images[133:]]], strict=True):
        for part in parts:
            rank.update(part)
    merged = FrechetDistance(cached_statistics(reference, extractor), extractor)
    for name in ("feature_sum", "outer_sum", "count"):  # what a reduction by sum does under DDP
        setattr(merged, name, sum(getattr(rank, name) for rank in ranks))
    merged._update_count = 1
    assert merged.compute().item() == pytest.approx(truth, rel=1e-9)


def test_metric_of_the_reference_itself_is_zero_even_far_from_the_origin():
    images = pictures(300, high=4).add(250)  # mean 252, spread 1: raw second moments would lose ten bits
    extractor = PixelsExtractor()
    metric = FrechetDistance(extract_features(images, extractor), extractor)
    metric.update(images)
    assert metric.compute() < 1e-10


def test_pickle_clone_reset_and_checkpoint():
    extractor = PixelsExtractor()
    statistics = cached_statistics(pictures(80), extractor)
    metric = FrechetDistance((statistics.mu.numpy(), statistics.sigma.numpy(), statistics.n), extractor)
    metric.update(pictures(60, seed=1))
    truth = metric.compute()
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert other.compute() == truth
        other.update(pictures(60, seed=2, high=30))
        assert other.compute() > truth
    assert metric.compute() == truth
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    metric.reset()
    metric.update(pictures(60, seed=1))
    assert metric.compute() == truth


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance_from_features(torch.rand(1, 4), torch.rand(5, 4)), "a must be .* got (1, 4)"),
        (lambda: frechet_distance_from_features(torch.rand(5, 4), torch.rand(4)), "b must be .* got (4,)"),
        (lambda: frechet_distance_from_features(torch.rand(5, 4), torch.rand(5, 3)), "got 4 and 3"),
        (lambda: frechet_distance_from_features(torch.rand(5, 4), torch.rand(5, 4) / 0), "b row 0"),
        (lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "got 3 and 2"),
        (lambda: frechet_distance(np.zeros(3), np.eye(2), np.zeros(2), np.eye(2)), "mu1 .* (3,) and (2, 2)"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2) * np.nan), "sigma2 holds 4 values"),
        (lambda: frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "eigenvalue -1"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, 9], [0, 1]])), "sigma2 is not"),
        (lambda: FeatureStatistics(torch.zeros(2), torch.eye(2), 1), "at least 2 for a covariance, got 1"),
        (lambda: FrechetDistance(torch.rand(5, 4), PixelsExtractor(), block=0), "at least 1, got 0"),
        (lambda: FrechetDistance(torch.rand(5, 4), PixelsExtractor()).update(pictures(3)), "has 4 .* give 48"),
    ],
)
def test_wrong_values_are_refused(call, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call()


def test_too_few_images_and_another_width_are_refused(inception_file):
    metric = FrechetDistance(torch.rand(5, 48), PixelsExtractor())
    metric.update(pictures(1))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        metric.compute()
    with pytest.raises(ValueError, match="reference has 48 features, inception-64 gives 64"):
        FrechetDistance(torch.rand(5, 48), InceptionExtractor(inception_file, "64"))
