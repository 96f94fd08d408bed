"""The divergence difference against closed forms, quadrature and other libraries; what labels can tell."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.neighbors import KernelDensity
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.metrics import GaussianMixture, divergence_difference, label_divergence

LINE = np.linspace(-30, 30, 60_001)


def normals(n, d, seed, mean=0.0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=draw, dtype=torch.float64)


def quantiles(n, mean=0.0, scale=1.0):
    """Points that stand for a Gaussian far better than a draw of as many."""
    return torch.from_numpy(stats.norm.ppf((np.arange(n) + 0.5) / n, mean, scale))[:, None]


def gaussian(mean, scale, d=1):
    return GaussianMixture(torch.full((1, d), float(mean)), scale)


def on_the_line(images, eps):
    """Density of the kernels around images, and log densities of a model, at the points of a grid."""
    return stats.norm.pdf(LINE[:, None], images.numpy().T, eps).mean(1)


def divergence(q, log_p):
    """KL(q || p) by quadrature."""
    inside = q > 1e-300
    return np.trapezoid(np.where(inside, q * (np.log(np.maximum(q, 1e-300)) - log_p), 0), LINE)


def entropy(labels):
    share = labels.bincount().double() / len(labels)
    return float(stats.entropy(share))


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    chosen = np.random.default_rng(0).permutation(len(found.target))[:160]
    return torch.from_numpy(found.images[chosen] / 8 - 1), torch.from_numpy(found.target[chosen])


@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_difference_is_that_of_two_divergences_by_quadrature(eps):
    images = torch.tensor([[-1.0], [0.5], [2.0]])
    whole, own = GaussianMixture(torch.tensor([[-2.0], [1.0]]), 1.5), gaussian(0.4, 1.2)
    q = on_the_line(images, eps)
    grid = torch.from_numpy(LINE)[:, None]
    truth = divergence(q, own(grid).numpy()) - divergence(q, whole(grid).numpy())
    value, low, high, n = divergence_difference(images, whole, own, eps, num_draws=4000)
    assert low < truth < high
    assert (value, n) == (pytest.approx(truth, abs=0.03), 12_000)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.5), (1.0, 1.0), (2.0, 0.7)])
def test_on_many_images_it_tends_to_minus_the_divergence_between_two_gaussians(mean, scale):
    whole, own = gaussian(0, 1), gaussian(mean, scale)
    found = divergence_difference(quantiles(2000, mean, scale), whole, own, 0.01)
    truth = -kl_divergence(Normal(mean, scale), Normal(0.0, 1.0)).item()
    assert found.value == pytest.approx(truth, abs=0.004)
    assert truth < -0.2


def test_the_exact_conditional_of_two_gaussians_memorizes_more_and_the_other_one_less():
    whole = GaussianMixture(torch.tensor([[-1.5], [1.5]]), 1.0)
    own, other = gaussian(1.5, 1), gaussian(-1.5, 1)
    images = quantiles(1000, 1.5)
    p_own = stats.norm.pdf(LINE, 1.5)
    truth = -divergence(p_own, np.log((stats.norm.pdf(LINE, -1.5) + p_own) / 2 + 1e-300))
    assert divergence_difference(images, whole, own, 0.01).value == pytest.approx(truth, abs=0.003)
    assert truth < 0
    assert divergence_difference(images, whole, other, 0.01).low > 0
    swapped = divergence_difference(images, own, whole, 0.01)
    assert swapped.value == -divergence_difference(images, whole, own, 0.01).value


@pytest.mark.parametrize("eps", [0.05, 0.5, 2.0])
def test_scale_of_eps_is_a_standard_deviation_per_pixel(eps):
    # E log N(x; 0, s^2) = -d/2 log(2 pi s^2) - (|x|^2 + d eps^2) / (2 s^2)
    d, images = 6, normals(20, 6, seed=0)
    square = images.square().sum(1).mean().item() + d * eps**2
    truth = -d / 2 * math.log(3**2) - square / (2 * 3**2) + square / 2
    found = divergence_difference(images, gaussian(0, 3, d), gaussian(0, 1, d), eps, num_draws=400)
    assert found.low < truth < found.high
    assert found.high - found.low < 0.05 * abs(truth)


def test_interval_covers_the_closed_form_and_not_much_more():
    images = normals(6, 2, seed=1)
    square = images.square().sum(1).mean().item() + 2 * 0.8**2
    truth = -math.log(4.0) - square / 8 + square / 2
    covered = 0
    for seed in range(200):
        found = divergence_difference(images, gaussian(0, 2, 2), gaussian(0, 1, 2), 0.8, num_draws=5, seed=seed)
        covered += found.low < truth < found.high
    assert 180 <= covered <= 198


def test_mixture_is_that_of_two_other_libraries(monkeypatch):
    means, x = normals(30, 4, seed=0), normals(50, 4, seed=1, scale=2)
    sigma = torch.linspace(0.3, 2, 30, dtype=torch.float64)
    weights = torch.arange(1.0, 31)
    theirs = MixtureSameFamily(
        Categorical(weights.double()), Independent(Normal(means, sigma[:, None].expand(30, 4)), 1)
    )
    ours = GaussianMixture(means.reshape(30, 2, 2), sigma, weights)
    assert torch.allclose(ours(x.reshape(50, 2, 2)), theirs.log_prob(x), rtol=1e-12, atol=1e-12)
    kernels = KernelDensity(bandwidth=0.1).fit(means.numpy())
    whole = GaussianMixture(means, 0.1)(x)
    assert np.allclose(whole, kernels.score_samples(x.numpy()), rtol=1e-7)
    monkeypatch.setattr("lightning_mem.metrics.divergence.CHUNK_BYTES", 8 * 30 * 7)
    assert torch.allclose(GaussianMixture(means, 0.1)(x), whole, rtol=1e-12)


@pytest.mark.parametrize("t", [0, 200, 700])
def test_slope_of_the_images_density_is_the_closed_form_denoisers_score(t):
    images = (normals(12, 16, seed=0).reshape(12, 1, 4, 4) / 3).clamp(-1, 1)
    process = DiffusionProcess()
    signal = process.alpha_bar[t].sqrt()
    density = GaussianMixture.of_images(images, process, t)
    x = (images[:5] + density.sigma[0] * normals(5, 16, seed=1).reshape(5, 1, 4, 4)).requires_grad_()
    (slope,) = torch.autograd.grad(density(x).sum(), x)
    denoiser = EmpiricalDenoiser(images, process)
    times = torch.full((5,), t)
    x_t = (signal * x).detach()
    score = process.to_score(denoiser(x_t, times), x_t, times)
    assert torch.allclose(slope, signal * score, rtol=1e-4, atol=1e-4 * slope.abs().max().item())


def test_one_label_for_all_gives_exactly_zero(digits):
    images, labels = digits
    for eps in (0.1, 1.0):
        assert label_divergence(images, torch.full_like(labels, 7), eps)[:3] == (0.0, 0.0, 0.0)
    density = GaussianMixture(images, 0.5)
    assert divergence_difference(images[:9], density, density, 0.3)[:3] == (0.0, 0.0, 0.0)


def test_on_a_finite_set_all_labels_end_at_minus_their_entropy_and_random_ones_leave_it_first(digits):
    images, true = digits
    draw = torch.Generator().manual_seed(0)
    random, unique = true[torch.randperm(160, generator=draw)], torch.arange(160)
    for labels in (true, random, unique):
        assert label_divergence(images, labels, 0.05).value == pytest.approx(-entropy(labels), abs=1e-6)
    assert entropy(unique) == pytest.approx(math.log(160))
    at = {name: label_divergence(images, labels, 1.5) for name, labels in (("true", true), ("random", random))}
    assert -entropy(true) < at["true"].high < at["random"].low < at["random"].high < 0
    assert label_divergence(images, random, 8.0).low > -0.02


def test_with_more_images_at_one_width_random_labels_tell_nothing_and_true_ones_what_they_should():
    # two Gaussians of variance 0.75, seen through kernels of variance 0.25
    def of(n, rule):
        images = torch.cat([quantiles(n // 2, side, 0.75**0.5) for side in (-1.5, 1.5)])
        labels = torch.arange(n) // (n // 2) if rule == "true" else torch.arange(n) % 2
        return label_divergence(images, labels, 0.5)

    p_own = stats.norm.pdf(LINE, 1.5)
    p = (p_own + stats.norm.pdf(LINE, -1.5)) / 2
    truth = np.trapezoid(p_own * np.log(np.maximum(p, 1e-300) / np.maximum(p_own, 1e-300)), LINE)
    assert of(400, "true").value == pytest.approx(truth, abs=0.01)
    assert abs(of(400, "random").value) < 1e-3
    few = normals(8, 30, seed=0)  # far from each other
    assert label_divergence(few, torch.arange(8) % 2, 0.1).value == pytest.approx(-math.log(2), abs=1e-9)


def test_what_random_labels_gain_on_their_images_they_lose_on_unseen_ones(digits):
    # log of a mean is at least the mean of logs: over all labels the whole model fits any unseen image better
    images, _ = digits
    members, heldout = images[:120], images[120:]
    labels = torch.arange(120) % 4
    whole = GaussianMixture(members, 0.5)
    unseen = [
        divergence_difference(heldout, whole, GaussianMixture(members[labels == label], 0.5), 0.5) for label in range(4)
    ]
    assert sum(found.value for found in unseen) / 4 > 0.1
    assert label_divergence(members, labels, 0.5).high < -1


def test_the_models_width_may_differ_from_the_kernels():
    images, labels = normals(20, 3, seed=0, scale=2), torch.arange(20) % 4
    whole = GaussianMixture(images, 0.9)
    parts = [
        divergence_difference(images[labels == label], whole, GaussianMixture(images[labels == label], 0.9), 0.2)
        for label in range(4)
    ]
    found = label_divergence(images, labels, 0.2, sigma=0.9, num_draws=64)
    assert found.value == pytest.approx(sum(part.value for part in parts) / 4, abs=0.02)
    assert found.value != label_divergence(images, labels, 0.2, num_draws=64).value


def test_uint8_images_are_taken_to_the_models_scale_and_draws_have_an_address():
    counts = torch.randint(0, 256, (6, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = counts.double() / 127.5 - 1
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    found = label_divergence(counts, labels, 0.5)
    assert found.value == pytest.approx(label_divergence(floats, labels, 0.5).value, abs=1e-5)
    assert found == label_divergence(counts, labels, 0.5)
    assert found != label_divergence(counts, labels, 0.5, seed=1)
    first = label_divergence(counts, labels + 3, 0.5)
    assert first != found  # the draws around an image belong to its label


def test_draws_do_not_depend_on_the_memory_that_is_taken(monkeypatch):
    images = normals(10, 3, seed=0)
    ask = (images, gaussian(0, 2, 3), gaussian(0, 1, 3), 0.5)
    whole = divergence_difference(*ask)
    monkeypatch.setattr("lightning_mem.metrics.divergence.CHUNK_BYTES", 8 * 16 * 3 * 4)
    assert divergence_difference(*ask).value == pytest.approx(whole.value, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: divergence_difference(x, p, p, 0.0), "eps must be positive and num_draws at least 2, got 0.0"),
        (lambda x, p: divergence_difference(x, p, p, math.inf), "got inf and 16"),
        (lambda x, p: divergence_difference(x, p, p, 0.1, num_draws=1), "got 0.1 and 1"),
        (lambda x, p: divergence_difference(x, p, p, 0.1, level=1.0), "level must lie in (0, 1), got 1.0"),
        (lambda x, p: divergence_difference(x[:0], p, p, 0.1), "images must be [N >= 1, ...], got (0, 2)"),
        (lambda x, p: divergence_difference(x, p, lambda x: x, 0.1), "must return [64] for as many rows, got (64, 2)"),
        (
            lambda x, p: divergence_difference(x, p, lambda x: p(x) - torch.where(x[:, 0] > 5, math.inf, 0.0), 0.1),
            "a density is 0 or not finite near image 2",
        ),
        (lambda x, p: label_divergence(x, torch.zeros(3), 0.1), "labels must be int64 [4], one per image, got"),
        (lambda x, p: GaussianMixture(x[:0], 1.0), "means must be [K >= 1, ...], got (0, 2)"),
        (lambda x, p: GaussianMixture(x, 0.0), "sigma must be positive and finite, got 0 .. 0"),
        (lambda x, p: GaussianMixture(x, 1.0, torch.ones(3)), "weights must be [4], one per mean, got (3,)"),
        (lambda x, p: GaussianMixture(x, 1.0, torch.tensor([1.0, 1, 1, 0])), "weights must be positive and finite"),
        (lambda x, p: GaussianMixture.of_images(x, DiffusionProcess(), 1000), "t must lie in [0, 1000)"),
    ],
)
def test_wrong_values_are_refused(call, message):
    images = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=re.escape(message)):
        call(images, gaussian(0, 1, 2))
