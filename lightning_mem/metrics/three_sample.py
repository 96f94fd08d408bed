"""C_T, a test for data copying: are samples nearer to the training images than held-out images are?"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_mem.metrics.neighbors import Rows, nearest_neighbors
from lightning_mem.metrics.similarities import float64_rows
from lightning_mem.randomness import derive_seed


@dataclass(frozen=True, eq=False)  # tensors have no single answer to ==
class DataCopying:
    """What :func:`data_copying` found.

    Args:
        value: C_T: mean of the cells' scores, weighted by their held-out images. Far below 0: copying; far above:
            samples stay away from the training images (they are of poorer quality, or more varied).
        scores: float64 [cells used], Mann-Whitney's z of each.
        weights: float64 [cells used], their held-out images as fractions that sum to 1.
        left_out: Share of the samples in cells that were not used, in [0, 1].
    """

    value: float
    scores: Tensor
    weights: Tensor
    left_out: float

    @property
    def deviation(self) -> float:
        """Standard deviation of ``value`` where nothing is copied: cells' scores are independent with deviation 1."""
        return self.weights.square().sum().sqrt().item()


def data_copying(
    samples: Rows,
    members: Rows,
    heldout: Rows,
    *,
    cells: int = 1,
    fewest: int = 20,
    seed: int = 0,
    chunk_bytes: int | None = None,
) -> DataCopying:
    r"""Three-sample test for data copying.

    Space is cut into cells around K-means centres of the training images. In each cell, the distances of samples and of
    held-out images to the nearest training image of that cell are compared by Mann-Whitney's statistic,

    .. math:: z = \frac{U - nm/2}{\sqrt{nm(n + m + 1)/12}}, \quad
        U = \#\{(x, y) : d(x) > d(y)\} + \tfrac12 \#\{d(x) = d(y)\}

    over its n samples x and m held-out images y, the deviation corrected for ties.

    Args:
        samples: [N, ...] images or features of samples.
        members: [M, ...] the training images.
        heldout: [H, ...] images of the same source the model never saw.
        cells: K, at least 1; 1 compares everything with everything.
        fewest: A cell with fewer samples, fewer held-out images, or no training image, is left out; at least 2.
        seed: Of the K-means start, drawn at ``(seed, "data-copying")``.
        chunk_bytes: Working memory of a search in bytes. Null: 512 MiB.

    Returns:
        C_T and its parts. A z score: without copying it lies around 0 with :attr:`DataCopying.deviation`.

    Raises:
        ValueError: If a number is outside its range, rows differ in size, or no cell holds enough of each kind.

    Undefined when:
        Held-out images are of another source, or were used to choose the model. It grows with the root of the
        numbers of images: compare at equal numbers.

    Source:
        Meehan, Chaudhuri and Dasgupta, A Non-Parametric Test to Detect Data-Copying in Generative Models,
        arXiv:2004.05675, section 4 (without its continuity correction of a half).
    """
    if fewest < 2:
        raise ValueError(f"fewest must be at least 2, got {fewest}")
    if not 1 <= cells <= len(members):
        raise ValueError(f"cells must lie in 1 .. {len(members)} (the training images), got {cells}")
    places = _cells_of(members, (members, samples, heldout), cells, seed)
    scores, weights, used = [], [], 0
    for cell in range(cells):
        chosen = [place == cell for place in places]
        inside, n, m = (int(mask.sum()) for mask in chosen)
        if inside == 0 or min(n, m) < fewest:
            continue
        bank, *sides = (_rows(rows, mask) for rows, mask in zip((members, samples, heldout), chosen, strict=True))
        near = [nearest_neighbors(rows, bank, 1, chunk_bytes=chunk_bytes)[0][:, 0].cpu().numpy() for rows in sides]
        scores.append(mann_whitney_z(near[0], near[1]))
        weights.append(float(m))
        used += n
    if not scores:
        raise ValueError(
            f"no cell holds {fewest} samples and {fewest} held-out images ({len(samples)} and {len(heldout)} given, "
            f"{cells} cells): take fewer cells or more images"
        )
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    z = torch.tensor(scores, dtype=torch.float64)
    return DataCopying(float(share @ z), z, share, 1 - used / len(samples))


def mann_whitney_z(first: np.ndarray, second: np.ndarray) -> float:
    """Mann-Whitney's z of two sets of numbers: positive where the first are larger; 0 where all are equal."""
    from scipy.stats import rankdata  # half a second to import; needed nowhere else

    n, m = len(first), len(second)
    total = n + m
    both = np.concatenate([first, second])
    u = float(rankdata(both)[:n].sum()) - n * (n + 1) / 2
    _, ties = np.unique(both, return_counts=True)
    correction = float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1))
    deviation = math.sqrt(max(0.0, n * m / 12 * (total + 1 - correction)))
    return 0.0 if deviation == 0 else (u - n * m / 2) / deviation


def _cells_of(members: Rows, sides: tuple[Rows, ...], cells: int, seed: int) -> list[np.ndarray]:
    """Number of each row's cell, for all sides."""
    if cells == 1:
        return [np.zeros(len(rows), dtype=np.int64) for rows in sides]
    from sklearn.cluster import KMeans  # a second to import

    def flat(rows: Rows) -> np.ndarray:
        return float64_rows("images", rows, slice(0, len(rows)), torch.device("cpu")).numpy()

    state = derive_seed(seed, "data-copying") % 2**32
    means = KMeans(cells, n_init=10, random_state=state).fit(flat(members))
    return [means.predict(flat(rows)) for rows in sides]


def _rows(rows: Rows, mask: np.ndarray) -> Rows:
    return rows[torch.from_numpy(mask).to(rows.device)] if isinstance(rows, Tensor) else rows[mask]
