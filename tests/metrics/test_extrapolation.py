import math
import re

import numpy as np
import pytest
import torch

from lightning_mem.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_from_features,
    frechet_infinity,
    frechet_infinity_interval,
)

D = 8
SCALES = np.linspace(0.5, 1.5, D)
TRUTH = FeatureStatistics(torch.zeros(D).double(), torch.from_numpy(np.diag(SCALES**2)), 2)
SHIFT, GROWTH = 0.3, 1.2
DISTANCE = float(D * SHIFT**2 + ((GROWTH - 1) ** 2 * SCALES**2).sum())  # of commuting Gaussians


def draw(n, generator, shift=SHIFT, growth=GROWTH):
    return torch.from_numpy(generator.normal(size=(n, D)) * SCALES * growth + shift)


def test_the_known_distance_is_what_the_package_gives_on_exact_moments():
    moved = FeatureStatistics(torch.full((D,), SHIFT, dtype=torch.float64), TRUTH.sigma * GROWTH**2, 2)
    assert frechet_distance(moved.mu, moved.sigma, TRUTH.mu, TRUTH.sigma) == pytest.approx(DISTANCE, rel=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_extrapolated_value_is_nearer_the_truth_than_the_plain_one_and_within_its_error(both):
    generator = np.random.default_rng(0)
    plain, extrapolated = [], []
    for _ in range(60):
        samples = draw(300, generator)
        reference = draw(300, generator, 0.0, 1.0) if both else TRUTH
        if both:
            plain.append(frechet_distance_from_features(samples, reference))
        else:
            own = FeatureStatistics.from_features(samples)
            plain.append(frechet_distance(own.mu, own.sigma, TRUTH.mu, TRUTH.sigma))
        extrapolated.append(frechet_infinity(samples, reference))
    bias = np.mean(plain) - DISTANCE
    left = np.mean(extrapolated) - DISTANCE
    error = np.std(extrapolated) / math.sqrt(60)
    assert bias > 5 * np.std(plain) / math.sqrt(60)  # there is a bias to take off
    assert abs(left) < bias / 5
    assert abs(left) < 3 * error


def test_two_parts_are_the_half_sample_rule(monkeypatch):
    # the line through F(n) and F(n/2) meets 0 at 2 F(n) - F(n/2)
    samples, sizes, seen = draw(100, np.random.default_rng(0)), [], []

    def watched(mu1, sigma1, mu2, sigma2):
        seen.append(frechet_distance(mu1, sigma1, mu2, sigma2))
        sizes.append(float(mu1.sum()))
        return seen[-1]

    monkeypatch.setattr("lightning_mem.metrics.extrapolation.frechet_distance", watched)
    found = frechet_infinity(samples, TRUTH, parts=2)
    assert found == pytest.approx(2 * seen[0] - (seen[1] + seen[2]) / 2, rel=1e-12)
    assert sizes[0] == pytest.approx((sizes[1] + sizes[2]) / 2)  # both halves, each row once


def test_labels_in_turn_do_no_harm():
    # ten labels one after another, each with a mean of its own: parts by row number would hold two labels each
    generator = np.random.default_rng(0)
    means = torch.from_numpy(generator.normal(size=(10, D)) * 2)
    samples = draw(1000, generator) + means[torch.arange(1000) % 10]
    shuffled = samples[torch.from_numpy(generator.permutation(1000))]
    plain = frechet_distance_from_features(samples, draw(1000, generator))
    gap = abs(frechet_infinity(samples, TRUTH) - frechet_infinity(shuffled, TRUTH))
    assert gap < 0.02 * plain


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interval_covers_the_distance_of_infinitely_many_images(both):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        samples = draw(160, generator)
        reference = draw(160, generator, 0.0, 1.0) if both else TRUTH
        low, high = frechet_infinity_interval(samples, reference, parts=2, blocks=8)
        covered += low <= DISTANCE <= high
    assert covered >= 180


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: frechet_infinity(x[:44], TRUTH),
            "samples needs at least 45 rows for 5 parts of more rows than its 8",
        ),
        (lambda x: frechet_infinity(x, x[:20], parts=3), "reference needs at least 27 rows for 3 parts"),
        (lambda x: frechet_infinity(x, TRUTH, parts=1), "a line needs two points, got 1"),
        (lambda x: frechet_infinity(x[0], TRUTH), "samples must be [n, d] features, got (8,)"),
        (lambda x: frechet_infinity(x / 0, TRUTH), "row 0 holds a value that is not finite"),
        (lambda x: frechet_infinity_interval(x, TRUTH, blocks=1), "blocks must be at least 2, got 1"),
        (lambda x: frechet_infinity_interval(x, TRUTH, level=95), "level must lie in (0, 1), got 95"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(draw(60, np.random.default_rng(0)))
