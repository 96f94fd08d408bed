"""Authenticity: is a sample farther from its nearest training image than that image is from its own neighbours?"""

import torch
from torch import Tensor

from lightning_mem.metrics.memorization import ShareNearBank
from lightning_mem.metrics.neighbors import Rows, nearest_neighbors


def authentic(distances: Rows, indices: Rows, own_nearest: Rows) -> Tensor:
    r"""Whether each sample is authentic, that is not nearer to a training image than the data itself is.

    .. math:: d(x, y^*) > d(y^*, y^{**})

    with :math:`y^*` the training image nearest to the sample and :math:`y^{**}` the training image nearest to that one.

    Args:
        distances: [N] of each sample to its nearest training image.
        indices: int64 [N], which one that is.
        own_nearest: [M] distance of each training image to its nearest other one; the second column of
            ``nearest_neighbors(bank, bank, 2)``.

    Returns:
        bool [N]; equal distances are not authentic.

    Raises:
        ValueError: If there is no sample, numbers differ, a distance is negative or not finite, or an index names no
            training image.

    Undefined when:
        Training images have duplicates: then :math:`d(y^*, y^{**}) = 0` and every inexact copy counts as authentic.
        Search with groups.

    Source:
        Alaa et al., How Faithful is your Synthetic Data?, arXiv:2102.08921, section 4.3 (AuthPct, as a fraction).
    """
    nearest, own = torch.as_tensor(distances).detach(), torch.as_tensor(own_nearest).detach()
    index = torch.as_tensor(indices)
    for name, values in (("distances", nearest), ("own_nearest", own)):
        if values.ndim != 1 or len(values) == 0 or not values.is_floating_point():
            raise ValueError(f"{name} must be floats [N >= 1], got {values.dtype} {tuple(values.shape)}")
        wrong = ~((values >= 0) & torch.isfinite(values))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"{name} row {row} is {float(values[row])}: a distance is finite and at least 0")
    if index.shape != nearest.shape or index.is_floating_point() or index.min() < 0 or index.max() >= len(own):
        raise ValueError(
            f"indices must be int64 [{len(nearest)}] in 0 .. {len(own) - 1}, got {index.dtype} {tuple(index.shape)}"
        )
    return nearest > own.to(nearest.device)[index.to(nearest.device)]


def authenticity(samples: Rows, bank: Rows, *, groups: Rows | None = None, chunk_bytes: int | None = None) -> float:
    """Share of samples that are authentic (:func:`authentic`); 1 minus it is the share of copies by this rule.

    Args:
        samples: [N, ...] images or features.
        bank: [M, ...] training images or features, M >= 2.
        groups: int64 [M]; training images of one group (duplicates) are no neighbours of each other. Null: all are.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Returns:
        A fraction in [0, 1], higher is better; :func:`wilson_interval` gives its interval.

    Raises:
        ValueError: As :func:`nearest_neighbors`, or with fewer than two training images or groups.

    Undefined when:
        It is read alone: unseen images of the same source are authentic about half of the time, not always. Compare
        with the value of held-out images, at a bank of the same size.

    Source:
        Alaa et al., How Faithful is your Synthetic Data?, arXiv:2102.08921, section 4.3.

    Example:
        >>> bank = torch.tensor([[0.0], [1.0], [2.0]])
        >>> authenticity(torch.tensor([[0.1], [5.0]]), bank)
        0.5
    """
    own = own_nearest_distances(bank, groups=groups, chunk_bytes=chunk_bytes)
    distances, indices = nearest_neighbors(samples, bank, 1, groups=groups, chunk_bytes=chunk_bytes)
    return authentic(distances[:, 0], indices[:, 0], own).double().mean().item()


def own_nearest_distances(bank: Rows, *, groups: Rows | None = None, chunk_bytes: int | None = None) -> Tensor:
    """Distance of each training image to the nearest one of another group, float32 [M].

    Raises:
        ValueError: If there are fewer than two training images or groups.
    """
    number = len(bank) if groups is None else len(torch.as_tensor(groups).unique())
    if number < 2:
        raise ValueError(f"bank must hold at least two distinct images, got {number} among {len(bank)}")
    return nearest_neighbors(bank, bank, 2, groups=groups, chunk_bytes=chunk_bytes)[0][:, 1]  # its own group is first


class Authenticity(ShareNearBank):
    """Share of authentic images (:func:`authenticity`).

    Higher is better; bounds 0 and 1; from one image on. Compare with held-out images and banks of one size.

    Args:
        bank: uint8 [N, C, H, W] training images; tensor or (memory-mapped) array.
        groups: int64 [N]; images of one group are no neighbours of each other. Null: exact duplicates form groups.
        mirror: Whether mirror images form groups too, where ``groups`` is null.
        chunk_bytes: Working memory of a search in bytes. Null: 512 MiB.
    """

    higher_is_better = True

    def __init__(
        self, bank: Rows, groups: Rows | None = None, *, mirror: bool = False, chunk_bytes: int | None = None
    ) -> None:
        super().__init__(bank, groups, mirror, chunk_bytes)
        self.own_nearest = own_nearest_distances(bank, groups=self.groups, chunk_bytes=chunk_bytes)

    def update(self, images: Tensor) -> None:
        """Count the authentic ones among uint8 images [B, C, H, W]."""
        distances, indices = self._neighbors(images, 1)
        self._count(authentic(distances[:, 0], indices[:, 0], self.own_nearest))
