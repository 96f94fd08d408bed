"""Scores of every sample with every training image, block by block: the whole matrix is never held."""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mem.metrics.neighbors import CHUNK_BYTES, Rows, nearest_neighbors
from lightning_mem.metrics.scores import Closer

Measure = Literal["cosine", "rms_l2", "normalized_l2"]
"""What a score is: cosine (larger is closer), RMS-L2, or RMS-L2 over alpha times the sample's mean of its k nearest."""


def closer_of(measure: Measure) -> Closer:
    """Which scores of a measure are closer.

    Raises:
        ValueError: If there is no such measure.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
    return "larger" if measure == "cosine" else "smaller"


def score_blocks(
    queries: Rows, bank: Rows, measure: Measure, *, scale: Tensor | None = None, chunk_bytes: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    r"""Scores of all queries with all bank rows, one block at a time.

    Summed in float64 and rounded to float32, so neither a block's size nor the order of rows shows in them: pixels
    (uint8 on both sides) are summed in integers, floats as products with an error far below a float32's.

    Args:
        queries: [Q, ...] uint8 (as x/255) or floats.
        bank: [N, ...] of as many values per row; may be memory-mapped.
        measure: Of the scores.
        scale: float64 [Q]; for ``normalized_l2``, what each query's distances are divided by.
        chunk_bytes: Working memory in bytes; at least one row of each side is held. Null: 512 MiB.

    Yields:
        Rows of the queries, rows of the bank, and their scores, float32 [rows, rows]. All queries of a block of the
        bank come before the next block, so a file on disk is read once.

    Raises:
        ValueError: If a side is empty, sizes differ, a value is not finite, or a row without length has no cosine.
    """
    closer_of(measure)
    dim = math.prod(queries.shape[1:])
    if 0 in (len(queries), len(bank), dim) or math.prod(bank.shape[1:]) != dim:
        raise ValueError(
            f"both sides must hold rows of one size, got {tuple(queries.shape)} and {tuple(bank.shape)}: "
            "resize one side or extract both with one extractor"
        )
    budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    if budget <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    held = max(1, budget // (4 * 24 * dim))
    cells = max(1, budget // (2 * 24))
    bank_rows = min(len(bank), held, max(math.isqrt(cells), cells // len(queries)))
    query_rows = max(1, min(len(queries), held, cells // bank_rows))
    integers = measure != "cosine" and all(rows.dtype in (torch.uint8, np.uint8) for rows in (queries, bank))
    unit = 255 * math.sqrt(dim) if integers else math.sqrt(dim)
    device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    for start in range(0, len(bank), bank_rows):
        chosen = slice(start, min(start + bank_rows, len(bank)))
        chunk = float64_rows("bank", bank, chosen, device, scaled=not integers)
        if measure == "cosine":
            chunk = _directions("bank", chunk, start)
        for first in range(0, len(queries), query_rows):
            rows = slice(first, min(first + query_rows, len(queries)))
            part = float64_rows("samples", queries, rows, device, scaled=not integers)
            if measure == "cosine":
                yield rows, chosen, (_directions("samples", part, first) @ chunk.T).float()
                continue
            scores = squared_distances(part, chunk).clamp_(min=0).sqrt_().div_(unit)
            if scale is not None:
                scores /= scale[rows, None]
            yield rows, chosen, scores.float()


def neighborhood_scale(
    queries: Rows,
    bank: Rows,
    k: int = 50,
    alpha: float = 0.5,
    *,
    groups: Rows | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Alpha times each query's mean RMS-L2 to its k nearest bank rows, which normalized L2 divides by; float64 [Q].

    Raises:
        ValueError: If all k of a query are at distance 0, or as :func:`nearest_neighbors`.
    """
    distances, _ = nearest_neighbors(queries, bank, k, groups=groups, chunk_bytes=chunk_bytes)
    scale = alpha * distances.double().mean(1) / math.sqrt(math.prod(queries.shape[1:]))
    if (scale == 0).any():
        row = int((scale == 0).nonzero()[0, 0])
        raise ValueError(f"row {row} has {k} neighbours at distance 0: the bank holds duplicates; pass their groups")
    return scale


def float64_rows(name: str, rows: Rows, chosen: slice, device: torch.device, *, scaled: bool = True) -> Tensor:
    """Chosen rows as float64 [n, dim] on the device; uint8 divided by 255 where ``scaled``.

    Raises:
        TypeError: If the rows are neither uint8 nor floating point.
        ValueError: If a value is not finite; it names the row.
    """
    part = rows[chosen]
    # a copy: memory-mapped arrays are read-only and views may have negative strides, torch takes neither
    part = (part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).detach().to(device)
    if part.dtype != torch.uint8 and not part.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floating point, got {part.dtype}: convert it first")
    values = part.reshape(len(part), -1).double()
    if part.dtype == torch.uint8:
        return values / 255 if scaled else values
    if not torch.isfinite(values).all():
        row = chosen.start + int((~torch.isfinite(values)).nonzero()[0, 0])
        raise ValueError(f"{name} row {row} holds a value that is not finite: draw or load that row again")
    return values


def squared_distances(queries: Tensor, bank: Tensor) -> Tensor:
    """|q|^2 + |b|^2 - 2 q.b of float64 rows; exact for integers, where every partial sum stays below 2^53."""
    squares = (queries @ bank.T).mul_(-2)
    return squares.add_(queries.square().sum(1)[:, None]).add_(bank.square().sum(1))


def _directions(name: str, rows: Tensor, start: int) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        row = start + int((lengths == 0).nonzero()[0, 0])
        raise ValueError(f"{name} row {row} has length 0 and so no cosine: use another measure or extractor")
    return rows / lengths
