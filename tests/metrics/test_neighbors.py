import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mem.metrics import duplicate_groups, nearest_neighbors


def rng(seed):
    return np.random.default_rng(seed)


def brute(queries, bank, k, groups=None):
    """Float64 direct differences, ordered by (float32 distance, index); one row of each group."""

    def scaled(rows):
        return (rows / 255 if rows.dtype == np.uint8 else rows.astype(np.float64)).reshape(len(rows), -1)

    if queries.dtype == bank.dtype == np.uint8:  # the order of integers has no rounding
        wide = [rows.astype(np.int64).reshape(len(rows), -1) for rows in (queries, bank)]
        order_by = ((wide[0][:, None] - wide[1][None]) ** 2).sum(-1)
        distances = (np.sqrt(order_by.astype(np.float64)) / 255).astype(np.float32)
    else:
        distances = np.linalg.norm(scaled(queries)[:, None] - scaled(bank)[None], axis=-1).astype(np.float32)
        order_by = distances
    groups = np.arange(len(bank)) if groups is None else groups
    indices = []
    for row in order_by:
        seen, kept = set(), []
        for index in np.argsort(row, kind="stable"):
            if groups[index] not in seen:
                seen.add(groups[index])
                kept.append(index)
        indices.append(kept[:k])
    indices = np.array(indices)
    return np.take_along_axis(distances, indices, 1), indices


@st.composite
def searches(draw):
    """Small searches full of ties: few grey values, repeated rows, every pairing of dtypes."""
    seed = draw(st.integers(0, 10**6))
    num_queries, num_bank, dim = draw(st.integers(1, 6)), draw(st.integers(1, 24)), draw(st.integers(1, 12))
    levels = draw(st.sampled_from([2, 3, 256]))

    def rows(count, dtype):
        values = rng(seed + count).integers(0, levels, (count, dim)).astype(np.uint8)
        return values if dtype == np.uint8 else (values / 64 - 1).astype(dtype)  # multiples of 1/64: ties stay ties

    dtypes = [draw(st.sampled_from([np.uint8, np.float32, np.float64])) for _ in range(2)]
    queries, bank = rows(num_queries, dtypes[0]), rows(num_bank, dtypes[1])
    for _ in range(draw(st.integers(0, 4))):  # duplicates in the bank
        bank[draw(st.integers(0, num_bank - 1))] = bank[draw(st.integers(0, num_bank - 1))]
    if dtypes[0] == dtypes[1] and draw(st.booleans()):
        queries[0] = bank[-1]
    groups = rng(seed).integers(0, draw(st.integers(1, num_bank)), num_bank) if draw(st.booleans()) else None
    k = draw(st.integers(1, num_bank if groups is None else len(np.unique(groups))))
    return queries, bank, k, groups, draw(st.sampled_from([None, 1, 700, 5_000, 60_000]))


@settings(max_examples=150, deadline=None)
@given(searches())
def test_search_equals_brute_force_for_every_dtype_tie_group_and_chunk(search):
    queries, bank, k, groups, chunk_bytes = search
    distances, indices = nearest_neighbors(queries, bank, k, groups=groups, chunk_bytes=chunk_bytes)
    expected, expected_indices = brute(queries, bank, k, groups)
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64
    if queries.dtype == bank.dtype == np.uint8:
        assert np.array_equal(distances.numpy(), expected)
        assert np.array_equal(indices.numpy(), expected_indices)
    else:  # numpy sums in another order: two float64 sums may round to neighbouring float32
        np.testing.assert_allclose(distances.numpy(), expected, rtol=2e-7)
        if queries.dtype != np.uint8 and bank.dtype != np.uint8:  # multiples of 1/64: every sum is exact
            assert np.array_equal(indices.numpy(), expected_indices)


@pytest.mark.parametrize(("seed", "chunk_bytes"), [(0, 1), (1, 20_000), (2, 100_000), (3, 300_000), (4, None)])
def test_uint8_answer_is_bit_identical_for_every_chunk_and_order_of_queries(seed, chunk_bytes):
    generator = rng(seed)
    bank = generator.integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    queries = generator.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
    whole = nearest_neighbors(queries, bank, 5)
    order = generator.permutation(30)
    parts = nearest_neighbors(queries[order], torch.from_numpy(bank), 5, chunk_bytes=chunk_bytes)
    assert torch.equal(parts[0], whole[0][order])
    assert torch.equal(parts[1], whole[1][order])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_copies_of_12288_pixels_have_distance_zero_and_rank_one(dtype):
    bank = torch.from_numpy(rng(0).integers(0, 256, (64, 3, 64, 64), dtype=np.uint8))
    bank = bank if dtype == torch.uint8 else bank.to(dtype) / 127.5 - 1
    planted = [63, 7, 7, 0]
    distances, indices = nearest_neighbors(bank[planted], bank, 2)
    assert indices[:, 0].tolist() == planted
    assert distances[:, 0].tolist() == [0.0] * 4
    assert (distances[:, 1] > 1).all()


@pytest.mark.parametrize("k", [1, 5, 40])
def test_near_identical_rows_far_from_the_origin_lose_nothing_to_cancellation(k):
    # |x|^2 = 1e12 and distances of 1e-6: |q|^2 + |b|^2 - 2 q.b alone would give noise
    base = 1e4 + rng(0).random((1, 10_000))
    steps = rng(1).permutation(40)
    bank = base.repeat(40, 0)
    bank[:, 0] += steps * 1e-6
    distances, indices = nearest_neighbors(base, bank, k, chunk_bytes=10**7)
    truth = np.linalg.norm(base - bank, axis=1)
    assert np.array_equal(indices[0].numpy(), np.argsort(steps)[:k])
    np.testing.assert_allclose(distances[0].numpy(), np.sort(truth)[:k], rtol=1e-6)


