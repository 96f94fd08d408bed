"""Projections: unbiased, as tight as they promise, equal however they are asked, and made of the entries they name."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from lightning_mem.attribution.projection import RandomProjection
from lightning_mem.randomness import generator

KINDS = ["signs", "normal"]


def _pair(length: int) -> torch.Tensor:
    rows = torch.randn(2, length, generator=generator(0, "pair"), dtype=torch.float64)
    rows[1] = 0.6 * rows[0] + 0.8 * rows[1]
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_projected_rows_are_unbiased_with_the_variance_that_is_promised(kind: str) -> None:
    length, dimensions, seeds = 40, 16, 200
    rows = _pair(length)
    found = []
    for seed in range(seeds):
        projected = RandomProjection(length, dimensions, kind, seed)(rows)
        found.append(float(projected[0] @ projected[1]))
    truth = float(rows[0] @ rows[1])
    bound = (1 + truth**2) / dimensions
    # five standard errors of the mean; the variance of 200 draws is known to about 0.1, so four of those
    assert abs(np.mean(found) - truth) < 5 * (bound / seeds) ** 0.5
    assert np.var(found) < 1.4 * bound
    assert np.var(found) > 0.2 * bound


def test_signs_are_hadamard_matrices_between_random_signs_one_block_after_another() -> None:
    entries = RandomProjection(20, 8, "signs", seed=3)(torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(entries.abs(), torch.full((20, 8), 8**-0.5, dtype=torch.float64))
    for start in (0, 8, 16):
        block = entries[start : start + 8].numpy() * 8**0.5
        # undo the signs by the first row and column: what is left is Sylvester's matrix, as scipy makes it
        plain = block * block[:1] * block[:, :1] * block[0, 0]
        np.testing.assert_array_equal(plain.round(), hadamard(8)[: len(block)])
    assert not torch.equal(entries[:8], entries[8:16])


def test_fewer_weights_than_dimensions_are_only_turned() -> None:
    rows = _pair(50)
    projected = RandomProjection(50, 64, "signs")(rows)
    torch.testing.assert_close(projected @ projected.T, rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_normal_entries_are_drawn_in_tiles_and_have_variance_one_over_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mem.attribution.projection.TILE", 64 * 10)
    entries = RandomProjection(1000, 64, "normal")(torch.eye(1000, dtype=torch.float64))
    assert entries.var() == pytest.approx(1 / 64, rel=0.03)  # 64,000 draws: standard error 0.0056
    assert len(entries[:, 0].unique()) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_projected_alike_in_any_company_again_and_in_single_precision(kind: str) -> None:
    rows = torch.randn(5, 70, generator=generator(1, "rows"), dtype=torch.float64)
    project = RandomProjection(70, 16, kind, seed=2)
    whole = project(rows)
    torch.testing.assert_close(RandomProjection(70, 16, kind, seed=2)(rows[3:4]), whole[3:4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(project(rows.float()).double(), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(RandomProjection(70, 16, kind, seed=3)(rows), whole)


def test_what_no_projection_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two for the projection signs, got 12: use e.g. 16"):
        RandomProjection(10, 12, "signs")
    with pytest.raises(ValueError, match="projection must be signs or normal, got 'sparse'"):
        RandomProjection(10, 12, "sparse")
    with pytest.raises(ValueError, match="num_weights must be at least 1, got 0"):
        RandomProjection(0, 4)
    with pytest.raises(ValueError, match=r"gradients must be \[B, 10\], got \(2, 11\)"):
        RandomProjection(10, 4)(torch.ones(2, 11))
