import math
import re

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from lightning_mem.metrics import (
    frechet_distance_from_features,
    jackknife_interval,
    kernel_distance,
    memorization_informed_frechet_distance,
)


def features(n, d, seed, shift=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


class Same(torch.nn.Module):
    """A feature extractor for torchmetrics that takes features as they are."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)[:, :6].double()


@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef": 0.5}])
def test_kernel_distance_is_torchmetrics_on_equally_many_rows(options):
    a, b = features(50, 6, seed=0), features(50, 6, seed=1, shift=0.3)
    assert kernel_distance(a, b, **options) == pytest.approx(poly_mmd(a, b, **options).item(), rel=1e-10)
    assert kernel_distance(a.numpy(), b.numpy(), **options) == kernel_distance(a, b, **options)


def test_kernel_distance_is_what_random_subsets_scatter_around():
    a, b = features(60, 6, seed=0), features(60, 6, seed=1, shift=0.5)
    with pytest.warns(UserWarning, match="large memory footprint"):
        theirs = KernelInceptionDistance(feature=Same(), subsets=200, subset_size=30)
    theirs.set_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs.update(a, real=False)
        theirs.update(b, real=True)
        mean, deviation = (value.item() for value in theirs.compute())
    assert kernel_distance(a, b) == pytest.approx(mean, abs=4 * deviation / math.sqrt(200))
    assert mean > 10 * deviation / math.sqrt(200)


def test_kernel_distance_by_loops_over_pairs_with_sides_of_any_size(monkeypatch):
    monkeypatch.setattr("lightning_mem.metrics.kernel._ROWS", 7)
    x, y = features(13, 3, seed=0).numpy(), features(20, 3, seed=1).numpy()

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    truth = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(truth, rel=1e-10)


def test_kernel_distance_has_no_bias():
    # of one distribution: the mean over many draws is 0 at any n, unlike the Fréchet distance's
    values = [kernel_distance(features(20, 4, seed=2 * run), features(20, 4, seed=2 * run + 1)) for run in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)
    assert min(values) < 0


def test_jackknife_covers_the_kernel_distance_over_draws_of_the_samples():
    # over samples of N(shift, 1) and a fixed reference, the expectation is known up to a term that the mean shows
    reference = features(60, 3, seed=0)
    truth = np.mean([kernel_distance(features(60, 3, seed=1000 + run, shift=0.7), reference) for run in range(400)])
    covered = 0
    for run in range(200):
        samples = features(60, 3, seed=5000 + run, shift=0.7)
        low, high = jackknife_interval(lambda rows, s=samples: kernel_distance(s[rows], reference), 60, blocks=12)
        covered += low <= truth <= high
    assert covered >= 180


@pytest.mark.parametrize("closeness", [0.0, 0.05, 3.0])
@pytest.mark.filterwarnings("ignore:.*large memory footprint:UserWarning")
def test_mifid_is_torchmetrics_with_its_sides_exchanged(closeness):
    # the paper averages over the generated images; torchmetrics 1.9 over what it is given as real
    reference = features(80, 6, seed=0, shift=0.2)
    samples = reference[:60] + closeness * features(60, 6, seed=1) + 0.01
    theirs = MemorizationInformedFrechetInceptionDistance(feature=Same(), cosine_distance_eps=0.1)
    theirs.set_dtype(torch.float64)
    theirs.update(samples, real=True)
    theirs.update(reference, real=False)
    found = memorization_informed_frechet_distance(samples, reference)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-4)
    plain = frechet_distance_from_features(samples, reference)
    assert (found > 5 * plain) == (closeness < 1)
    assert found >= plain


def test_mifid_takes_training_images_of_their_own_and_punishes_exact_copies_without_end():
    training, other = features(40, 6, seed=0), features(40, 6, seed=1, shift=0.5)
    assert memorization_informed_frechet_distance(training, other, training=training) > 1e5
    plain = frechet_distance_from_features(training, other)
    assert memorization_informed_frechet_distance(training, other, training=other, eps=0.01) == plain
    assert memorization_informed_frechet_distance(other, other) == 0.0  # as in torchmetrics


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernel_distance(x[:1], x), "samples must be [n >= 2, d] features, got (1, 4)"),
        (lambda x: kernel_distance(x, x[0]), "reference must be [n >= 2, d] features, got (4,)"),
        (lambda x: kernel_distance(x, x[:, :2]), "the same features, got 4 and 2 of them"),
        (lambda x: kernel_distance(x, x, degree=0), "degree must be at least 1, got 0"),
        (lambda x: kernel_distance(x, x, gamma=0.0), "gamma must be positive, got 0.0"),
        (lambda x: kernel_distance(x * math.nan, x), "row 0 holds a value that is not finite"),
        (lambda x: memorization_informed_frechet_distance(x, x, eps=0.0), "eps must lie in (0, 1], got 0.0"),
        (lambda x: memorization_informed_frechet_distance(x * 0, x), "row 0 has length 0"),
        (lambda x: memorization_informed_frechet_distance(x[:1], x), "got (1, 4)"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(features(9, 4, seed=0))
