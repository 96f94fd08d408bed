"""Clusters of generated images in a feature space, the filter that keeps some, and the labels that follow."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mem.randomness import derive_seed
from lightning_mem.records import atomic_write

Rank = Literal["cohesion", "isolation"]
"""Which number orders clusters where only some may stay."""

Dropped = Literal["relabel", "background"]
"""Where images of dropped clusters go: to the nearest kept centroid, or into one class that is never a target."""

CHUNK = 1024


def distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Euclidean distances, float64 [N, K]; from differences, so that equal rows are at distance 0."""
    rows = [
        torch.cdist(part.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for part in features.split(CHUNK)
    ]
    return torch.cat(rows)


def cluster(features: Tensor, num_clusters: int, seed: int = 0, n_init: int = 10) -> tuple[Tensor, Tensor]:
    """K-means of raw features, Euclidean.

    Args:
        features: Floats [N, d].
        num_clusters: K, 2 to N.
        seed: Of the initial centroids.
        n_init: How often it starts anew; the tightest result is taken.

    Returns:
        Cluster of each row, int64 [N], and centroids, float64 [K, d]. With fewer than K different rows some are empty.

    Raises:
        ValueError: If there are fewer rows than clusters, fewer than two clusters, or a feature is not finite.

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1, step 2; Lloyd's algorithm from k-means++ of scikit-learn.
    """
    from sklearn.cluster import KMeans  # a second to import
    from sklearn.exceptions import ConvergenceWarning

    if features.ndim != 2 or not torch.isfinite(features).all():
        raise ValueError(f"features must be finite floats [N, d], got {features.dtype} {tuple(features.shape)}")
    if not 2 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters must lie in [2, {len(features)}] (the generated images), got {num_clusters}: ask for fewer "
            "clusters or draw more images"
        )
    if n_init < 1:
        raise ValueError(f"n_init must be at least 1, got {n_init}")
    state = derive_seed(seed, "k-means") % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters: some stay empty
        found = KMeans(num_clusters, n_init=n_init, random_state=state).fit(features.double().cpu().numpy())
    return torch.from_numpy(found.labels_.astype(np.int64)), torch.from_numpy(found.cluster_centers_)


def cohesion(features: Tensor, assignment: Tensor, centroids: Tensor, centered: bool = False) -> Tensor:
    r"""Mean cosine of a cluster's features with its centroid.

    .. math:: h_k = \frac{1}{|C_k|} \sum_{z \in C_k} \cos(z, \mu_k)

    Args:
        features: Floats [N, d].
        assignment: int64 [N], the cluster of each row.
        centroids: [K, d].
        centered: Subtract the mean of all features from both first. Ours: features that are never negative, such as
            raw pixels, have cosines near 1 whatever they show.

    Returns:
        float64 [K] in [-1, 1]; 0 for an empty cluster, and 0 is the cosine of a vector without length.

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1, step 3.
    """
    rows, means = features.double(), centroids.double()
    if centered:
        shift = rows.mean(0)
        rows, means = rows - shift, means - shift
    cosines = torch.nn.functional.cosine_similarity(rows, means[assignment], dim=1, eps=1e-12)
    sizes = torch.bincount(assignment, minlength=len(centroids))
    return torch.zeros(len(centroids), dtype=torch.float64).index_add_(0, assignment, cosines) / sizes.clamp(min=1)


