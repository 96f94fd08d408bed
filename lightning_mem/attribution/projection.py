"""Random projections of gradients, made in blocks from their address and never stored."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_mem.randomness import generator

ProjectionKind = Literal["signs", "normal"]
"""How the entries are drawn; see :class:`RandomProjection`."""

TILE = 1 << 22
"""Entries of a normal projection that are held at a time."""


class RandomProjection:
    r"""A random linear map :math:`g \mapsto P^\top g` of gradients into few dimensions that keeps their products.

    .. math:: E\,\langle P^\top a, P^\top b\rangle = \langle a, b\rangle, \qquad
        \mathrm{Var} \le \frac{|a|^2 |b|^2 + \langle a, b\rangle^2}{D}

    ``normal`` draws every entry from N(0, 1/D): the papers' choice, at a cost of D multiplications and a draw per
    weight and image. ``signs`` has entries :math:`\pm 1/\sqrt{D}` that are equally good by the bound above and far
    cheaper: the weights are cut into blocks :math:`g_b` of D, and

    .. math:: P^\top g = \sum_b S'_b\, H\, S_b\, g_b, \qquad H = \text{Hadamard} / \sqrt{D}

    with random signs :math:`S_b, S'_b`, so that each block is only turned and the blocks are mixed at random; H is
    applied as a Kronecker product of two small ones. The random numbers of a block depend on seed and block alone and
    are drawn on the CPU, so every process and device projects alike.

    Args:
        num_weights: P, length of a gradient.
        dimensions: D; for ``signs`` a power of two.
        kind: ``signs`` or ``normal``.
        seed: Of the entries.

    Raises:
        ValueError: If a number is not positive, or the dimensions are no power of two for ``signs``.

    Source:
        Johnson and Lindenstrauss (1984), normal as in TRAK, arXiv:2303.14186, section 3; signs and Hadamard: Ailon and
        Chazelle (2006), Tropp, arXiv:1011.1595. The sum over blocks is ours; the bound follows from the independence
        of their signs.
    """

    def __init__(self, num_weights: int, dimensions: int = 4096, kind: ProjectionKind = "signs", seed: int = 0) -> None:
        check_projection(dimensions, kind)
        if num_weights < 1:
            raise ValueError(f"num_weights must be at least 1, got {num_weights}")
        self.num_weights, self.dimensions, self.kind, self.seed = num_weights, dimensions, kind, seed
        bits = dimensions.bit_length() - 1
        self._sides = (_hadamard(bits // 2), _hadamard(bits - bits // 2)) if kind == "signs" else None

    def __call__(self, rows: Tensor) -> Tensor:
        """Projected rows, float32 [B, D] (float64 of float64 rows).

        Args:
            rows: [B, P], any device.

        Raises:
            ValueError: If they are of another length.
        """
        if rows.ndim != 2 or rows.shape[1] != self.num_weights:
            raise ValueError(f"gradients must be [B, {self.num_weights}], got {tuple(rows.shape)}")
        size = self.dimensions if self.kind == "signs" else max(1, TILE // self.dimensions)
        total = torch.zeros(len(rows), self.dimensions, dtype=torch.float64, device=rows.device)
        for number, part in enumerate(rows.split(size, dim=1)):
            total += self._signs(part, number) if self._sides is not None else self._normal(part, number)
        return total.to(rows.dtype)

    def _normal(self, part: Tensor, number: int) -> Tensor:
        draw = generator(self.seed, "projection", self.kind, self.dimensions, number)
        entries = torch.randn(part.shape[1], self.dimensions, generator=draw)
        return part @ entries.to(part) / math.sqrt(self.dimensions)

    def _signs(self, part: Tensor, number: int) -> Tensor:
        """One block; with rows reshaped to A x B the Kronecker product of two Hadamard matrices is H_A X H_B."""
        draw = generator(self.seed, "projection", self.kind, self.dimensions, number)
        signs = torch.randint(2, (2, self.dimensions), generator=draw).to(part) * 2 - 1
        turned = torch.nn.functional.pad(part * signs[0, : part.shape[1]], (0, self.dimensions - part.shape[1]))
        left, right = (side.to(part) for side in self._sides or ())
        turned = left @ turned.reshape(-1, len(left), len(right)) @ right
        return turned.flatten(1) * signs[1] / math.sqrt(self.dimensions)


def check_projection(dimensions: int, kind: ProjectionKind) -> None:
    """Refuse what no projection can have.

    Raises:
        ValueError: If the dimensions are not positive, or no power of two for ``signs``.
    """
    if kind not in ("signs", "normal"):
        raise ValueError(f"projection must be signs or normal, got {kind!r}")
    if dimensions < 1 or (kind == "signs" and dimensions & (dimensions - 1)):
        raise ValueError(
            f"dimensions must be at least 1, and a power of two for the projection signs, got {dimensions}: use e.g. "
            f"{2 ** max(dimensions, 1).bit_length()}, or projection normal"
        )


def _hadamard(bits: int) -> Tensor:
    """Sylvester's Hadamard matrix of side 2 ** bits, entries 1 and -1."""
    found = torch.ones(1, 1)
    for _ in range(bits):
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found
