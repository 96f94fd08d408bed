"""Memorization: samples that lie much closer to one training image than to the others."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mem.metrics.intervals import wilson_interval
from lightning_mem.metrics.neighbors import Rows, check_images, duplicate_groups, nearest_neighbors


def memorized(distances: Rows, threshold: float = 1 / 3) -> Tensor:
    r"""Whether each sample is a replica: its nearest training image is much nearer than the second.

    .. math:: d_1 / d_2 < \text{threshold}

    decided in float64. Distances narrower than float64 carry rounding of their own: a ratio that this rounding cannot
    tell from the threshold equals it, so it is not below.

    Args:
        distances: [N, >= 2] distances to the nearest training images, ascending, on any scale.
        threshold: In (0, 1). The literature uses 1/3.

    Returns:
        bool [N].

    Raises:
        ValueError: If the threshold is outside (0, 1), there are no rows, fewer than two distances, rows that do not
            ascend, values that are not finite or negative, or a second distance of 0.

    Undefined when:
        Two training images are (nearly) equal: then d1 ~ d2 for a perfect copy and the rule misses it. Pass
        ``groups`` to :func:`nearest_neighbors`.

    Source:
        Gu et al., On Memorization in Diffusion Models, arXiv:2310.02664.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    given = torch.as_tensor(distances)
    rows = _checked_distances(given)
    if (rows[:, 1] == 0).any():
        row = int((rows[:, 1] == 0).nonzero()[0, 0])
        raise ValueError(
            f"row {row} has a second nearest distance of 0: the bank holds duplicates; "
            "search with groups=duplicate_groups(bank), so that they count once"
        )
    rounding = 2 * torch.finfo(given.dtype).eps if given.dtype != torch.float64 else 0.0
    return rows[:, 0] / rows[:, 1] < threshold * (1 - rounding)


def memorization_ratio(distances: Rows, threshold: float = 1 / 3) -> float:
    """Share of samples whose nearest training image is much nearer than the second (:func:`memorized`).

    Args:
        distances: [N, >= 2] distances to the nearest training images, ascending, on any scale.
        threshold: In (0, 1). The literature uses 1/3.

    Returns:
        A fraction in [0, 1]; smaller means less copying. :func:`wilson_interval` gives its interval.

    Raises:
        ValueError: As :func:`memorized`.

    Undefined when:
        The bank holds duplicates that were not grouped.

    Source:
        Gu et al., On Memorization in Diffusion Models, arXiv:2310.02664.

    Example:
        >>> memorization_ratio(torch.tensor([[0.0, 1.0], [1.0, 3.0], [1.0, 1.0], [1.0, 4.0]]))
        0.5
    """
    return memorized(distances, threshold).double().mean().item()


