"""The paths of a search, each on banks small enough for brute force: thresholds that choose a path are lowered."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mem.metrics import codes as codes_module
from lightning_mem.metrics import nearest_neighbors, neighbors, search
from lightning_mem.metrics import projection as projection_module
from lightning_mem.metrics import rounded as rounded_module
from lightning_mem.metrics.codes import IntegerCodes, exact_products
from lightning_mem.metrics.projection import Projection, in_boxes, picture
from lightning_mem.metrics.rounded import RoundedCodes


def rng(seed):
    return np.random.default_rng(seed)


def brute(queries, bank, k, groups=None):
    """Direct differences in float64 (int64 for uint8), ordered by (float32 distance, index); one row of each group."""
    integers = queries.dtype == bank.dtype == torch.uint8
    sides = [side.flatten(1).to(torch.int64 if integers else torch.float64) for side in (queries, bank)]
    squared = torch.stack([(sides[1] - row).square().sum(1) for row in sides[0]])
    distances = (squared.double().sqrt() / (255 if integers else 1)).float()
    order_by = squared if integers else distances
    indices = []
    for row in order_by:
        order = row.argsort(stable=True)
        if groups is not None:
            _, first = np.unique(groups[order].numpy(), return_index=True)
            order = order[np.sort(first)]
        indices.append(order[:k])
    indices = torch.stack(indices)
    return distances.gather(1, indices), indices


def alike(seed, count, dim, spread=40, rank=4):
    """Images near a plane of few dimensions, as photographs are: what a projection is made for."""
    basis = rng(1000).normal(size=(rank, dim))
    rows = (
        128
        + rng(seed).normal(size=(count, rank)) @ basis * spread / math.sqrt(rank)
        + rng(seed + 1).normal(size=(count, dim))
    )
    return torch.from_numpy(rows.clip(0, 255).round().astype(np.uint8))


PATHS = {
    "codes": {"SMALL": 16, "WORTHWHILE": (10**9, 10**9)},
    "projection": {"SMALL": 16, "WORTHWHILE": (1, 1), "SAMPLE": 16, "DIMENSIONS": 6},
}


def lower(path, monkeypatch):
    """Thresholds, so that a search of a few hundred rows takes this path."""
    for name, value in PATHS[path].items():
        for module in (neighbors, search, projection_module):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.fixture(params=[*PATHS, "no bfloat16", "no int8"])
def path(request, monkeypatch):
    """The path that a search of a few hundred rows takes."""
    lower(request.param if request.param in PATHS else "codes", monkeypatch)
    if request.param == "no bfloat16":
        monkeypatch.setattr(rounded_module, "has_bfloat16", lambda device: False)
    if request.param == "no int8":
        monkeypatch.setattr(codes_module, "_has_int8_products", lambda device: False)
    return request.param


def check(queries, bank, k, groups=None, **options):
    found = nearest_neighbors(queries, bank, k, groups=groups, **options)
    expected = brute(queries, bank, k, groups)
    if queries.dtype == torch.uint8:
        assert torch.equal(found[0], expected[0])
    else:  # two float64 sums in another order may round to neighbouring float32
        torch.testing.assert_close(found[0], expected[0], rtol=2e-7, atol=0)
    different = found[1] != expected[1]
    assert not (different & ~torch.isclose(found[0], expected[0], rtol=2e-7, atol=0)).any()
    return different.double().mean().item()


@pytest.mark.parametrize(("k", "chunk_bytes"), [(1, None), (2, 10**6), (7, 10**5), (50, None)])
def test_every_path_finds_the_neighbours_of_images(path, k, chunk_bytes):
    bank, queries = alike(0, 500, 96), alike(10, 140, 96)
    queries[3], bank[17] = bank[400], bank[400]  # a copy of a duplicate
    assert check(queries, bank, k, chunk_bytes=chunk_bytes) == 0
    floats = [side.float() / 127.5 - 1 for side in (queries, bank)]
    assert check(*floats, k, chunk_bytes=chunk_bytes) < 1e-3


def test_every_path_keeps_one_row_of_a_group_also_where_groups_are_large(path):
    bank = alike(0, 60, 96).repeat_interleave(10, dim=0)  # ten of each: the nearest eleven rows hold two groups
    groups = torch.arange(60).repeat_interleave(10)
    assert check(alike(5, 30, 96), bank, 5, groups) == 0
    shuffled = torch.from_numpy(rng(0).permutation(600))
    assert check(alike(5, 30, 96), bank[shuffled], 5, groups[shuffled]) == 0
    assert check(alike(5, 30, 96).float(), bank[shuffled].double(), 5, groups[shuffled]) == 0


def test_every_path_survives_noise_that_no_picture_can_rule_out(path):
    bank, queries = (torch.from_numpy(rng(seed).normal(size=(n, 120))).float() for seed, n in ((0, 400), (1, 150)))
    assert check(queries, bank, 3) == 0
    noise = [torch.from_numpy(rng(seed).integers(0, 256, (n, 120), dtype=np.uint8)) for seed, n in ((0, 400), (1, 150))]
    assert check(noise[1], noise[0], 3) == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_scale_and_offset_of_floats_change_no_neighbour(path, scale):
    bank, queries = (rng(seed).normal(size=(n, 120)) * scale for seed, n in ((0, 300), (1, 40)))
    queries[0] = bank[5]
    assert check(torch.from_numpy(queries), torch.from_numpy(bank), 2) == 0
    moved = [torch.from_numpy(side + 1000 * scale) for side in (queries, bank)]
    assert check(*moved, 2) == 0


@pytest.mark.parametrize("outlier", [1e-20, 1e20, 1e36])
def test_one_row_far_larger_than_the_others_changes_no_neighbour(path, outlier):
    bank, queries = (torch.from_numpy(rng(seed).normal(size=(n, 120))) for seed, n in ((0, 300), (1, 40)))
    bank[7] *= outlier
    assert check(queries, bank, 2) == 0
    queries[9] *= outlier
    assert check(queries, bank, 2) == 0
    bank[::2] = 0.25  # half the bank is one point
    assert check(queries, bank, 3) < 0.5


def test_near_duplicates_far_from_the_origin_are_told_apart(path):
    base = rng(0).normal(size=(1, 120))
    bank = 1e4 + base + rng(1).normal(size=(300, 120)) * 1e-6
    queries = bank[:50] + rng(2).normal(size=(50, 120)) * 1e-7
    check(torch.from_numpy(queries), torch.from_numpy(bank), 4)


@pytest.mark.parametrize("kinds", [("uint8", "float32"), ("float64", "uint8"), ("float16", "bfloat16")])
def test_every_pairing_of_dtypes_takes_every_path(path, kinds):
    sides = [
        side if kind == "uint8" else (side / 255).to(getattr(torch, kind))
        for side, kind in zip((alike(10, 40, 96), alike(0, 300, 96)), kinds, strict=True)
    ]
    expected = [side.double() / 255 if side.dtype == torch.uint8 else side.double() for side in sides]
    distances, indices = nearest_neighbors(*sides, 3)
    truth = brute(*expected, 3)
    torch.testing.assert_close(distances, truth[0], rtol=2e-7, atol=0)
    assert (indices == truth[1]).double().mean() > 0.95  # the rest are ties of float32


def test_answer_is_the_same_for_every_path_chunk_and_order(path):
    bank, queries = alike(0, 500, 96), alike(10, 140, 96)
    whole = nearest_neighbors(queries, bank, 5)
    order = torch.from_numpy(rng(0).permutation(140))
    for chunk_bytes in (10**4, 10**5, 10**6):
        parts = nearest_neighbors(queries[order], bank, 5, chunk_bytes=chunk_bytes)
        assert all(torch.equal(part, answer[order]) for part, answer in zip(parts, whole, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 40), st.integers(1, 4))
def test_bounds_of_codes_and_pictures_hold_for_every_pair(seed, count, dim, rank):
    generator = rng(seed)
    values = generator.normal(size=(count + 20, rank)) @ generator.normal(
        size=(rank, dim)
    ) * 10.0 ** generator.integers(-3, 4) + generator.normal(size=dim)
    values[generator.integers(len(values))] = values[0]
    for rows in (torch.from_numpy(values), torch.from_numpy((values * 20 % 256).astype(np.uint8))):
        integers = rows.dtype == torch.uint8
        codes = IntegerCodes(dim, len(rows)) if integers else RoundedCodes(rows[:10])
        coded = codes.encode("bank", rows, torch.arange(len(rows)))
        unit = 1.0 if integers else codes.scale
        truth = torch.linalg.vector_norm(rows.double()[:, None] - rows.double()[None], dim=2) * unit
        gaps = torch.linalg.vector_norm(coded.codes.double()[:, None] - coded.codes.double()[None], dim=2)
        slack = coded.slack[:, None] + coded.slack
        assert (gaps <= truth * (1 + 1e-12) + slack + 1e-12).all()
        projection = Projection.fit(coded)
        if projection is not None:
            points = projection.coordinates(codes, coded)
            shrunk = torch.linalg.vector_norm(points[:, None] - points[None], dim=2)
            norms = coded.squares.double().sqrt()
            assert (shrunk <= gaps + 2.0**-19 * (norms[:, None] + norms) + 1e-9).all()
            torch.testing.assert_close(points.square().sum(1), coded.squares.double(), rtol=1e-6, atol=1e-6)


def test_a_picture_that_enlarges_distances_loses_neighbours(monkeypatch):
    # the other side of the test above: the search does rely on the bound, so the bound has to be right
    lower("projection", monkeypatch)
    bank, queries = alike(0, 500, 96), alike(10, 140, 96)
    monkeypatch.setattr(
        search, "picture", lambda points, squares=None: picture(points, None if squares is None else 1.2 * squares)
    )
    found = nearest_neighbors(queries, bank, 2)
    assert not torch.equal(found[1], brute(queries, bank, 2)[1])


@pytest.mark.parametrize("dim", [1, 7, 1024, 1025, 3000])
def test_products_of_integers_are_exact_on_both_ways(dim, monkeypatch):
    a, b = (torch.from_numpy(rng(seed).integers(-128, 128, (n, dim)).astype(np.int8)) for seed, n in ((0, 5), (1, 33)))
    a[0], b[0] = -128, -128  # the largest sums there are
    truth = a.long() @ b.long().T
    assert torch.equal(exact_products(a, b, torch.int32).long(), truth)
    monkeypatch.setattr(codes_module, "_has_int8_products", lambda device: False)
    assert torch.equal(exact_products(a, b, torch.int32).long(), truth)
    assert torch.equal(exact_products(a, b, torch.int64), truth)


def test_rows_too_long_for_32_bits_are_summed_in_64():
    bank = torch.zeros(4, 40_000, dtype=torch.uint8)
    bank[1:] = 255
    bank[2, 0] = 254
    distances, indices = nearest_neighbors(bank[:1], bank, 4)
    assert indices.tolist() == [[0, 2, 1, 3]]
    assert distances[0, 2].item() == pytest.approx(200.0, abs=0)


def test_boxes_are_a_permutation_with_near_rows_together():
    points = torch.from_numpy(rng(0).normal(size=(1003, 2)))
    order = in_boxes(points, 32)
    assert torch.equal(order.sort().values, torch.arange(1003))

    def spread(rows):
        return rows[:992].view(-1, 32, 2).var(1).mean()

    assert spread(points[order]) < spread(points) / 3


def test_projection_is_used_for_images_and_not_for_noise(path):
    if path != "projection":
        return
    ruled_out = []
    for bank, queries in (
        (alike(0, 500, 96), alike(10, 140, 96)),
        tuple(torch.from_numpy(rng(s).integers(0, 256, (n, 96), dtype=np.uint8)) for s, n in ((0, 500), (1, 140))),
    ):
        codes = IntegerCodes(96, 500)
        sides = [search.Side(rows.__getitem__, len(rows), 96, 0) for rows in (queries, bank)]
        found = search.choose_projection(codes, *sides, torch.arange(500), 2)
        ruled_out.append(found is not None)
    assert ruled_out == [True, False]
