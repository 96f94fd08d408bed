"""The search under :func:`nearest_neighbors`: cheap pictures of all rows, close looks at the few that could matter."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mem.metrics.codes import NOTHING, Coded, Codes, IntegerCodes, folded
from lightning_mem.metrics.projection import (
    DIMENSIONS,
    SAMPLE,
    WIDTH,
    Closeness,
    Projection,
    in_boxes,
    picture,
    picture_limits,
)
from lightning_mem.metrics.rounded import RoundedCodes


@dataclass(frozen=True)
class Side:
    """Queries or bank, read piece by piece.

    Args:
        read: Gives rows [n, dim] on the device of the search.
        count: How many there are.
        dim: Values per row.
        copied: Bytes per value that reading takes; 0 where it gives a view.
    """

    read: Callable[[Tensor | slice], Tensor]
    count: int
    dim: int
    copied: int


SMALL = 2048
"""Banks up to this size are searched without pictures and codes."""

QUERIES = 128
"""Queries of one step, near each other where there is a projection."""

FEW = 0.5
"""A picture that leaves a larger share of the bank is given up."""


class Search:
    """One search: keys of the k nearest rows, one per group, for all queries.

    Args:
        codes: How rows are coded and compared.
        k: Neighbours.
        group_of: int64 [N], the group of each place; null where every row counts.
        budget: Working memory in bytes.
        projection: Picture of both sides; null where none pays.
    """

    def __init__(
        self, codes: Codes, k: int, group_of: Tensor | None, budget: int, projection: Projection | None
    ) -> None:
        self.codes, self.k, self.group_of, self.budget = codes, k, group_of, budget
        self.projection = projection
        self._left: list[float] = []
        self._code_bytes = codes.dtype.itemsize if isinstance(codes, RoundedCodes) else 1

    def run(self, queries: Side, bank: Side, first: int = 0) -> Tensor:
        """Keys int64 [queries, k], ascending; ``first`` is the place of the bank's first row."""
        step = max(1, min(QUERIES, queries.count, self.budget // (64 * bank.dim)))
        code = self._code_bytes
        query_bytes = queries.dim * (queries.copied + 2 * code) + 512
        most = max(step, min(queries.count, self.budget // 4 // query_bytes))
        left = self.budget - most * query_bytes
        held = max(1, left // self._row_bytes(bank, step))
        # chunks of one size: a short last one costs as many steps as the others
        held = -(-bank.count // -(-bank.count // held))
        device = bank.read(slice(0, 1)).device
        answer = torch.full((queries.count, self.k), NOTHING, dtype=torch.int64, device=device)
        for start in range(0, queries.count, most):
            query = self._queries(queries, slice(start, min(start + most, queries.count)))
            best = answer[query.index]
            chunk: Coded | None = None
            for place in range(0, bank.count, held):
                del chunk  # before the next is read: one at a time is what the budget is for
                chunk = self._chunk(bank, slice(place, min(place + held, bank.count)), first)
                for rows in (slice(row, row + step) for row in range(0, len(query), step)):
                    best[rows] = self._searched(query.part(rows), chunk, best[rows])
            answer[query.index] = best
        return answer

    def _row_bytes(self, bank: Side, step: int) -> int:
        """Working memory of one row of a chunk: as read, coded, put in order, gathered; and its columns of tables."""
        code = self._code_bytes
        ordered = 0 if self.projection is None else code
        tables = 48 if bank.count <= SMALL else 16 if self.projection is None else 8
        return bank.dim * (bank.copied + code + ordered) + bank.dim // 4 + tables * step + 512

    def _queries(self, queries: Side, rows: slice) -> Coded:
        """Coded queries; with a projection, near ones follow each other."""
        values = queries.read(rows)
        query = self.codes.encode("queries", values, torch.arange(rows.start, rows.stop, device=values.device))
        if self.projection is None:
            return query
        coordinates = self.projection.coordinates(self.codes, query)
        return replace(query, picture=picture(coordinates)).take(in_boxes(coordinates[:, 1:], QUERIES))

    def _chunk(self, bank: Side, rows: slice, first: int) -> Coded:
        values = bank.read(rows)
        index = torch.arange(first + rows.start, first + rows.stop, device=values.device)
        chunk = self.codes.encode("bank", values, index)
        if self.projection is None:
            return chunk
        coordinates = self.projection.coordinates(self.codes, chunk)
        order = in_boxes(coordinates[:, 1:], WIDTH)  # candidates of one query then stand together
        return replace(chunk, picture=picture(coordinates, chunk.squares)).take(order)

    def _searched(self, query: Coded, chunk: Coded, best: Tensor) -> Tensor:
        codes = self.codes
        if not self._has_stages(query, chunk):
            return self._densely(query, chunk, best)
        if query.picture is not None and chunk.picture is not None and self.projection is not None:
            look = Closeness.of_pictures(query.picture, chunk.picture)
            best = self._probed(query, chunk, look, best)
            left = look.survivors(picture_limits(query, chunk, codes.radii(best[:, -1])))
            self._note(len(left) / len(chunk))
            if len(left) == 0:
                return best
            chunk = chunk.take(left)
            table = codes.closeness(query, chunk)
        else:
            table = codes.closeness(query, chunk)
            best = self._probed(query, chunk, Closeness.of_table(table), best)
        limits = codes.limits(query, chunk, best[:, -1])
        left = Closeness.of_table(table).survivors(limits)
        if len(left) == 0:
            return best
        table, chunk = table.index_select(1, left), chunk.take(left)
        if isinstance(codes, RoundedCodes) and int((~(table < limits[:, None])).sum()) * 32 > table.numel():
            return self._densely(query, chunk, best)  # so many pairs that a float64 product of all is cheaper
        keys = codes.keys(query, chunk, table, limits, best[:, -1], self.budget // 8)
        return self._merged(best, keys, self._groups(chunk))

    def _densely(self, query: Coded, chunk: Coded, best: Tensor) -> Tensor:
        columns = torch.arange(len(chunk), device=chunk.index.device)
        for part in columns.split(max(1, self.budget // (64 * len(query)))):
            some = chunk if len(part) == len(chunk) else chunk.take(part)
            groups = self._groups(some)
            keys = self.codes.dense_keys(query, some, best[:, -1], self.k, groups, self.budget // 8)
            best = self._merged(best, keys, groups)
        return best

    def _merged(self, best: Tensor, keys: Tensor, columns: Tensor | None) -> Tensor:
        return merged(best, keys, columns, self.group_of, self.codes.bits, self.k)

    def _groups(self, chunk: Coded) -> Tensor | None:
        return None if self.group_of is None else self.group_of[chunk.index]

    def _has_stages(self, query: Coded, chunk: Coded) -> bool:
        if len(chunk) <= max(SMALL, 2 * WIDTH * self.k):
            return False
        return not isinstance(self.codes, RoundedCodes) or self.codes.fits(query, chunk)

    def _note(self, share: float) -> None:
        self._left.append(share)
        if len(self._left) >= 4 and sum(self._left) / len(self._left) > FEW:
            self.projection = None

    def _probed(self, query: Coded, chunk: Coded, look: Closeness, best: Tensor) -> Tensor:
        """The best looking rows of the best looking strips, exactly: after that the k-th can only be nearer."""
        count = self.k + 1
        while True:
            count = min(count, look.tops.shape[1])
            found = self._merged(best, self.codes.probe_keys(query, chunk, look.best(count)), None)
            if count == look.tops.shape[1] or not (found[:, -1] == NOTHING).any():
                return found
            count *= 4  # one group can fill many strips


def merged(best: Tensor, keys: Tensor, columns: Tensor | None, group_of: Tensor | None, bits: int, k: int) -> Tensor:
    """The k smallest keys of both, ascending, one per group; one row's key may stand in both.

    Args:
        best: [q, k].
        keys: [q, n].
        columns: int64 [n], the group of each column, where a column is one row for all queries; null: it is not.
        group_of: int64 [places]; null where every row counts.
        bits: Of a key that hold the place.
        k: How many to keep.
    """
    if columns is not None:
        keys = folded(keys, columns)
    if columns is not None or group_of is None:
        keys = keys.topk(min(k, keys.shape[1]), dim=1, largest=False).values
    both = torch.cat([best, keys], dim=1).sort(dim=1).values
    again = torch.zeros_like(both, dtype=torch.bool)
    if group_of is None:
        again[:, 1:] = both[:, 1:] == both[:, :-1]
    else:
        place = (both & ((1 << bits) - 1)).clamp_(max=len(group_of) - 1)
        group, order = group_of[place].masked_fill_(both == NOTHING, -1).sort(dim=1, stable=True)
        again.scatter_(1, order[:, 1:], group[:, 1:] == group[:, :-1])
    return both.masked_fill_(again, NOTHING).sort(dim=1).values[:, :k]


def choose_codes(integers: bool, places: int, bank: Side, sample: Tensor) -> Codes:
    """Codes for a bank that has ``places`` rows as a whole; ``sample`` names some of this part's."""
    return IntegerCodes(bank.dim, places) if integers else RoundedCodes(bank.read(sample))


def choose_projection(codes: Codes, queries: Side, bank: Side, sample: Tensor, k: int) -> Projection | None:
    """A projection where one pays: on a sample of both sides it must rule out most pairs.

    Args:
        codes: Of the search.
        queries: All of them; 64 are looked at.
        bank: All of it.
        sample: Some of its rows, at least ``SAMPLE``.
        k: Neighbours.
    """
    if bank.dim < 6 * DIMENSIONS:
        return None
    values = bank.read(sample)
    device = values.device
    rows = codes.encode("bank", values, sample.to(device))
    few = torch.arange(0, queries.count, max(1, queries.count // 64))[:64]
    some = codes.encode("queries", queries.read(few), few.to(device))
    if isinstance(codes, RoundedCodes) and not codes.fits(some, rows):
        return None
    projection = Projection.fit(rows.take(torch.arange(0, len(rows), len(rows) // SAMPLE, device=device)))
    if projection is None:
        return None
    nothing = torch.full((len(some),), NOTHING, device=device)
    keys = codes.dense_keys(some, rows, nothing, k, None, 2**26)
    radii = codes.radii(keys.sort(dim=1).values[:, min(k, len(rows)) - 1])
    pictures = picture(projection.coordinates(codes, some)), picture(projection.coordinates(codes, rows), rows.squares)
    left = ~(pictures[0] @ pictures[1].T < picture_limits(some, rows, radii)[:, None])
    return projection if left.double().mean() < FEW / 2 else None