def normalized_l2(distances: Rows, alpha: float = 0.5) -> Tensor:
    r"""Adaptive distance: the nearest distance, relative to the neighbourhood it lies in.

    .. math:: \ell = \frac{d_1}{\alpha \, \frac{1}{k} \sum_{j=1}^{k} d_j}

    over the k nearest training images of the *generation*, the nearest included.

    Args:
        distances: [N, k >= 2] distances to the k nearest training images, ascending. The literature uses k = 50.
        alpha: Positive. The literature uses 0.5.

    Returns:
        float64 [N] in [0, 1 / alpha]; 1 / alpha where all k are equally far, 0 for an exact copy.

    Raises:
        ValueError: If alpha is not positive, the distances are malformed, or all k of a row are 0.

    Undefined when:
        The bank is small: the mean over k neighbours depends on how many images there are.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 5.1.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    rows = _checked_distances(torch.as_tensor(distances))
    mean = rows.mean(dim=1)
    if (mean == 0).any():
        raise ValueError(
            f"row {int((mean == 0).nonzero()[0, 0])} has {rows.shape[1]} neighbours at distance 0: the bank holds "
            "duplicates; search with groups=duplicate_groups(bank), so that they count once"
        )
    return rows[:, 0] / (alpha * mean)


def _checked_distances(distances: Tensor) -> Tensor:
    if distances.ndim != 2 or distances.shape[0] < 1 or distances.shape[1] < 2 or not distances.is_floating_point():
        raise ValueError(
            "distances must be floats [N >= 1, k >= 2], the nearest first, got "
            f"{distances.dtype} {tuple(distances.shape)}: nearest_neighbors(samples, bank, k=2) gives them"
        )
    rows = distances.detach().double()
    if not torch.isfinite(rows).all():
        row = int((~torch.isfinite(rows)).nonzero()[0, 0])
        raise ValueError(f"row {row} holds a distance that is not finite: draw that sample again, do not drop it")
    if (rows < 0).any() or (rows.diff(dim=1) < 0).any():
        row = int(((rows < 0).any(1) | (rows.diff(dim=1) < 0).any(1)).nonzero()[0, 0])
        raise ValueError(f"row {row} must hold ascending distances >= 0, got {rows[row, :4].tolist()}")
    return rows


class ShareNearBank(Metric):
    """Share of images that a rule on their nearest bank images picks out; integer counts, so exact under DDP.

    The bank is a plain attribute: neither parameter, buffer nor state, so no checkpoint holds a training image.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self, bank: Rows, groups: Rows | None, mirror: bool, chunk_bytes: int | None) -> None:
        super().__init__()
        check_images("bank", bank)
        if groups is not None and mirror:
            raise ValueError("groups and mirror=True were both given: put mirror images into the groups, or leave them")
        self.bank = bank
        self.groups = duplicate_groups(bank, mirror=mirror) if groups is None else torch.as_tensor(groups)
        if self.groups.shape != (len(bank),):
            raise ValueError(f"groups must be int64 [{len(bank)}], one per bank row, got {tuple(self.groups.shape)}")
        self.num_groups = len(self.groups.unique())
        if self.num_groups < 2:
            raise ValueError(f"bank must hold at least two distinct images, got {self.num_groups} among {len(bank)}")
        self.chunk_bytes = chunk_bytes
        for name in ("hits", "total"):
            self.add_state(name, default=torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def _neighbors(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_images("images", images)
        if tuple(images.shape[1:]) != tuple(self.bank.shape[1:]):
            raise ValueError(
                f"images must have the bank's shape {tuple(self.bank.shape[1:])}, got {tuple(images.shape[1:])}"
            )
        return nearest_neighbors(images, self.bank, k, groups=self.groups, chunk_bytes=self.chunk_bytes)

    def _count(self, hit: Tensor) -> None:
        self.hits += hit.sum().to(self.hits.device)
        self.total += len(hit)

    def compute(self) -> Tensor:
        """The share, a float64 scalar in [0, 1].

        Raises:
            ValueError: If no image was given.
        """
        if self.total == 0:
            raise ValueError(f"{type(self).__name__} has seen 0 images: call update before compute")
        return self.hits.double() / self.total

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the share, over all processes (each must call it)."""
        with self.sync_context():
            return wilson_interval(int(self.hits), int(self.total), level)


class MemorizationRatio(ShareNearBank):
    """Share of images that are replicas of a bank image (:func:`memorization_ratio`).

    Lower is better; bounds 0 and 1; from one image on.

    Args:
        bank: uint8 [N, C, H, W] images to compare with; tensor or (memory-mapped) array. On the images' device it
            need not travel at every update.
        groups: int64 [N]; images of one group count once. Null: exact duplicates form groups.
        threshold: In (0, 1). The literature uses 1/3.
        mirror: Whether mirror images form groups too, where ``groups`` is null.
        chunk_bytes: Working memory of a search in bytes. Null: 512 MiB.
    """

    def __init__(
        self,
        bank: Rows,
        groups: Rows | None = None,
        threshold: float = 1 / 3,
        *,
        mirror: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        super().__init__(bank, groups, mirror, chunk_bytes)
        self.threshold = threshold

    def update(self, images: Tensor) -> None:
        """Count the replicas among uint8 images [B, C, H, W]."""
        self._count(memorized(self._neighbors(images, 2)[0], self.threshold))


class NormalizedL2(ShareNearBank):
    """Share of images whose adaptive distance to the bank is below a cut (:func:`normalized_l2`).

    Lower is better; bounds 0 and 1; from one image on. It depends on the size of the bank: compare banks of equal size.

    Args:
        bank: uint8 [N, C, H, W] images to compare with; tensor or (memory-mapped) array.
        k: Neighbours in the mean; ``self.k`` is the smaller of this and the number of groups.
        alpha: Positive. The literature uses 0.5.
        cut: An image counts where its adaptive distance is below it; in (0, 1 / alpha). 1.0 and 1.4 are in use.
        groups: int64 [N]; images of one group count once. Null: exact duplicates form groups.
        mirror: Whether mirror images form groups too, where ``groups`` is null.
        chunk_bytes: Working memory of a search in bytes. Null: 512 MiB.
    """

    def __init__(
        self,
        bank: Rows,
        k: int = 50,
        alpha: float = 0.5,
        cut: float = 1.0,
        *,
        groups: Rows | None = None,
        mirror: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        if k < 2:
            raise ValueError(f"k must be at least 2, got {k}")
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        if not 0 < cut < 1 / alpha:
            raise ValueError(f"cut must lie in (0, {1 / alpha:g}), the range of the adaptive distance, got {cut}")
        super().__init__(bank, groups, mirror, chunk_bytes)
        self.k = min(k, self.num_groups)
        self.alpha = alpha
        self.cut = cut

    def update(self, images: Tensor) -> None:
        """Count the uint8 images [B, C, H, W] below the cut."""
        self._count(normalized_l2(self._neighbors(images, self.k)[0], self.alpha) < self.cut)
