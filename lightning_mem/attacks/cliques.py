"""Generations that agree with each other: the graph of tiled distances, and its largest cliques."""

from dataclasses import dataclass
from itertools import combinations

import networkx as nx
import torch
from torch import Tensor

from lightning_mem.evaluation import Workers
from lightning_mem.metrics.eidetic import check_tiles
from lightning_mem.metrics.similarities import squared_distances


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
    dim = channels * high * wide

    def compute(rows: Tensor) -> Tensor:
        largest = torch.zeros(len(rows), len(others), dtype=torch.float64, device=workers.device)
        for top in range(0, height, high):
            for left in range(0, width, wide):
                window = (slice(None), slice(top, top + high), slice(left, left + wide))
                own, all_ = (part[:, *window].to(workers.device).flatten(1).double() for part in (images[rows], others))
                torch.maximum(largest, squared_distances(own, all_), out=largest)
        return largest

    return (workers.in_blocks(len(images), compute, label="tiled distances") / dim).sqrt().cpu() / 255


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

    Vertices that cannot be in a clique as large as one found greedily are left out, by their core number; the rest is
    networkx's enumeration of maximal cliques. A component of one vertex has none.

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
    near = (distances <= delta).triu(1).nonzero()
    graph: nx.Graph = nx.Graph(near.tolist())
    found = [_largest(graph.subgraph(part), distances, limit) for part in nx.connected_components(graph)]
    return sorted(found, key=lambda clique: clique.order)


def _largest(component: nx.Graph, distances: Tensor, limit: int) -> Clique:
    cores = nx.core_number(component)
    greedy: list[int] = []
    for vertex in sorted(component, key=lambda v: (-cores[v], v)):
        if all(component.has_edge(vertex, other) for other in greedy):
            greedy.append(vertex)
    rest = component.subgraph([v for v in component if cores[v] >= len(greedy) - 1])
    best = _clique(greedy, distances)
    for number, vertices in enumerate(nx.find_cliques(rest)):
        if number == limit:
            return Clique(best.vertices, best.mean_distance, exact=False)
        if len(vertices) >= len(best.vertices):
            best = min(best, _clique(vertices, distances), key=lambda clique: clique.order)
    return best


def _clique(vertices: list[int], distances: Tensor) -> Clique:
    own = sorted(vertices)
    pairs = torch.tensor(list(combinations(own, 2)))
    return Clique(tuple(own), float(distances[pairs[:, 0], pairs[:, 1]].double().mean()))


def tightest(cliques: list[Clique], size: int) -> Clique | None:
    """The clique by which a prompt is ranked: the tightest of at least ``size``, else the largest; None without any."""
    large = [clique for clique in cliques if len(clique.vertices) >= size]
    return min(large, key=lambda clique: (clique.mean_distance, clique.order)) if large else next(iter(cliques), None)
