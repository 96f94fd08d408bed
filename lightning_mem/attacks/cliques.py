"""Generations that agree with each other: the graph of tiled distances, and its largest cliques."""

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from lightning_mem.evaluation import Workers
from lightning_mem.metrics.eidetic import check_tiles
from lightning_mem.metrics.precision import full_precision

EXACT = 1024
"""Products of numbers from -128 to 127 whose sum float32 holds exactly."""


def tiled_distances(
    images: Tensor, others: Tensor | None = None, tiles: int = 4, *, workers: Workers | None = None
) -> Tensor:
    r"""Largest RMS-L2 over a grid of tiles at the same place, of every image to every other.

    .. math:: \max_t \lVert a_t - b_t \rVert_2 / \sqrt{D_t}

    :func:`~lightning_mem.metrics.tiled_l2` of all pairs, by one product a tile; sums of integers, so exact before the
    root for every block size, process and device.

    Args:
        images: uint8 [N, C, H, W].
        others: uint8 [M, C, H, W]; null for the images themselves.
        tiles: Tiles along each side, at least 1; they must divide both sides.
        workers: How rows are dealt out.

    Returns:
        float64 [N, M] in [0, 1].

    Raises:
        ValueError: If tiles do not fit, or the two sides differ in size.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.2.1.
    """
    others = images if others is None else others
    if images.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"images must be of one size, got {tuple(images.shape[1:])} and {tuple(others.shape[1:])}: set "
            "data.image_size and data.channels to those of the generations"
        )
    _, channels, height, width = images.shape
    check_tiles(tiles, height, width)
    workers = workers or Workers(device=images.device)
    high, wide = height // tiles, width // tiles
    own, together = workers.share(len(images))
    largest = torch.zeros(len(own), len(others), dtype=torch.float64, device=workers.device)
    for top in range(0, height, high):
        workers.pause()
        for left in range(0, width, wide):
            window = (slice(None), slice(None), slice(top, top + high), slice(left, left + wide))
            rows, columns = (part[window].flatten(1).to(workers.device) for part in (images[own], others))
            with full_precision(workers.device):
                torch.maximum(largest, _squared(rows, columns), out=largest)
    return (together(largest) / (channels * high * wide)).sqrt().cpu() / 255


def _squared(rows: Tensor, columns: Tensor) -> Tensor:
    """Sums of squared differences of uint8 rows, float64 [N, M], exact: no partial sum in float32 exceeds 2^24."""
    found = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows.device)
    for a, b in zip(rows.split(EXACT, 1), columns.split(EXACT, 1), strict=True):
        left, right = a.float() - 128, b.float() - 128
        found += (left @ right.T).double().mul_(-2)
        found += left.square().sum(1).double()[:, None] + right.square().sum(1).double()
    return found


@dataclass(frozen=True)
class Clique:
    """Generations that are all near each other.

    Args:
        vertices: Ascending; at least 2.
        mean_distance: Over all pairs.
        exact: Whether no larger one, and no tighter one as large, is in its component; else the search was cut off.
    """

    vertices: tuple[int, ...]
    mean_distance: float
    exact: bool = True

    @property
    def order(self) -> tuple[float, ...]:
        """Larger first, then tighter, then by vertices."""
        return (-len(self.vertices), self.mean_distance, *self.vertices)

    def medoid(self, distances: Tensor) -> int:
        """The vertex with the smallest mean distance to the others; the first of equals."""
        own = torch.tensor(self.vertices)
        return self.vertices[int(distances[own][:, own].sum(1).argmin())]


def largest_cliques(distances: Tensor, delta: float, limit: int = 100_000) -> list[Clique]:
    """The largest clique of each connected component of the graph "at most delta apart", the largest first.

    Vertices that cannot be in a clique as large as one found greedily are left out, core by core; if others are left,
    networkx enumerates the maximal cliques among these. A component of one vertex has none.

    Args:
        distances: [N, N], symmetric. The diagonal does not matter: a generation is no neighbour of itself.
        delta: At most how far neighbours are apart, on the scale of the distances.
        limit: Maximal cliques that are looked at in a component: their number can grow exponentially. Beyond it the
            largest so far is told, as not exact.

    Raises:
        ValueError: If the distances are not square and symmetric, delta is negative or limit is below 1.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.2.2; enumeration:
        Tomita, Tanaka and Takahashi, Theoretical Computer Science 363 (2006).
    """
    if distances.ndim != 2 or not torch.equal(distances, distances.T):
        raise ValueError(f"distances must be symmetric [N, N], got {tuple(distances.shape)}")
    if not delta >= 0 or limit < 1:
        raise ValueError(f"delta must be at least 0 and limit at least 1, got {delta} and {limit}")
    near = (distances <= delta).cpu().numpy()
    np.fill_diagonal(near, False)
    found = [_largest(part, near, distances, limit) for part in _components(near)]
    return sorted(found, key=lambda clique: clique.order)


def _components(near: np.ndarray) -> list[np.ndarray]:
    """Vertices of each connected component with an edge, ascending."""
    left, found = near.any(1), []
    while left.any():
        part = np.zeros_like(left)
        fresh = part.copy()
        fresh[left.argmax()] = True
        while fresh.any():
            part |= fresh
            fresh = near[fresh].any(0) & ~part
        found.append(part.nonzero()[0])
        left &= ~part
    return found


def _largest(vertices: np.ndarray, near: np.ndarray, distances: Tensor, limit: int) -> Clique:
    own = near[np.ix_(vertices, vertices)]
    free, greedy = np.ones(len(own), dtype=bool), []
    for vertex in np.argsort(-own.sum(1), kind="stable"):
        if free[vertex]:
            greedy.append(vertex)
            free &= own[vertex]
    kept = np.ones(len(own), dtype=bool)
    while (weak := kept & (own[:, kept].sum(1) < len(greedy) - 1)).any():
        kept &= ~weak
    best = _clique(vertices[greedy], distances)
    if kept.sum() == len(greedy):  # nobody else has neighbours enough
        return best
    rest = kept.nonzero()[0]
    graph: nx.Graph = nx.from_numpy_array(own[np.ix_(rest, rest)])
    for number, places in enumerate(nx.find_cliques(graph)):
        if number == limit:
            return replace(best, exact=False)
        if len(places) >= len(best.vertices):
            best = min(best, _clique(vertices[rest[places]], distances), key=lambda clique: clique.order)
    return best


def _clique(vertices: np.ndarray, distances: Tensor) -> Clique:
    own = torch.from_numpy(np.sort(vertices))
    table = distances[own][:, own].double()
    pairs = len(own) * (len(own) - 1)
    return Clique(tuple(own.tolist()), float(table.sum() - table.diagonal().sum()) / pairs)


def tightest(cliques: list[Clique], size: int) -> Clique | None:
    """The clique by which a prompt is ranked: the tightest of at least ``size``, else the largest; None without any."""
    large = [clique for clique in cliques if len(clique.vertices) >= size]
    return min(large, key=lambda clique: (clique.mean_distance, clique.order)) if large else next(iter(cliques), None)
