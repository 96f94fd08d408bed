"""Nearest neighbours, exactly: integers where the images are integers, direct differences where they are not."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from lightning_mem.metrics.codes import Codes
from lightning_mem.metrics.precision import full_precision
from lightning_mem.metrics.projection import SAMPLE
from lightning_mem.metrics.search import Search, Side, choose_codes, choose_projection

Rows = Tensor | np.ndarray
"""N rows of any trailing shape; a numpy array may be memory-mapped."""

CHUNK_BYTES = 512 * 2**20
"""Working memory of a search when none is stated."""

SAMPLED = 2048
"""Rows of the bank by which a search chooses how to go about it."""

WORTHWHILE = (256, 2**25)
"""Queries, and pairs of a query and a bank row, from which a projection can pay for itself."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, np.float16, np.float32, np.float64)


def nearest_neighbors(
    queries: Rows, bank: Rows, k: int, *, groups: Rows | None = None, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The k rows of the bank that are nearest to each query, by plain L2.

    .. math:: d(x, y) = \lVert x - y \rVert_2

    uint8 counts as x/255, floats as given. uint8 against uint8 is summed in integers: the answer is bit-identical
    for every chunk size, order of queries and device. With a float on either side, distances are direct differences in
    float64, rounded to float32; rows are then ordered by (float32 distance, index).

    Most rows are ruled out by less: a picture of each in 65 dimensions whose distances are never larger than the true
    ones (where a sample says that it pays), then 8-bit products, exact for uint8, with a proven error bound for floats.
    No such step changes an answer; what it cannot rule out is looked at in full.

    Args:
        queries: [Q, ...] uint8 or floats. Decides the device of the search and of the answer.
        bank: [N, ...] uint8 or floats, as many values per row as the queries; read chunk by chunk, so it may be a
            ``numpy.memmap`` or lie on another device.
        k: How many neighbours, in 1 .. N (or 1 .. number of groups).
        groups: int64 [N]; rows of one group count once, by their nearest member (see :func:`duplicate_groups`).
            Null: every row counts.
        chunk_bytes: Working memory in bytes, besides the answer; at least one row of each side is held.
            Null: 512 MiB.

    Returns:
        ``distances`` float32 [Q, k], ascending, and ``indices`` int64 [Q, k] of bank rows; equal distances go to the
        lower index.

    Raises:
        ValueError: If a side is empty, rows differ in size, k or groups do not fit, or a float is not finite.
        TypeError: If a side is neither uint8 nor floating point.
    """
    check_sides(queries, bank)
    device = search_device(queries)
    group_of = checked_groups(groups, len(bank), device)
    available, what = (len(bank), "rows") if group_of is None else (len(group_of.unique()), "groups")
    if not 1 <= k <= available:
        raise ValueError(f"k must lie in 1 .. {available} (the {what} of the bank), got {k}")
    codes, keys = search(queries, bank, k, group_of, chunk_bytes)
    home = queries.device if isinstance(queries, Tensor) else device
    return decoded(codes, keys, home)


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


def check_sides(queries: Rows, bank: Rows) -> None:
    """Refuse sides that cannot be compared."""
    for name, rows in (("queries", queries), ("bank", bank)):
        if not isinstance(rows, Tensor | np.ndarray):
            raise TypeError(f"{name} must be a tensor or a numpy array, got {type(rows).__name__}")
        if rows.dtype not in (torch.uint8, np.uint8, *_FLOATS):
            raise TypeError(f"{name} must be uint8 or floating point, got {rows.dtype}: convert it first")
        if rows.ndim == 0 or math.prod(rows.shape) == 0:
            raise ValueError(
                f"{name} must hold at least one row with at least one value, got shape {tuple(rows.shape)}"
            )
    if math.prod(bank.shape[1:]) != math.prod(queries.shape[1:]):
        raise ValueError(
            f"queries and bank must have rows of equal size, got {tuple(queries.shape)} and {tuple(bank.shape)}: "
            "resize one side or repeat its channels"
        )


def search_device(queries: Rows) -> torch.device:
    """Where a search for these queries runs: where they are, except that MPS has no float64."""
    device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    return torch.device("cpu") if device.type == "mps" else device


def checked_groups(groups: Rows | None, rows: int, device: torch.device) -> Tensor | None:
    """Groups of a bank's rows on the device, int64 [rows]."""
    if groups is None:
        return None
    groups = torch.as_tensor(groups)
    if groups.shape != (rows,) or groups.is_floating_point() or groups.is_complex():
        raise ValueError(
            f"groups must be int64 [{rows}], one per bank row, got {groups.dtype} {tuple(groups.shape)}: "
            "duplicate_groups(bank) makes them"
        )
    return groups.to(device, torch.int64)


def search(
    queries: Rows,
    bank: Rows,
    k: int,
    group_of: Tensor | None,
    chunk_bytes: int | None,
    first: int = 0,
    places: int | None = None,
) -> tuple[Codes, Tensor]:
    """Keys int64 [Q, k] of checked sides, ascending, and the codes that read them.

    Args:
        queries: [Q, ...].
        bank: [N, ...].
        k: Neighbours; where the bank has fewer, the last keys are ``NOTHING``.
        group_of: int64 [places] on the device of the search, or null.
        chunk_bytes: Working memory in bytes; null: 512 MiB.
        first: Place of the bank's first row.
        places: Rows of the whole bank of which this one is a part; null: this is the whole.
    """
    budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    if budget <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    device = search_device(queries)
    dim = math.prod(queries.shape[1:])
    integers = all(rows.dtype in (torch.uint8, np.uint8) for rows in (queries, bank))
    sides = _side(queries, device), _side(bank, device)
    with full_precision(device):
        count = max(1, min(SAMPLED, len(bank), budget // (24 * dim)))
        sample = torch.arange(0, len(bank), len(bank) // count)[:count]
        codes = choose_codes(integers, places or len(bank), sides[1], sample)
        projection = None
        if len(queries) >= WORTHWHILE[0] and len(queries) * len(bank) >= WORTHWHILE[1] and count >= SAMPLE:
            projection = choose_projection(codes, *sides, sample, k)
        return codes, Search(codes, k, group_of, budget, projection).run(*sides, first)


def decoded(codes: Codes, keys: Tensor, home: torch.device) -> tuple[Tensor, Tensor]:
    """Distances and places of keys, on the device ``home``."""
    return codes.distances(keys).to(home), (keys & ((1 << codes.bits) - 1)).to(home)


def _chunk(rows: Rows, start: int, stop: int) -> Tensor:
    part = rows[start:stop]
    # a copy: memory-mapped arrays are read-only and views may have negative strides, torch takes neither
    return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))


def _side(rows: Rows, device: torch.device) -> Side:
    def read(places: Tensor | slice) -> Tensor:
        if isinstance(places, slice):
            part = _chunk(rows, places.start, places.stop)
        elif isinstance(rows, Tensor):
            part = rows[places.to(rows.device)]
        else:
            part = torch.from_numpy(np.asarray(rows[places.numpy()]))
        return part.reshape(len(part), -1).to(device)

    resident = isinstance(rows, Tensor) and rows.device == device
    return Side(read, len(rows), math.prod(rows.shape[1:]), 0 if resident else rows.dtype.itemsize)
