"""Eidetic memorization: training images that samples hit within an absolute distance, and how many are that near."""

import math

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mem.metrics.intervals import leave_out_interval
from lightning_mem.metrics.neighbors import CHUNK_BYTES, Rows, check_images, nearest_neighbors
from lightning_mem.metrics.similarities import squared_distances


@torch.no_grad()
def eidetic_count(image: Rows, bank: Rows, delta: float, *, chunk_bytes: int | None = None) -> int | Tensor:
    r"""Number of training images within delta of an image.

    .. math:: \# \{ j : \lVert x - x_j \rVert_2 / \sqrt{D} \le \delta \}

    uint8 against uint8 is summed in integers; with a float on either side direct differences are summed in float64,
    and a distance that the rounding of narrower floats cannot tell from delta equals it. The image itself counts where
    the bank holds it.

    Args:
        image: [C, H, W] of the bank's shape, or [B, C, H, W] of several; uint8 (as x/255) or floats in [0, 1].
        bank: [N, C, H, W] training images, uint8 or floats in [0, 1]; may be memory-mapped, it is read chunk by chunk.
        delta: RMS-L2 on the [0, 1] scale, positive or 0. The literature uses 0.15.
        chunk_bytes: Working memory in bytes; at least one row is held. Null: 512 MiB.

    Returns:
        How many, in 0 .. N; int64 [B] for several images.

    Raises:
        ValueError: If shapes do not fit, a side is empty, a float is not in [0, 1], or delta is negative.

    Undefined when:
        Banks of different sizes are compared; and on scales other than [0, 1] (0.15 is 0.3 on [-1, 1]).

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.1.

    Example:
        >>> eidetic_count(torch.zeros(1, 1, 1), torch.tensor([0.0, 0.1, 0.2]).reshape(3, 1, 1, 1), 0.1)
        2
    """
    if not delta >= 0:
        raise ValueError(f"delta must be at least 0, got {delta}")
    if bank.ndim < 2 or 0 in bank.shape:
        raise ValueError(f"bank must hold at least one image, got shape {tuple(bank.shape)}")
    single = image.ndim == bank.ndim - 1
    images = image[None] if single else image
    if tuple(images.shape[1:]) != tuple(bank.shape[1:]) or len(images) == 0:
        raise ValueError(
            f"image must have the bank's shape {tuple(bank.shape[1:])}, one or several, got {tuple(image.shape)}: "
            "resize it or repeat its channels"
        )
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    dim = math.prod(bank.shape[1:])
    rows_held = _rows_held(chunk_bytes, dim)
    queries, slack = _checked("image", images, 0, device)
    counts = torch.zeros(len(queries), dtype=torch.int64, device=device)
    for start in range(0, len(bank), rows_held):
        chunk, other = _checked("bank", bank[start : start + rows_held], start, device)
        if queries.dtype == chunk.dtype == torch.uint8:
            for part in torch.arange(len(queries)).split(rows_held):
                counts[part] += _pixels_within(queries[part], chunk, delta, 1).sum(1)
        else:
            for number, query in enumerate(queries):
                counts[number] += (_rms(query, chunk, 1) <= delta + max(slack, other)).sum()
    return int(counts[0]) if single else counts


@torch.no_grad()
def tiled_l2(a: Rows, b: Rows, tiles: int = 4) -> float | Tensor:
    r"""Largest RMS-L2 over a grid of tiles, each compared with the tile at the same place.

    .. math:: \max_t \lVert a_t - b_t \rVert_2 / \sqrt{D_t}

    Two pictures that share a flat background and little else are close as a whole and far in one tile.

    Args:
        a: [C, H, W], or [B, C, H, W] for B pairs; uint8 (as x/255) or floats in [0, 1].
        b: The same, or one image to compare with all of a.
        tiles: Tiles along each side, at least 1; 4 gives a grid of 16. Height and width must be multiples of it: images
            are not cut silently.

    Returns:
        The distance in [0, 1]; float64 [B] for several pairs.

    Raises:
        ValueError: If shapes differ, tiles do not fit the size, or a float is not in [0, 1].

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.2.1.

    Example:
        >>> tiled_l2(torch.zeros(1, 4, 4), torch.nn.functional.pad(torch.ones(1, 1, 1), (0, 3, 0, 3)))
        1.0
    """
    first, second = (rows[None] if rows.ndim == 3 else rows for rows in (a, b))
    shapes = f"got {tuple(a.shape)} and {tuple(b.shape)}"
    if first.ndim != 4 or tuple(first.shape[1:]) != tuple(second.shape[1:]) or 0 in (*first.shape, *second.shape):
        raise ValueError(f"a and b must be [C, H, W] or [B, C, H, W] images of one size, {shapes}")
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ValueError(f"a and b must hold equally many images, or one of them a single one, {shapes}")
    check_tiles(tiles, first.shape[2], first.shape[3])
    device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    (rows, _), (others, _) = (_checked(name, images, 0, device) for name, images in (("a", first), ("b", second)))
    distances = _rms(rows, others, tiles)
    return distances.item() if a.ndim == b.ndim == 3 else distances


