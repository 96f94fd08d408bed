"""A picture of rows in few dimensions that never enlarges a distance: most of a bank need not be looked at closer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mem.metrics.codes import SLICE, Coded, Codes, IntegerCodes, closeness_limits, exact_products

DIMENSIONS = 48
"""Directions of a picture; one more coordinate holds what they leave over."""

WIDTH = 32
"""Rows of the bank that are looked at as one, near each other where there is a projection."""

TILE = 64 * WIDTH
"""Rows of the bank whose pictures are multiplied at a time: the products stay in the processor's cache."""

SAMPLE = 512
"""Rows whose principal directions are taken."""


class Projection:
    r"""Coordinates along principal directions, and the length of the rest as one coordinate more.

    With an orthonormal P, :math:`\phi(x) = (P^\top x, |x - P P^\top x|)` keeps norms and satisfies
    :math:`|\phi(q) - \phi(b)| \le |q - b|`: the rests differ by at least the difference of their lengths. The
    directions are principal components of a sample of the bank and its mean, rounded to 8-bit integers, so that they
    meet integer codes exactly, and made orthonormal in float64.

    Args:
        directions: int8 [D, m], linearly independent.
        whiten: float64 [m, m]: ``directions @ whiten`` is orthonormal.
    """

    def __init__(self, directions: Tensor, whiten: Tensor) -> None:
        self.directions, self.whiten = directions, whiten
        self._wide = directions.double() @ whiten

    @classmethod
    def fit(cls, sample: Coded) -> "Projection | None":
        """From codes of a sample of the bank; null where it has too few directions for one."""
        rows = sample.codes.double()
        mean = rows.mean(0)
        rows = rows - mean
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = values > 1e-6 * values[-1].clamp(min=1e-30)
        vectors = vectors[:, kept][:, -(DIMENSIONS - 1) :].flip(1)
        found = torch.cat([mean[:, None], rows.T @ vectors], dim=1)
        found = found[:, found.abs().amax(0) > 0]
        if found.shape[1] < 2:
            return None
        directions = (found / found.abs().amax(0) * 127).round().to(torch.int8)
        wide = directions.double()
        factor, info = torch.linalg.cholesky_ex(wide.T @ wide)
        scale = factor.diagonal()
        if info.item() or scale.min() < 1e-3 * scale.max():
            return None
        return cls(directions, torch.linalg.inv(factor).T.contiguous())

    def coordinates(self, codes: Codes, rows: Coded) -> Tensor:
        """float64 [n, m + 1]."""
        integers = isinstance(codes, IntegerCodes)
        size = 4096 if integers else SLICE  # only floats are widened
        parts = []
        for part, squares in zip(rows.codes.split(size), rows.squares.split(size), strict=True):
            if integers:
                along = exact_products(part, self.directions.T.contiguous(), torch.int32).double() @ self.whiten
            else:
                along = part.double() @ self._wide
            rest = (squares.double() - along.square().sum(1)).clamp_(min=0).sqrt_()
            parts.append(torch.cat([along, rest[:, None]], dim=1))
        return torch.cat(parts)


def picture(coordinates: Tensor, squares: Tensor | None = None) -> Tensor:
    """float32 [n, m + 1]: the product of queries' with a bank's is the closeness q.b - |b|^2 / 2 of their coordinates.

    Args:
        coordinates: float64 [n, m].
        squares: [n], |b|^2 of bank rows; null for queries.
    """
    last = torch.ones_like(coordinates[:, :1]) if squares is None else squares.double()[:, None] / -2
    return torch.cat([coordinates, last], dim=1).float()


_ROUNDED = 2.0**-18  # of a norm: far above what float32 coordinates and the root of a small rest are off by


def picture_limits(queries: Coded, bank: Coded, radii: Tensor) -> Tensor:
    """float32 [q]: a row whose closeness in the picture is below it is farther than ``radii`` [q]."""
    squares, largest = queries.squares.double(), bank.squares.max().double()
    norms = squares.sqrt() + largest.sqrt()
    radius = radii + queries.slack + bank.slack.max() + _ROUNDED * norms
    # m + 2 products summed in float32, |b|^2 / 2 among them
    return closeness_limits(squares, largest, radius, 2.0**-23 * (DIMENSIONS + 8) * norms * largest.sqrt())