def test_floats_that_round_to_one_float32_distance_go_to_the_lower_index():
    bank = np.array([[1.0 + 1e-12], [1.0], [1.0 - 1e-12], [2.0]])
    distances, indices = nearest_neighbors(np.zeros((1, 1)), bank, 2)
    assert indices.tolist() == [[0, 1]]
    assert distances.tolist() == [[1.0, 1.0]]


def test_uint8_counts_as_x_over_255_against_floats():
    queries, bank = rng(0).random((4, 1, 5, 5)), rng(1).integers(0, 256, (9, 1, 5, 5), dtype=np.uint8)
    distances, indices = nearest_neighbors(queries, bank, 3)
    expected, expected_indices = brute(queries, bank, 3)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)
    assert np.array_equal(indices.numpy(), expected_indices)


def test_memory_mapped_bank_and_reversed_views_give_the_same(tmp_path):
    bank = rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    bank.tofile(tmp_path / "bank.bin")
    mapped = np.memmap(tmp_path / "bank.bin", dtype=np.uint8, mode="r", shape=bank.shape)
    plain = nearest_neighbors(bank[:5], bank, 3)
    for other in (mapped, bank[::-1][::-1]):
        found = nearest_neighbors(bank[:5], other, 3, chunk_bytes=1000)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_bank_is_read_once_in_chunks_within_the_budget():
    # tracemalloc does not see torch, so rows are counted; benchmarks/neighbors.py measures the memory of the process
    taken = []

    class Counting(np.ndarray):
        def __getitem__(self, item):
            part = super().__getitem__(item)
            if isinstance(item, slice):
                taken.append(part.nbytes)
            return part

    bank = rng(0).integers(0, 256, (1500, 4096), dtype=np.uint8).view(Counting)
    queries = np.array(bank)[:3]
    taken.clear()
    nearest_neighbors(queries, bank, 2, chunk_bytes=4 * 2**20)
    assert max(taken) * 2 <= 4 * 2**20  # as read, and as codes
    assert sum(size for size in taken if size > 4096) == bank.nbytes  # read once; single rows are looked at for dtypes


@pytest.mark.gpu
def test_cuda_and_cpu_agree_bit_for_bit_on_uint8():
    bank = torch.from_numpy(rng(0).integers(0, 256, (3000, 3, 16, 16), dtype=np.uint8))
    groups = duplicate_groups(bank)
    on_cpu = nearest_neighbors(bank[:200], bank, 7, groups=groups)
    on_cuda = nearest_neighbors(bank[:200].cuda(), bank, 7, groups=groups, chunk_bytes=3 * 10**6)
    assert all(answer.is_cuda for answer in on_cuda)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_cuda, strict=True))


def test_duplicates_and_mirror_images_share_the_lowest_index():
    images = rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    images[3] = images[1]
    images[4] = images[0][..., ::-1]
    assert duplicate_groups(images).tolist() == [0, 1, 2, 1, 4, 5]
    assert duplicate_groups(torch.from_numpy(images), mirror=True).tolist() == [0, 1, 2, 1, 0, 5]


@pytest.mark.parametrize(
    ("queries", "bank", "k", "groups", "error", "message"),
    [
        (torch.rand(0, 4), torch.rand(3, 4), 1, None, ValueError, "queries .* shape (0, 4)"),
        (torch.rand(2, 4), torch.rand(0, 4), 1, None, ValueError, "bank .* shape (0, 4)"),
        (torch.rand(2, 4), torch.rand(3, 5), 1, None, ValueError, "(2, 4) and (3, 5)"),
        (torch.rand(2, 4), torch.rand(3, 4), 4, None, ValueError, "1 .. 3 (the rows of the bank), got 4"),
        (torch.rand(2, 4), torch.rand(3, 4), 0, None, ValueError, "got 0"),
        (torch.rand(2, 4), torch.rand(3, 4), 3, [0, 1, 1], ValueError, "1 .. 2 (the groups of the bank), got 3"),
        (
            torch.rand(2, 4),
            torch.rand(3, 4),
            1,
            [0, 1],
            ValueError,
            "int64 [3], one per bank row, got torch.int64 (2,)",
        ),
        (torch.rand(2, 4), torch.rand(3, 4), 1, [0.0, 1.0, 2.0], ValueError, "got torch.float32 (3,)"),
        (torch.ones(2, 4).int(), torch.rand(3, 4), 1, None, TypeError, "queries .* torch.int32"),
        ([[1.0]], torch.rand(3, 1), 1, None, TypeError, "queries .* list"),
    ],
)
def test_wrong_searches_are_refused(queries, bank, k, groups, error, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern):
        nearest_neighbors(queries, bank, k, groups=None if groups is None else torch.tensor(groups))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize("side", ["queries", "bank"])
def test_value_that_is_not_finite_is_named_by_its_row(side, value):
    rows = {"queries": torch.rand(30, 4, dtype=torch.float64), "bank": torch.rand(30, 4, dtype=torch.float64)}
    rows[side][17, 2] = value
    with pytest.raises(ValueError, match=f"{side} row 17 "):
        nearest_neighbors(rows["queries"], rows["bank"], 1, chunk_bytes=500)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="chunk_bytes must be positive, got 0"):
        nearest_neighbors(torch.rand(2, 4), torch.rand(3, 4), 1, chunk_bytes=0)
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 1, 3, 3\)"):
        duplicate_groups(torch.rand(2, 1, 3, 3))
