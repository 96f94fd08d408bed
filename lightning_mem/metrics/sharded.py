"""Neighbours in a bank of which each process holds a part."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mem.metrics.codes import NOTHING, IntegerCodes
from lightning_mem.metrics.neighbors import Rows, check_sides, checked_groups, decoded, search, search_device
from lightning_mem.metrics.search import merged


@dataclass(frozen=True)
class Shard:
    """The rows that this process holds of a bank that is spread over processes.

    Args:
        rows: [n, ...], n >= 1: rows ``first`` .. ``first + n - 1`` of the bank.
        first: Place of the first row in the whole bank.
        total: Rows of the whole bank.

    Raises:
        ValueError: If these rows do not lie in the bank.
    """

    rows: Rows
    first: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.first + len(self.rows) <= self.total or len(self.rows) < 1:
            raise ValueError(
                f"a shard must hold at least one of the rows 0 .. {self.total - 1}, got {len(self.rows)} from "
                f"{self.first} on"
            )


def sharded_neighbors(
    queries: Rows,
    shard: Shard,
    k: int,
    *,
    groups: Rows | None = None,
    process_group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nearest_neighbors` in a bank whose rows are spread over processes; the same answer on each.

    Each process searches its own rows, then k keys per query (distance and place, 8 bytes) are gathered: no image
    travels. The answer equals that of one process with the whole bank, ties included.

    Args:
        queries: [Q, ...], the same on all processes.
        shard: The rows of this process. Together the shards hold each row of the bank once.
        k: How many neighbours, in 1 .. rows of the whole bank (or groups).
        groups: int64 [total], of the whole bank, the same on all processes; see :func:`nearest_neighbors`.
        process_group: The processes; null: all.
        chunk_bytes: Working memory of each process in bytes. Null: 512 MiB.

    Returns:
        ``distances`` float32 [Q, k] and ``indices`` int64 [Q, k] of rows of the whole bank.

    Raises:
        ValueError: If k, groups or rows do not fit, or the shards do not make up one bank.
        RuntimeError: If there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("sharded_neighbors needs torch.distributed: in one process use nearest_neighbors")
    check_sides(queries, shard.rows)
    device = search_device(queries)
    group_of = checked_groups(groups, shard.total, device)
    available, what = (shard.total, "rows") if group_of is None else (len(group_of.unique()), "groups")
    if not 1 <= k <= available:
        raise ValueError(f"k must lie in 1 .. {available} (the {what} of the whole bank), got {k}")
    _check_shards(len(queries), shard, device, process_group)
    codes, keys = search(queries, shard.rows, k, group_of, chunk_bytes, shard.first, shard.total)
    _check_same("dtype", int(isinstance(codes, IntegerCodes)), device, process_group)
    best = torch.full_like(keys, NOTHING)
    for part in _gathered(keys, process_group):
        best = merged(best, part, None, group_of, codes.bits, k)
    return decoded(codes, best, queries.device if isinstance(queries, Tensor) else device)


def _gathered(values: Tensor, process_group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, values.contiguous(), group=process_group)
    return parts


def _check_same(what: str, value: int, device: torch.device, process_group: dist.ProcessGroup | None) -> None:
    found = torch.stack(_gathered(torch.tensor([value], device=device), process_group)).flatten().tolist()
    if len(set(found)) > 1:
        raise ValueError(f"{what} must be the same on all processes, got {found}")


def _check_shards(queries: int, shard: Shard, device: torch.device, process_group: dist.ProcessGroup | None) -> None:
    """Every process sees what the others hold, so all raise or none."""
    own = torch.tensor([queries, shard.total, shard.first, shard.first + len(shard.rows)], device=device)
    table = torch.stack(_gathered(own, process_group)).tolist()
    for column, what in ((0, "the number of queries"), (1, "the size of the whole bank")):
        if len({row[column] for row in table}) > 1:
            raise ValueError(f"{what} must be the same on all processes, got {[row[column] for row in table]}")
    spans = sorted((row[2], row[3]) for row in table)
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != shard.total:
        raise ValueError(f"the shards must hold each of {shard.total} rows once, got the spans {spans}")