class EideticMemorization(Metric):
    r"""Distinct training images that samples extract, and that have at most k near copies in the bank.

    A training image is extracted where a sample lies within delta of it, as RMS-L2 or, with ``tiles``, as
    :func:`tiled_l2`; it is (k, delta)-eidetic where :func:`eidetic_count` is at most k. Lower is better; from one
    sample on. Two samples of one image count once, so the number is at most N. Compare equal numbers of samples and
    banks of one size. The state is a mask of the bank, reduced by its maximum: exact under DDP. The bank is a plain
    attribute, in no checkpoint.

    Args:
        bank: uint8 [N, C, H, W] training images; tensor or (memory-mapped) array.
        delta: RMS-L2 on the [0, 1] scale, positive or 0.
        k: Most training images within delta of an eidetic one, itself included, at least 1. Null: no limit.
        tiles: Tiles along each side; 1 compares whole images.
        blocks: Blocks of samples that the interval leaves out in turn, at least 2.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Raises:
        ValueError: If a number is outside its range or the images are not uint8 [N, C, H, W].

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    extracted: Tensor
    block_sizes: Tensor

    def __init__(
        self,
        bank: Rows,
        delta: float = 0.15,
        k: int | None = None,
        *,
        tiles: int = 1,
        blocks: int = 20,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_images("bank", bank)
        if len(bank) == 0:
            raise ValueError(f"bank must hold at least one image, got shape {tuple(bank.shape)}")
        if not delta >= 0:
            raise ValueError(f"delta must be at least 0, got {delta}")
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1 (an image is within delta of itself), got {k}")
        if blocks < 2:
            raise ValueError(f"blocks must be at least 2, got {blocks}")
        check_tiles(tiles, bank.shape[2], bank.shape[3])
        self.bank, self.delta, self.k, self.tiles = bank, delta, k, tiles
        self.blocks, self.chunk_bytes = blocks, chunk_bytes
        self.add_state("extracted", torch.zeros(blocks, len(bank), dtype=torch.uint8), dist_reduce_fx="max")
        self.add_state("block_sizes", torch.zeros(blocks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, indices: Tensor | None = None) -> None:
        """Take in uint8 images [B, C, H, W]; ``indices``, their addresses, put them into the interval's blocks."""
        check_images("images", images)
        if tuple(images.shape[1:]) != tuple(self.bank.shape[1:]):
            raise ValueError(
                f"images must have the bank's shape {tuple(self.bank.shape[1:])}, got {tuple(images.shape[1:])}"
            )
        if indices is None:
            indices = int(self.block_sizes.sum()) + torch.arange(len(images))
        block_of = indices.to(self.block_sizes.device) % self.blocks
        # a tile's distance is at least the whole image's: only samples with an image that near are looked at closely
        root = math.sqrt(math.prod(self.bank.shape[1:]))
        nearest, _ = nearest_neighbors(images, self.bank, 1, chunk_bytes=self.chunk_bytes)
        close = (nearest[:, 0].double() / root <= self.delta * (1 + 1e-6)).nonzero()[:, 0]
        rows_held = _rows_held(self.chunk_bytes, math.prod(self.bank.shape[1:]))
        for part in close.split(rows_held):
            blocks = block_of[part.to(block_of.device)]
            for start in range(0, len(self.bank), rows_held):
                chunk, _ = _checked("bank", self.bank[start : start + rows_held], start, images.device)
                sample, image = _pixels_within(images[part], chunk, self.delta, self.tiles).nonzero(as_tuple=True)
                self.extracted[blocks[sample.to(blocks.device)], image.to(blocks.device) + start] = 1
        self.block_sizes += torch.bincount(block_of, minlength=self.blocks)

    def compute(self) -> Tensor:
        """The number of extracted training images, an int64 scalar.

        Raises:
            ValueError: If no image was given.
        """
        if self.block_sizes.sum() == 0:
            raise ValueError(f"{type(self).__name__} has seen 0 images: call update before compute")
        return torch.tensor(len(self.indices()), device=self.extracted.device)

    def indices(self) -> Tensor:
        """Bank rows that were extracted and are eidetic, ascending, int64, of this process's state."""
        found = self.extracted.amax(0).nonzero()[:, 0].cpu()
        if self.k is None or len(found) == 0:
            return found
        rows = torch.as_tensor(self.bank[found.numpy() if isinstance(self.bank, np.ndarray) else found])
        counts = torch.as_tensor(eidetic_count(rows, self.bank, self.delta, chunk_bytes=self.chunk_bytes))
        return found[counts.cpu() <= self.k]

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Block jackknife interval of the number, cut at 0, over all processes (each must call it).

        Null below 10 extracted images or where a block of samples is empty: its normal theory fails there.
        """
        with self.sync_context():
            chosen = self.indices().to(self.extracted.device)
            met = self.extracted[:, chosen]
            times = met.sum(0, dtype=torch.int64)
            if len(chosen) < 10 or (self.block_sizes == 0).any():
                return None
            without = len(chosen) - ((met > 0) & (times == 1)).sum(1).double()
            low, high = leave_out_interval(float(len(chosen)), without, level)
        return max(0.0, low), high


def check_tiles(tiles: int, height: int, width: int) -> None:
    """Refuse a grid that images of this size cannot be cut into."""
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    if height < tiles or width < tiles:
        raise ValueError(
            f"images of {height}x{width} are smaller than one tile of a {tiles}x{tiles} grid: take fewer tiles"
        )
    if height % tiles or width % tiles:
        raise ValueError(
            f"images of {height}x{width} cannot be cut into {tiles}x{tiles} equal tiles: take a number of tiles that "
            "divides both sides, or crop the images"
        )


def _rows_held(chunk_bytes: int | None, dim: int) -> int:
    budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    if budget <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    # two chunks of n float64 rows, their differences, and an n x n table
    return max(1, min(budget // (32 * dim), math.isqrt(budget // 32)))


def _checked(name: str, rows: Rows, start: int, device: torch.device) -> tuple[Tensor, float]:
    """Images on the device, uint8 or float64 in [0, 1], and the rounding that narrower floats brought along."""
    part = (rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))).detach().to(device)
    if part.dtype == torch.uint8:
        return part, 0.0
    if not part.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floats in [0, 1], got {part.dtype}: convert it first")
    outside = ~((part >= 0) & (part <= 1))
    if outside.any():
        row = start + int(outside.nonzero()[0, 0])
        raise ValueError(
            f"{name} row {row} holds {float(part[outside][0])}, outside [0, 1]: images in [-1, 1] become x / 2 + 0.5"
        )
    return part.double(), 0.0 if part.dtype == torch.float64 else torch.finfo(part.dtype).eps


def _pixels_within(queries: Tensor, bank: Tensor, delta: float, tiles: int) -> Tensor:
    """Whether uint8 images are within delta of each other, bool [queries, bank]."""
    # products of integers: every partial sum stays below 2^53, so these distances are exact
    squares = squared_distances(queries.flatten(1).double(), bank.flatten(1).double())
    within = squares.div_(math.prod(bank.shape[1:])).sqrt_().div_(255) <= delta
    if tiles > 1:  # a tile's distance is at least the whole image's
        candidates = within.nonzero()
        for start in range(0, len(candidates), len(bank)):
            q, b = candidates[start : start + len(bank)].unbind(1)
            within[q, b] = _rms(queries[q], bank[b], tiles) <= delta
    return within


def _rms(a: Tensor, b: Tensor, tiles: int) -> Tensor:
    """Largest RMS-L2 over tiles x tiles of checked images [B, ...], either side broadcast; float64 [B]."""
    integers = a.dtype == b.dtype == torch.uint8
    if integers:
        squares = (a.int() - b.int()).square()
    else:
        a, b = (rows.double() / 255 if rows.dtype == torch.uint8 else rows for rows in (a, b))
        squares = (a - b).square()
    if tiles == 1:
        parts = squares.reshape(len(squares), 1, -1)
    else:
        count, channels, height, width = squares.shape
        grid = squares.reshape(count, channels, tiles, height // tiles, tiles, width // tiles)
        parts = grid.permute(0, 2, 4, 1, 3, 5).reshape(count, tiles * tiles, -1)
    total = parts.sum(2, dtype=torch.int64 if integers else torch.float64).double()
    return (total / parts.shape[2]).sqrt().amax(1) / (255 if integers else 1)
