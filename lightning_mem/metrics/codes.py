"""Rows in few bits: what a search multiplies, and how far a product may be from the truth."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).max
"""The key of "no row yet": behind every real key."""

SLICE = 128
"""Rows encoded at a time: their float64 copies stay in the processor's cache."""


@dataclass(frozen=True)
class Coded:
    """Some rows of one side, as a search handles them.

    Args:
        read: Values as given, [m, D] uint8 or floats, that the rows were taken from.
        rows: int64 [n], where each row stands in them.
        index: int64 [n], the place of each row in its whole side.
        codes: [n, D] in few bits; ``Codes.closeness`` multiplies them.
        squares: [n] squared norms of the codes, int64 or float64.
        slack: float64 [n]; codes of two rows are at most as far apart as the rows and both slacks together.
        picture: float32 [n, m] in few dimensions, see ``Projection``; null where there is none.
    """

    read: Tensor
    rows: Tensor
    index: Tensor
    codes: Tensor
    squares: Tensor
    slack: Tensor
    picture: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Values [n, D] of some rows, or of all."""
        return self.read.index_select(0, self.rows if rows is None else self.rows[rows])

    def _each(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None and name != "read"}

    def part(self, rows: slice) -> "Coded":
        """Neighbouring rows, without a copy."""
        return replace(self, **{name: part[rows] for name, part in self._each().items()})

    def take(self, rows: Tensor) -> "Coded":
        """Some of the rows, in this order."""
        return replace(self, **{name: part.index_select(0, rows) for name, part in self._each().items()})


class Codes(ABC):
    """How rows are coded, compared by their codes, and compared exactly.

    Closeness is larger for nearer rows: :math:`2 q \\cdot b - |b|^2`, or half of it, for a query q and a bank row b.

    Attributes:
        bits: Of a key that hold the row's place; the others order by distance.
    """

    bits: int

    @abstractmethod
    def encode(self, name: str, values: Tensor, index: Tensor) -> Coded:
        """Code rows [n, D]; ``name`` stands in the message if one is not finite."""

    @abstractmethod
    def closeness(self, queries: Coded, bank: Coded) -> Tensor:
        """[q, n] from the codes."""

    @abstractmethod
    def limits(self, queries: Coded, bank: Coded, kth_keys: Tensor) -> Tensor:
        """[q]: a row whose closeness is below it is farther than the k-th so far."""

    @abstractmethod
    def radii(self, kth_keys: Tensor) -> Tensor:
        """float64 [q]: the k-th distance so far in the unit of the codes, never too small; inf without one."""

    @abstractmethod
    def keys(
        self, queries: Coded, bank: Coded, closeness: Tensor, limits: Tensor, kth_keys: Tensor, budget: int
    ) -> Tensor:
        """int64 [q, n], ordered as (distance, place) are; rows below their limit may hold ``NOTHING``."""

    @abstractmethod
    def dense_keys(
        self, queries: Coded, bank: Coded, kth_keys: Tensor, k: int, groups: Tensor | None, budget: int
    ) -> Tensor:
        """Keys [q, n] without a limit to go by; rows that cannot be among the k may hold ``NOTHING``."""

    @abstractmethod
    def probe_keys(self, queries: Coded, bank: Coded, columns: Tensor) -> Tensor:
        """Keys [q, r] of one row of the bank for each entry of ``columns`` [q, r]."""

    @abstractmethod
    def distances(self, keys: Tensor) -> Tensor:
        """float32 distances that keys stand for."""


class IntegerCodes(Codes):
    """uint8 as int8, moved by 128: distances do not change, and every product is exact.

    Args:
        dim: Values per row.
        places: Rows of the whole bank.
    """

    def __init__(self, dim: int, places: int) -> None:
        self.bits = places.bit_length()
        # a closeness 2 q.b - |b|^2 is at most 3 * 2^14 per value, and two of them must differ by less than 2^31
        self._least = -3 * 2**14 * dim
        self.dtype = torch.int32 if -2 * self._least < 2**31 else torch.int64

    def encode(self, name: str, values: Tensor, index: Tensor) -> Coded:
        """Exact; ``slack`` is 0."""
        codes = values.bitwise_xor(128).view(torch.int8)
        squares = [squared_norms(part) for part in codes.split(SLICE)]
        slack = torch.zeros(len(values), dtype=torch.float64, device=values.device)
        # the codes say everything: the values need not be kept, and a view would keep them
        return Coded(
            values.new_empty(0, values.shape[1]),
            torch.arange(len(values), device=values.device),
            index,
            codes,
            torch.cat(squares),
            slack,
        )

    def closeness(self, queries: Coded, bank: Coded) -> Tensor:
        """2 q.b - |b|^2 in integers."""
        return exact_products(queries.codes, bank.codes, self.dtype).mul_(2).sub_(bank.squares.to(self.dtype))

    def limits(self, queries: Coded, bank: Coded, kth_keys: Tensor) -> Tensor:
        """|q|^2 minus the k-th squared distance."""
        found = queries.squares - (kth_keys >> self.bits)
        return found.masked_fill_(kth_keys == NOTHING, self._least).clamp_(min=self._least).to(self.dtype)

    def radii(self, kth_keys: Tensor) -> Tensor:
        """Root of the squared distance."""
        return (kth_keys >> self.bits).double().sqrt().masked_fill_(kth_keys == NOTHING, math.inf)

    def keys(
        self, queries: Coded, bank: Coded, closeness: Tensor, limits: Tensor, kth_keys: Tensor, budget: int
    ) -> Tensor:
        """The squared distance is |q|^2 minus the closeness, exactly."""
        return ((queries.squares[:, None] - closeness) << self.bits).add_(bank.index)

    def dense_keys(
        self, queries: Coded, bank: Coded, kth_keys: Tensor, k: int, groups: Tensor | None, budget: int
    ) -> Tensor:
        """All of them: a product is exact."""
        return self.keys(queries, bank, self.closeness(queries, bank), kth_keys, kth_keys, budget)

    def probe_keys(self, queries: Coded, bank: Coded, columns: Tensor) -> Tensor:
        """By one product with all rows that are asked for."""
        unique, inverse = columns.unique(return_inverse=True)
        some = bank.take(unique)
        squared = queries.squares[:, None] - self.closeness(queries, some).gather(1, inverse)
        return (squared << self.bits).add_(some.index[inverse])

    def distances(self, keys: Tensor) -> Tensor:
        """Root / 255, rounded once."""
        return ((keys >> self.bits).double().sqrt() / 255).float()


def folded(values: Tensor, groups: Tensor | None) -> Tensor:
    """Columns of one group replaced by their minimum.

    Args:
        values: [q, n].
        groups: int64 [n]; null where every column is alone.
    """
    if groups is None:
        return values
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    repeated = counts[inverse] > 1
    if not repeated.any():
        return values
    kept, columns = inverse[repeated].unique(return_inverse=True)  # most rows are alone: only the others are scattered
    largest = NOTHING if values.dtype == torch.int64 else math.inf
    smallest = torch.full((len(values), len(kept)), largest, dtype=values.dtype, device=values.device)
    smallest.scatter_reduce_(1, columns.expand(len(values), -1), values[:, repeated], "amin")
    return torch.cat([values[:, ~repeated], smallest], dim=1)


def closeness_limits(squares: Tensor, largest: Tensor, radius: Tensor, error: Tensor) -> Tensor:
    """float32 [q]: below it, |q|^2 - 2 c > radius^2 for a closeness c = q.b - |b|^2 / 2 that is off by its error.

    Args:
        squares: float64 [q], |q|^2.
        largest: Of all |b|^2.
        radius: float64 [q].
        error: float64 [q], of the product q.b; what float32 rounds off besides is added here.
    """
    limits = (squares - radius.square()) / 2 - error - 2.0**-20 * (squares + largest) - 1e-30
    return (limits - limits.abs() * 2.0**-22).float()


def squared_norms(codes: Tensor) -> Tensor:
    """Exact squared norms of int8 rows, int64 [n]: float32 holds every partial sum of 1,024 squares."""
    total = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[1], 1024):
        part = codes[:, start : start + 1024].float()
        total += torch.linalg.vecdot(part, part).to(torch.int64)
    return total


def exact_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Integer products a b^T [q, n] of int8 rows; exact.

    Args:
        a: int8 [q, D].
        b: int8 [n, D].
        dtype: int32 or int64 of the answer; must hold D * 2^14.
    """
    if dtype == torch.int32 and _has_int8_products(a.device):
        return torch._int_mm(a, b.T)
    # float32 holds every partial sum of 1,024 products of at most 2^14 exactly, in any order
    total = torch.zeros(len(a), len(b), dtype=dtype, device=a.device)
    for start in range(0, a.shape[1], 1024):
        part = slice(start, start + 1024)
        total += (a[:, part].float() @ b[:, part].float().T).to(dtype)
    return total


def _has_int8_products(device: torch.device) -> bool:
    # elsewhere float32 is as fast, or int8 products have conditions on shapes (CUDA)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
