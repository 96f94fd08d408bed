"""The two-sample test: its statistic by the sums of its definition, level without a difference, power with one."""

import numpy as np
import pytest
import torch

from lightning_mem.metrics import two_sample_p_value
from lightning_mem.randomness import generator


def test_the_p_value_is_that_of_the_sums_of_its_definition() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(0.4, 1, (12, 3)), draw.normal(0, 1, (15, 3))
    rows = np.concatenate([first, second])
    squares = ((rows[:, None] - rows) ** 2).sum(2)
    kernel = np.exp(-squares / np.sort(squares[~np.eye(27, dtype=bool)])[350])  # torch's median: the lower of two

    def distance(order: np.ndarray) -> float:
        x, y = order[:12], order[12:]
        parts = kernel[np.ix_(x, x)].mean(), kernel[np.ix_(y, y)].mean(), kernel[np.ix_(x, y)].mean()
        return float(parts[0] + parts[1] - 2 * parts[2])

    shuffles = generator(4, "two-sample")
    drawn = [distance(torch.randperm(27, generator=shuffles).numpy()) for _ in range(99)]
    expected = (1 + sum(value >= distance(np.arange(27)) - 1e-12 for value in drawn)) / 100
    assert 0.01 < expected < 0.9
    assert two_sample_p_value(first, second, permutations=99, seed=4) == expected


def test_sets_drawn_alike_are_told_apart_as_rarely_as_said_and_a_shift_is_found() -> None:
    found, shifted = [], []
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(60, 4, generator=draw)
        found.append(two_sample_p_value(rows[:25], rows[25:], permutations=99))
        if seed < 20:
            shifted.append(two_sample_p_value(rows[:25], 1.6 * rows[25:], permutations=99))  # means are the same
    assert 0.02 <= np.mean(np.array(found) <= 0.1) <= 0.2
    assert np.median(found) > 0.3
    assert np.mean(np.array(shifted) <= 0.05) > 0.5


def test_equal_rows_many_rows_and_images_are_handled() -> None:
    assert two_sample_p_value(torch.ones(5, 2), torch.ones(6, 2)) == 1
    images = torch.randint(0, 256, (300, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert two_sample_p_value(images[:150], images[150:] // 2, at_most=40, permutations=99) == 0.01
    with pytest.raises(ValueError, match=r"at least 2 rows of one shape, got \(1, 2\) and \(5, 2\)"):
        two_sample_p_value(torch.ones(1, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="permutations must be at least 19 .* got 5 and 512"):
        two_sample_p_value(torch.ones(5, 2), torch.ones(5, 2), permutations=5)
