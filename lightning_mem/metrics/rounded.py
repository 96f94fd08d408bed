"""Floats as codes: rounded, with the length of what was rounded off, and compared exactly where that could matter."""

import math

import torch
from torch import Tensor

from lightning_mem.metrics.codes import NOTHING, SLICE, Coded, Codes, closeness_limits, folded

PAIRS = 128
"""Pairs whose difference is taken at a time, in the processor's cache."""

_LARGEST_NORM = 1e76  # squared; beyond it a distance has no float32
_SPREAD = 2.0**40  # sides whose norms differ by more are compared without codes: products would leave float32
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class RoundedCodes(Codes):
    r"""Floats, centred, scaled by a power of two and rounded, with the length of what was rounded off.

    With rows :math:`x = \tilde x + e_x`, :math:`|q - b| \ge |\tilde q - \tilde b| - |e_q| - |e_b|`. Rounded to bfloat16
    where the processor multiplies that faster, else to float32.

    Args:
        sample: Rows of the bank [s, D] for centre and scale.
    """

    bits = 32

    def __init__(self, sample: Tensor) -> None:
        values = exact_values(sample)
        self.center = values.mean(0).float().double()  # the same for sides that are centred in float32 and in float64
        largest = (values - self.center).square().sum(1).max().sqrt().item()
        self.scale = 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0
        self.dtype = torch.bfloat16 if has_bfloat16(values.device) else torch.float32

    def encode(self, name: str, values: Tensor, index: Tensor) -> Coded:
        """Codes, their squared norms, and the norms of what was rounded off."""
        wide = values.dtype in (torch.float64, torch.uint8)
        center = self.center if wide else self.center.float()
        codes = torch.empty(values.shape, dtype=self.dtype, device=values.device)
        squares, slack = (torch.empty(len(values), dtype=torch.float64, device=values.device) for _ in range(2))
        for start in range(0, len(values), SLICE):
            rows = slice(start, start + SLICE)
            part = values[rows].double() / 255 if values.dtype == torch.uint8 else values[rows]
            check_finite(name, part, index[rows])
            moved = (part if wide else part.float()) - center
            moved *= self.scale
            codes[rows] = moved.to(self.dtype)
            rounded = codes[rows].to(moved.dtype)
            norms = torch.linalg.vector_norm(moved, dim=1, dtype=torch.float64)
            # centring in float32 rounds too, by 2^-24 of each value; four times that covers the norms' own error
            slack[rows] = torch.linalg.vector_norm(moved - rounded, dim=1, dtype=torch.float64) + 2.0**-22 * norms
            squares[rows] = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float64).square_()
        return Coded(values, torch.arange(len(values), device=values.device), index, codes, squares, slack)

    def fits(self, queries: Coded, bank: Coded) -> bool:
        """Whether products of these codes stay inside float32."""
        largest = [side.squares.max().sqrt().item() for side in (queries, bank)]
        return max(largest) < _SPREAD and largest[1] > 1 / _SPREAD

    def closeness(self, queries: Coded, bank: Coded) -> Tensor:
        """q.b - |b|^2 / 2 in float32."""
        return queries.codes @ bank.codes.T - (bank.squares / 2).float()

    def limits(self, queries: Coded, bank: Coded, kth_keys: Tensor) -> Tensor:
        """From :math:`|\\tilde q - \\tilde b|^2 = |\\tilde q|^2 - 2 c` for the closeness c, with its rounding."""
        radius = self.radii(kth_keys) + queries.slack + bank.slack.max()
        squares, ends = queries.squares, torch.stack([bank.squares.min(), bank.squares.max()])
        # D products summed in float32 (twice the bound of Higham, section 3.1)
        error = 2.0**-23 * (queries.codes.shape[1] + 8) * (squares * ends[1]).sqrt()
        if self.dtype == torch.bfloat16:  # and the sum rounded to 8 bits; at distance r it is (|q|^2 + |b|^2 - r^2) / 2
            error += 2.0**-8 * (squares[:, None] + ends - radius.square()[:, None]).abs().amax(1) / 2
        return closeness_limits(squares, ends[1], radius, error)

    def radii(self, kth_keys: Tensor) -> Tensor:
        """The float32 distance, up by what float32 rounded off: rows that it makes equal compete by place."""
        upper = self.distances(kth_keys).double() * (1 + 2.0**-22) + 1e-40
        return upper.mul_(self.scale).masked_fill_(kth_keys == NOTHING, math.inf)

    def distances(self, keys: Tensor) -> Tensor:
        """The upper half of a key: the bits of a float that is not negative are ordered as the float is."""
        return (keys >> 32).to(torch.int32).view(torch.float32)

    def keys(
        self, queries: Coded, bank: Coded, closeness: Tensor, limits: Tensor, kth_keys: Tensor, budget: int
    ) -> Tensor:
        """Direct differences in float64 where a row is not below its limit."""
        keys = torch.full(closeness.shape, NOTHING, dtype=torch.int64, device=closeness.device)
        rows, columns = (~(closeness < limits[:, None])).nonzero().unbind(1)
        self._write_keys(keys, queries, bank, rows, columns, kth_keys, budget)
        return keys

    def dense_keys(
        self, queries: Coded, bank: Coded, kth_keys: Tensor, k: int, groups: Tensor | None, budget: int
    ) -> Tensor:
        """A float64 product with its proven error bound says which rows direct differences must decide."""
        q = exact_values(queries.values())
        held = max(1, budget // (16 * q.shape[1]))
        squares = q.square().sum(1)
        approximate, largest = [], squares.new_zeros(())
        for part in bank.rows.split(held):
            b = exact_values(bank.read.index_select(0, part))
            norms = b.square().sum(1)
            largest = torch.maximum(largest, norms.max())
            approximate.append((q @ b.T).mul_(-2).add_(squares[:, None]).add_(norms))
        table = torch.cat(approximate, dim=1)
        # A product over d terms is off by at most d u |q| |b|, the squares by d u |q|^2 and d u |b|^2, the additions
        # by a few u of the same size (Higham, Accuracy and Stability, section 3.1): together (d + 8) u (|q| + |b|)^2.
        # eps = 2u doubles it, which leaves room for the error of this bound itself.
        error = (q.shape[1] + 8) * torch.finfo(torch.float64).eps * (squares.sqrt() + largest.sqrt()).square()
        per_group = folded(table, groups)
        limit = (self.radii(kth_keys) / self.scale).square_()
        if per_group.shape[1] >= k:
            limit = torch.minimum(limit, per_group.topk(k, dim=1, largest=False).values[:, -1] + error)
        # 2^-21: rows that float32 rounding makes equal to the k-th compete by place; 1e-80: the same below its range
        limit = limit * (1 + 2.0**-21) + error + 1e-80
        keys = torch.full(table.shape, NOTHING, dtype=torch.int64, device=table.device)
        rows, columns = (table <= limit[:, None]).nonzero().unbind(1)
        self._write_keys(keys, queries, bank, rows, columns, kth_keys, budget)
        return keys

    def probe_keys(self, queries: Coded, bank: Coded, columns: Tensor) -> Tensor:
        """Pair by pair."""
        keys = torch.full(columns.shape, NOTHING, dtype=torch.int64, device=columns.device)
        rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
        found = self._pair_keys(queries, bank, rows, columns.flatten())
        return keys.copy_(found.view(keys.shape))

    def _write_keys(
        self,
        keys: Tensor,
        queries: Coded,
        bank: Coded,
        rows: Tensor,
        columns: Tensor,
        kth_keys: Tensor,
        budget: int,
    ) -> None:
        held = max(1, min(PAIRS, budget // (40 * queries.read.shape[1])))
        known = (self.radii(kth_keys) / self.scale).square_()
        narrow = all(side.read.dtype in _NARROW for side in (queries, bank))
        relative = 1 + 2.0**-22 * (queries.read.shape[1] + 8)  # float32 differences, squares and their sum
        for q, b in zip(rows.split(held), columns.split(held), strict=True):
            if narrow:  # half the bytes for most pairs, which lie just outside
                squared = queries.values(q).float().sub_(bank.values(b)).square_().sum(1)
                near = ~(squared > known[q] * relative) | (squared == math.inf)
                q, b = q[near], b[near]
            keys[q, b] = self._pair_keys(queries, bank, q, b)

    def _pair_keys(self, queries: Coded, bank: Coded, rows: Tensor, columns: Tensor) -> Tensor:
        parts = []
        for q, b in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
            gap = exact_values(queries.values(q)).sub_(exact_values(bank.values(b)))
            distances = gap.square_().sum(1).sqrt_().float()
            parts.append((distances.view(torch.int32).to(torch.int64) << 32) + bank.index[b])
        return torch.cat(parts) if parts else columns


def exact_values(values: Tensor) -> Tensor:
    """Rows in float64: floats as given, uint8 as x/255."""
    return values.double() / 255 if values.dtype == torch.uint8 else values.double()


def check_finite(name: str, values: Tensor, index: Tensor) -> None:
    """Refuse a row that has no float32 distance; the message names it."""
    wrong = ~(torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square() < _LARGEST_NORM)
    if wrong.any():
        raise ValueError(
            f"{name} row {int(index[wrong.nonzero()[0, 0]])} holds a value that is not finite (or too large for a "
            "float32 distance): draw or load that row again"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products beat those of float32 here."""
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