@dataclass(frozen=True)
class Closeness:
    """Closeness of some queries to n rows, of which only what is asked for need be held.

    Args:
        tops: [q, n // WIDTH], the largest of each strip of ``WIDTH`` columns; what is left at the end has none.
        count: n.
        columns: Gives the closeness [q, c] of columns int64 [c].
    """

    tops: Tensor
    count: int
    columns: Callable[[Tensor], Tensor]

    @classmethod
    def of_table(cls, table: Tensor) -> "Closeness":
        """All of it, [q, n]."""
        return cls(_strip_tops(table), table.shape[1], lambda columns: table.index_select(1, columns))

    @classmethod
    def of_pictures(cls, queries: Tensor, bank: Tensor) -> "Closeness":
        """Of pictures, multiplied a tile at a time: writing the whole table would take longer than its products."""
        tiles = [_strip_tops(queries @ tile.T) for tile in bank.split(TILE)]
        return cls(torch.cat(tiles, dim=1), len(bank), lambda columns: queries @ bank.index_select(0, columns).T)

    def strips(self, places: Tensor) -> Tensor:
        """Columns of these strips, int64 [s * WIDTH]."""
        return (places[:, None] * WIDTH + torch.arange(WIDTH, device=places.device)).flatten()

    def best(self, count: int) -> Tensor:
        """int64 [q, count]: columns with the largest closeness in the best strips, count at most their number."""
        places, inside = self.tops.topk(count, dim=1).indices.unique(return_inverse=True)
        columns = self.strips(places)
        cells = self.columns(columns).unflatten(1, (-1, WIDTH))
        own = cells.gather(1, inside[..., None].expand(-1, -1, WIDTH)).flatten(1).topk(count, dim=1).indices
        return columns[inside.gather(1, own // WIDTH) * WIDTH + own % WIDTH]

    def survivors(self, limits: Tensor) -> Tensor:
        """Columns in which some query is not below its limit [q], int64 ascending; strips first, by their maximum."""
        kept = _reached(self.tops, limits).nonzero()[:, 0]
        rest = torch.arange(self.tops.shape[1] * WIDTH, self.count, device=limits.device)
        columns = torch.cat([self.strips(kept), rest])
        return columns[_reached(self.columns(columns), limits)]


def _strip_tops(table: Tensor) -> Tensor:
    return table[:, : table.shape[1] // WIDTH * WIDTH].unflatten(1, (-1, WIDTH)).amax(-1)


def _reached(table: Tensor, limits: Tensor) -> Tensor:
    """bool [n]: whether some row is not below its limit; what is not a number is not below."""
    if table.shape[1] == 0:
        return torch.zeros(0, dtype=torch.bool, device=table.device)
    # one pass over numbers beats three over truth values; no difference of two closenesses overflows
    return ~((table - limits[:, None]).amax(0) < 0)


def in_boxes(points: Tensor, size: int) -> Tensor:
    """An order of points in which each ``size`` that follow each other lie near each other: halved and halved again.

    Args:
        points: [n, m].
        size: Rows of the smallest box.

    Returns:
        int64 [n], a permutation.
    """
    n = len(points)
    order = torch.arange(n, device=points.device)[None]
    points = points[:, :8].float()  # the leading directions are enough
    while order.shape[1] > size:
        if order.shape[1] % 2:  # the last row stands twice; its second place is dropped in the end
            order = torch.cat([order, order[:, -1:]], dim=1)
        boxes = points[order]
        widest = boxes.var(1).argmax(1)
        along = boxes.gather(2, widest[:, None, None].expand(-1, boxes.shape[1], 1))[..., 0]
        order = order.gather(1, along.argsort(1)).reshape(2 * len(order), -1)
    flat = order.flatten()
    first = torch.full((n,), len(flat), device=points.device)
    first.scatter_reduce_(0, flat, torch.arange(len(flat), device=points.device), "amin")
    return first.argsort()
