"""Baselines that look at images only: the nearest training image, in pixels or in features of a frozen network."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.metrics import AbstractExtractor, build_extractor, extract_features
from lightning_mem.records import digest
from lightning_mem.types import to_float


class PixelSimilarity(AbstractAttribution):
    r"""How near each training image lies to a query in pixels.

    ``l2``: :math:`-|x - x_i| / \sqrt{d}` on [0, 1], the negative RMS-L2 distance; ``cosine``: of the pixels in [-1, 1].
    Where training flips, the nearer orientation counts. Knows nothing of the model.

    Args:
        measure: ``l2`` or ``cosine``.

    Raises:
        ValueError: If the measure is unknown, or queries are of another size.

    Undefined when:
        An image is all 0 in [-1, 1] (cosine): its similarity to everything is then 0.
    """

    def __init__(self, measure: Literal["l2", "cosine"] = "l2") -> None:
        if measure not in ("l2", "cosine"):
            raise ValueError(f"measure must be l2 or cosine, got {measure!r}")
        self.measure = measure
        self.name = f"pixels_{measure}"

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Of the measure; see :class:`AbstractAttribution`."""
        return digest(self.name)

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """See :class:`AbstractAttribution`; one column an image, whichever way round training saw it."""
        queries.fitting(scene.reference().members.shape[1:])

        def look(images: Tensor) -> Tensor:
            rows = images.to(scene.workers.device).flatten(1)
            return rows.double() if self.measure == "l2" else to_float(rows).double()

        return _dealt(scene, queries, look, negative_rms if self.measure == "l2" else cosine)


class FeatureSimilarity(AbstractAttribution):
    r"""How alike each training image and a query are to a frozen network: the cosine of their features.

    Where training flips, the more similar orientation counts. Knows nothing of the model.

    Args:
        extractor: ``inception``, ``sscd``, ``timm/<model>`` ...; see :func:`lightning_mem.metrics.build_extractor`.
        weights: Its local weight file, where it needs one.

    Raises:
        ValueError: If the extractor is unknown, or queries are of another size.

    Source:
        The baseline CLIP similarity of Zheng et al., arXiv:2311.00500, section 4, with any extractor.
    """

    def __init__(self, extractor: str = "inception", weights: str | None = None) -> None:
        self.extractor, self.weights = extractor, weights
        self.name = f"features_{extractor.replace('/', '_')}"
        self._built: AbstractExtractor | None = None

    def _network(self, device: torch.device | str) -> AbstractExtractor:
        if self._built is None or self._built.device != torch.device(device):
            self._built = build_extractor(self.extractor, self.weights, device)
        return self._built

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Of the extractor's weights; see :class:`AbstractAttribution`."""
        return digest(self.name, self._network("cpu").digest)

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """See :class:`AbstractAttribution`; one column an image, whichever way round training saw it."""
        queries.fitting(scene.reference().members.shape[1:])
        network = self._network(scene.workers.device)
        return _dealt(scene, queries, lambda images: extract_features(images, network).double(), cosine)


def negative_rms(queries: Tensor, rows: Tensor) -> Tensor:
    """Negative RMS-L2 on [0, 1] of pixels 0 .. 255 held in float64, whose products are exact; [Q, N]."""
    squares = queries.square().sum(1)[:, None] + rows.square().sum(1) - 2 * queries @ rows.T
    return -(squares.clamp(min=0) / queries.shape[1]).sqrt() / 255


def cosine(queries: Tensor, rows: Tensor) -> Tensor:
    """Cosines [Q, N]; 0 for rows of zeros."""
    left, right = (side / side.norm(dim=1, keepdim=True).clamp_min(1e-300) for side in (queries, rows))
    return left @ right.T


def _dealt(
    scene: Scene, queries: Queries, look: Callable[[Tensor], Tensor], compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Similarities float64 [Q, N], training images dealt out to processes in blocks of one shape."""
    reference = scene.reference()
    asked = look(queries.images)

    def block(rows: Tensor) -> Tensor:
        return compare(asked, look(reference.members[rows])).T

    found = scene.workers.in_blocks(len(reference.members), block, label="similarities").cpu()  # [M, Q]
    best = torch.full((len(reference.indices), len(queries)), -torch.inf, dtype=torch.float64)
    return best.scatter_reduce(0, reference.owners[:, None].expand_as(found), found, "amax").T.contiguous()
