"""The law of distinct images against brute force and against draws whose probabilities are known."""

from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_mem.attacks import expected_unique


def test_below_the_counts_it_is_the_mean_over_all_subsets() -> None:
    images = [0, 0, 0, 1, 1, 2, None, None]  # eight samples, two of them hit nothing
    counts = torch.tensor([3, 2, 0, 1])
    at = torch.arange(9)
    expected = [
        np.mean([len({image for image in rows if image is not None}) for rows in combinations(images, n)])
        for n in range(9)
    ]
    torch.testing.assert_close(expected_unique(counts, 8, at), torch.tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_half_of_the_draws_foretell_the_whole(spread: float) -> None:
    rng = np.random.default_rng(0)
    p = np.exp(spread * rng.normal(size=200))
    p *= 0.5 / p.sum()  # half of the samples hit
    n = 400
    truth = (1 - (1 - p) ** (2 * n)).sum()
    counts = rng.multinomial(n, [*p, 0.5], size=100)[:, :-1]
    found = [float(expected_unique(torch.from_numpy(c), n, torch.tensor(2 * n))) for c in counts]
    # a bias of 3 % is what unequal probabilities leave, see the source
    assert np.mean(found) == pytest.approx(truth, rel=0.03)
    plain = [(1 - (1 - c / n) ** (2 * n)).sum() for c in counts]
    assert np.mean(plain) < 0.85 * truth  # why counts over draws are no probabilities


def test_the_curve_is_concave_and_goes_through_what_was_seen() -> None:
    counts = torch.tensor([9, 4, 2, 1, 1, 1, 2])
    curve = expected_unique(counts, 30, torch.arange(61))
    assert float(curve[30]) == pytest.approx(7)
    assert float(curve[0]) == 0
    assert (curve.diff() >= -1e-12).all()
    assert (curve.diff().diff() <= 1e-9).all()


def test_when_nothing_is_hit_once_nothing_new_is_expected() -> None:
    assert float(expected_unique(torch.tensor([3, 5]), 10, torch.tensor(20))) == 2
    assert float(expected_unique(torch.tensor([0, 0]), 10, torch.tensor(20))) == 0
    with pytest.raises(ValueError, match="counts must lie in 0 .. draws = 4"):
        expected_unique(torch.tensor([5]), 4, torch.tensor(4))
