"""Nearest neighbours, exactly: integers where the images are integers, direct differences where they are not."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

Rows = Tensor | np.ndarray
"""N rows of any trailing shape; a numpy array may be memory-mapped."""

CHUNK_BYTES = 256 * 2**20
"""Working memory of a search when none is stated."""

_NOTHING = torch.iinfo(torch.int64).max  # the key of "no row yet": behind every real key
_LARGEST_NORM = 1e76  # beyond it a distance has no float32
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, np.float16, np.float32, np.float64)


@torch.no_grad()
def nearest_neighbors(
    queries: Rows, bank: Rows, k: int, *, groups: Rows | None = None, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The k rows of the bank that are nearest to each query, by plain L2.

    .. math:: d(x, y) = \lVert x - y \rVert_2

    uint8 counts as x/255, floats as given. uint8 against uint8 is summed in integers: the answer is bit-identical
    for every chunk size, order of queries and device. With a float on either side, candidates come from a float64
    matrix product with its proven error bound, and their distances from direct differences in float64, rounded to
    float32; rows are then ordered by (float32 distance, index).

    Args:
        queries: [Q, ...] uint8 or floats. Decides the device of the search and of the answer.
        bank: [N, ...] uint8 or floats, as many values per row as the queries; read chunk by chunk, so it may be a
            ``numpy.memmap`` or lie on another device.
        k: How many neighbours, in 1 .. N (or 1 .. number of groups).
        groups: int64 [N]; rows of one group count once, by their nearest member (see :func:`duplicate_groups`).
            Null: every row counts.
        chunk_bytes: Working memory in bytes, besides the answer; at least one row of each side is held.
            Null: 256 MiB.

    Returns:
        ``distances`` float32 [Q, k], ascending, and ``indices`` int64 [Q, k] of bank rows; equal distances go to the
        lower index.

    Raises:
        ValueError: If a side is empty, rows differ in size, k or groups do not fit, or a float is not finite.
        TypeError: If a side is neither uint8 nor floating point.
    """
    for name, rows in (("queries", queries), ("bank", bank)):
        _check_rows(name, rows)
    dim = math.prod(queries.shape[1:])
    if math.prod(bank.shape[1:]) != dim:
        raise ValueError(
            f"queries and bank must have rows of equal size, got {tuple(queries.shape)} and {tuple(bank.shape)}: "
            "resize one side or repeat its channels"
        )
    home = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    device = torch.device("cpu") if home.type == "mps" else home  # MPS has no float64
    group_of = _checked_groups(groups, len(bank), device)
    available, what = (len(bank), "rows") if group_of is None else (len(group_of.unique()), "groups")
    if not 1 <= k <= available:
        raise ValueError(f"k must lie in 1 .. {available} (the {what} of the bank), got {k}")
    budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    if budget <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")

    integers = all(rows.dtype in (torch.uint8, np.uint8) for rows in (queries, bank))
    bits = len(bank).bit_length() if integers else 32
    share = budget // 4  # one each: query chunk, bank chunk, their table, the direct differences
    rows_held = max(1, share // (16 * dim))
    cells = max(1, share // 48)
    bank_rows = min(len(bank), rows_held, max(math.isqrt(cells), cells // len(queries)))
    query_rows = max(1, min(len(queries), rows_held, cells // bank_rows))
    pairs_held = max(1, share // (32 * dim))

    best = torch.full((len(queries), k), _NOTHING, dtype=torch.int64, device=device)
    for start in range(0, len(bank), bank_rows):  # the bank outside: a file on disk is read once
        chunk = _values("bank", bank, start, start + bank_rows, device, scaled=not integers)
        chunk_groups = None if group_of is None else group_of[start : start + bank_rows]
        for first in range(0, len(queries), query_rows):
            part = _values("queries", queries, first, first + query_rows, device, scaled=not integers)
            held = best[first : first + query_rows]
            if integers:
                keys = _integer_keys(part, chunk, start, bits)
            else:
                keys = _float_keys(part, chunk, start, held[:, -1], k, chunk_groups, pairs_held)
            best[first : first + query_rows] = _merged(held, keys, chunk_groups, group_of, k, bits)

    indices = best & ((1 << bits) - 1)
    distances = ((best >> bits).double().sqrt() / 255).float() if integers else _distance_of_key(best)
    return distances.to(home), indices.to(home)


def duplicate_groups(images: Rows, *, mirror: bool = False) -> Tensor:
    """Group number of each image: exact duplicates share one, which is the lowest index among them.

    Args:
        images: uint8 [N, C, H, W].
        mirror: Whether horizontal mirror images share a group too (where training flips images).

    Returns:
        int64 [N] on the CPU, ready for :func:`nearest_neighbors`.

    Raises:
        ValueError: If the images are not uint8 [N, C, H, W].
    """
    check_images("images", images)
    first_seen: dict[bytes, int] = {}
    groups = torch.empty(len(images), dtype=torch.int64)
    for start in range(0, len(images), 4096):
        chunk = _chunk(images, start, start + 4096).numpy()
        hashes = _row_hashes(chunk)
        if mirror:  # the smaller of both hashes is the same for an image and its mirror image
            hashes = [min(pair) for pair in zip(hashes, _row_hashes(chunk[..., ::-1]), strict=True)]
        for index, row_hash in enumerate(hashes, start=start):
            groups[index] = first_seen.setdefault(row_hash, index)
    return groups


def _row_hashes(chunk: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in chunk]


def check_images(name: str, images: Rows) -> None:
    """Refuse what is not uint8 [N, C, H, W]; the message calls it ``name``."""
    if images.dtype not in (torch.uint8, np.uint8) or images.ndim != 4:
        raise ValueError(
            f"{name} must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}: "
            "floats in [-1, 1] become uint8 with lightning_mem.types.to_uint8"
        )


def _check_rows(name: str, rows: Rows) -> None:
    if not isinstance(rows, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(rows).__name__}")
    if rows.dtype not in (torch.uint8, np.uint8, *_FLOATS):
        raise TypeError(f"{name} must be uint8 or floating point, got {rows.dtype}: convert it first")
    if rows.ndim == 0 or math.prod(rows.shape) == 0:
        raise ValueError(f"{name} must hold at least one row with at least one value, got shape {tuple(rows.shape)}")


def _checked_groups(groups: Rows | None, rows: int, device: torch.device) -> Tensor | None:
    if groups is None:
        return None
    groups = torch.as_tensor(groups)
    if groups.shape != (rows,) or groups.is_floating_point() or groups.is_complex():
        raise ValueError(
            f"groups must be int64 [{rows}], one per bank row, got {groups.dtype} {tuple(groups.shape)}: "
            "duplicate_groups(bank) makes them"
        )
    return groups.to(device, torch.int64)


def _chunk(rows: Rows, start: int, stop: int) -> Tensor:
    part = rows[start:stop]
    # a copy: memory-mapped arrays are read-only and views may have negative strides, torch takes neither
    return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))


def _values(name: str, rows: Rows, start: int, stop: int, device: torch.device, *, scaled: bool) -> Tensor:
    """Rows start .. stop as float64 [n, dim] on the device; uint8 divided by 255 where ``scaled``."""
    part = _chunk(rows, start, stop).to(device)
    values = part.reshape(len(part), -1).double()
    if part.dtype == torch.uint8:
        return values.div_(255) if scaled else values
    wrong = ~(values.square().sum(1) < _LARGEST_NORM)
    if wrong.any():
        row = start + int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{name} row {row} holds a value that is not finite (or too large for a float32 distance): "
            "draw or load that row again"
        )
    return values


def _squared_distances(queries: Tensor, bank: Tensor) -> Tensor:
    """|q|^2 + |b|^2 - 2 q.b: exact for integers, where every partial sum stays below 2^53."""
    squares = (queries @ bank.T).mul_(-2)
    return squares.add_(queries.square().sum(1)[:, None]).add_(bank.square().sum(1))


def _integer_keys(queries: Tensor, bank: Tensor, start: int, bits: int) -> Tensor:
    """int64 [q, n] whose order is that of (squared distance, index)."""
    keys = _squared_distances(queries, bank).to(torch.int64)
    return (keys << bits).add_(torch.arange(start, start + len(bank), device=keys.device))


def _float_keys(
    queries: Tensor, bank: Tensor, start: int, kth_key: Tensor, k: int, chunk_groups: Tensor | None, pairs_held: int
) -> Tensor:
    """int64 [q, n] whose order is that of (float32 distance, index); rows that cannot be among the k hold no key."""
    approximate = _squared_distances(queries, bank)
    # A product over d terms is off by at most d u |q| |b|, the squares by d u |q|^2 and d u |b|^2, the additions by
    # a few u of the same size (Higham, Accuracy and Stability, section 3.1): together (d + 8) u (|q| + |b|)^2.
    # eps = 2u doubles it, which leaves room for the error of this bound itself.
    norms = queries.square().sum(1).sqrt() + bank.square().sum(1).max().sqrt()
    error = (queries.shape[1] + 8) * torch.finfo(torch.float64).eps * norms.square()

    per_group = _folded(approximate, chunk_groups)
    kth = torch.full_like(error, math.inf)
    if per_group.shape[1] >= k:
        kth = per_group.topk(k, dim=1, largest=False).values[:, -1] + error
    known = torch.where(kth_key == _NOTHING, math.inf, _distance_of_key(kth_key).double().square() * (1 + 2.0**-21))
    # 2^-21: rows that float32 rounding makes equal to the k-th compete by index; 1e-80: the same below its range
    limit = torch.minimum(kth, known) * (1 + 2.0**-21) + error + 1e-80

    keys = torch.full(approximate.shape, _NOTHING, dtype=torch.int64, device=bank.device)
    for pairs in (approximate <= limit[:, None]).nonzero().split(pairs_held):
        q, b = pairs.unbind(1)
        distances = (queries[q] - bank[b]).square_().sum(1).sqrt().float()
        # the bits of a float that is not negative are ordered as the float is
        keys[q, b] = (distances.view(torch.int32).to(torch.int64) << 32) + (b + start)
    return keys


def _distance_of_key(keys: Tensor) -> Tensor:
    return (keys >> 32).to(torch.int32).view(torch.float32)


def _folded(values: Tensor, groups: Tensor | None) -> Tensor:
    """Columns of one group replaced by their minimum."""
    if groups is None:
        return values
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    repeated = counts[inverse] > 1
    if not repeated.any():
        return values
    kept, columns = inverse[repeated].unique(return_inverse=True)  # most rows are alone: only the others are scattered
    largest = _NOTHING if values.dtype == torch.int64 else math.inf
    smallest = torch.full((len(values), len(kept)), largest, dtype=values.dtype, device=values.device)
    smallest.scatter_reduce_(1, columns.expand(len(values), -1), values[:, repeated], "amin")
    return torch.cat([values[:, ~repeated], smallest], dim=1)


def _merged(
    best: Tensor, keys: Tensor, chunk_groups: Tensor | None, group_of: Tensor | None, k: int, bits: int
) -> Tensor:
    """The k smallest keys of both, ascending, one per group; keys are unique, so there is no tie to break."""
    keys = _folded(keys, chunk_groups)
    both = torch.cat([best, keys.topk(min(k, keys.shape[1]), dim=1, largest=False).values], dim=1).sort(dim=1).values
    if group_of is not None:
        index = (both & ((1 << bits) - 1)).clamp_(max=len(group_of) - 1)
        group, order = group_of[index].masked_fill_(both == _NOTHING, -1).sort(dim=1, stable=True)
        again = torch.zeros_like(both, dtype=torch.bool)
        again.scatter_(1, order[:, 1:], group[:, 1:] == group[:, :-1])
        both = both.masked_fill(again, _NOTHING).sort(dim=1).values
    return both[:, :k]