def isolation(features: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    r"""How empty the neighbourhood of a cluster is.

    .. math:: I_k = \frac{\#\{i : \lVert z_i - \mu_k \rVert \le 1.5\, r_k\}}{\#\{i : \lVert z_i - \mu_k \rVert \le
        3\, r_k\}}, \qquad r_k^2 = \frac{1}{|C_k|} \sum_{z \in C_k} \lVert z - \mu_k \rVert^2

    over *all* generated images. Copies of one training image are a dense ball in empty space: I_k near 1. A cluster cut
    out of a continuum is surrounded by its neighbours: I_k falls as 1/2 to the power of the dimension.

    Args:
        features: Floats [N, d].
        assignment: int64 [N], the cluster of each row.
        centroids: [K, d].

    Returns:
        float64 [K] in [0, 1]; 0 for an empty cluster.

    Undefined when:
        A cluster has one image: r_k is 0 and I_k is 1. Ask for a smallest size beside it.

    Source:
        Ours; beyond SIDE, which filters by cohesion alone.
    """
    every = distances(features, centroids)
    own = every.gather(1, assignment[:, None])[:, 0].square()
    sizes = torch.bincount(assignment, minlength=len(centroids))
    total = torch.zeros(len(centroids), dtype=torch.float64).index_add_(0, assignment, own)
    radius = (total / sizes.clamp(min=1)).sqrt()
    inner, outer = ((every <= factor * radius).sum(0).double() for factor in (1.5, 3.0))
    return torch.where(sizes > 0, inner / outer.clamp(min=1), 0.0)


def keep_clusters(
    cohesion: Tensor,
    isolation: Tensor,
    sizes: Tensor,
    *,
    tau: float | None = 0.5,
    min_size: int = 2,
    keep: int | None = None,
    rank: Rank = "cohesion",
) -> Tensor:
    """Which clusters become targets: cohesive and large enough, and of these, where ``keep`` is given, the best.

    Args:
        cohesion: float64 [K].
        isolation: float64 [K].
        sizes: int64 [K].
        tau: Least cohesion, in [-1, 1]; null for none.
        min_size: Least number of images, at least 1.
        keep: At most this many, at least 2: those that ``rank`` puts first; null for all. Ours: a rule for extractors
            whose cosines have another scale than SSCD's.
        rank: By :func:`cohesion` or :func:`isolation`.

    Returns:
        int64 [K'], ascending.

    Raises:
        ValueError: If a number is out of range, or fewer than two clusters stay; it says how many passed what.

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1, step 3: cohesion of at least tau.
    """
    if tau is not None and not -1 <= tau <= 1:
        raise ValueError(f"tau must lie in [-1, 1], got {tau}")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    if keep is not None and keep < 2:
        raise ValueError(f"keep must be at least 2 (a classifier needs two classes), got {keep}")
    tight = torch.ones_like(sizes, dtype=torch.bool) if tau is None else cohesion >= tau
    large = sizes >= min_size
    kept = (tight & large).nonzero().flatten()
    if len(kept) < 2:
        top = float(cohesion[sizes > 0].max())
        raise ValueError(
            f"{len(kept)} of {len(sizes)} clusters stay, at least 2 must: {int((tight & (sizes > 0)).sum())} have a "
            f"cohesion of at least tau = {tau} (the largest is {top:.3f}), {int(large.sum())} have at least min_size = "
            f"{min_size} images: lower tau or min_size, or draw more images"
        )
    if keep is not None and keep < len(kept):
        score = {"cohesion": cohesion, "isolation": isolation}[rank][kept]
        kept = kept[score.argsort(descending=True, stable=True)[:keep]].sort().values
    return kept


@dataclass(frozen=True)
class Clusters:
    """K clusters and which of them were kept: enough to say of any feature whether it belongs to a target.

    Args:
        centroids: float64 [K, d], those of K-means, dropped ones too.
        kept: int64 [K'], ascending; class k is cluster ``kept[k]``.
    """

    centroids: Tensor
    kept: Tensor

    def original(self, features: Tensor) -> Tensor:
        """Nearest centroid of all K, int64 [N]; the lower one where two are equally near."""
        return distances(features.cpu(), self.centroids).argmin(1)

    def labels(self, features: Tensor, dropped: Dropped) -> Tensor:
        """Class of every image, int64 [N].

        Args:
            features: Floats [N, d].
            dropped: ``relabel`` gives each image to the nearest *kept* centroid, in 0 .. K'-1, as the paper does;
                ``background`` gives images of dropped clusters the class K' (ours).
        """
        features = features.cpu()
        labels = distances(features, self.centroids[self.kept]).argmin(1)
        if dropped == "background":
            labels[~torch.isin(self.original(features), self.kept)] = len(self.kept)
        return labels

    def targets(self, features: Tensor) -> Tensor:
        """Class of images that fall into a kept cluster, -1 for the others; int64 [N]."""
        own = self.original(features)
        place = torch.searchsorted(self.kept, own).clamp(max=len(self.kept) - 1)
        return torch.where(self.kept[place] == own, place, -1)

    def save(self, path: Path) -> None:
        """Write an ``.npz``."""
        with atomic_write(path, "wb") as file:
            np.savez(file, allow_pickle=False, centroids=self.centroids.numpy(), kept=self.kept.numpy())

    @classmethod
    def load(cls, path: Path) -> "Clusters":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(torch.from_numpy(arrays["centroids"]), torch.from_numpy(arrays["kept"]))
