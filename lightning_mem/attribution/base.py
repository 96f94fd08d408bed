"""What attributions share: the images that are explained, and what a method gives for them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.evaluation.table import records_table
from lightning_mem.records import Record, digest

QueryKind = Literal["model", "heldout", "ensemble", "given"]
"""``model``: drawn by the target; ``heldout``: real images it never saw; ``ensemble``: drawn by an ensemble whose
members saw parts of the training set; ``given``: read from a file."""


@dataclass(frozen=True)
class Queries:
    """Images to be explained.

    Args:
        images: uint8 [Q, C, H, W], pixels.
        kind: Where they come from; see :data:`QueryKind`.
        addresses: int64 [Q]: sample numbers, or rows of what they were read from.
        labels: int64 [Q]: what each was drawn under, or its own label; null where there are none. A class-conditional
            target needs them.

    Raises:
        ValueError: If the images are no uint8 stack with at least one image, addresses or labels are not one per
            image, or the kind is unknown.
    """

    images: Tensor
    kind: QueryKind
    addresses: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or len(self.images) < 1:
            raise ValueError(
                f"queries must be uint8 [Q, C, H, W] with Q >= 1, got {self.images.dtype} {tuple(self.images.shape)}"
            )
        for name, rows in (("addresses", self.addresses), ("labels", self.labels)):
            if rows is not None and rows.shape != (len(self.images),):
                raise ValueError(f"{name} must have one entry per query ({len(self.images)}), got {tuple(rows.shape)}")
        if self.kind not in get_args(QueryKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(QueryKind))}, got {self.kind!r}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Digest of images and kind."""
        return digest(self.images, self.kind)

    def fitting(self, shape: tuple[int, ...]) -> "Queries":
        """Themselves, where they have this size.

        Args:
            shape: (C, H, W) of the training images.

        Raises:
            ValueError: If they are of another size.
        """
        if tuple(self.images.shape[1:]) != tuple(shape):
            raise ValueError(
                f"queries are {tuple(self.images.shape[1:])} (C, H, W), but the training images are {tuple(shape)}: "
                "give queries of the model's own size"
            )
        return self


class AbstractAttribution(ABC):
    """A method of attribution: how much each training image helps each query.

    Attributes:
        name: Short, as in the logged keys ``attribution/<name>/...``; methods that are scored together differ in it.
    """

    name: str

    @abstractmethod
    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of everything but the images that decides the scores: target, settings, seeds.

        Scores that are kept on disk are found again by it.

        Args:
            target: What made the queries, or is asked about them.
            path: Where it came from: a checkpoint or a diffusers folder.
            home: Its run folder.

        Raises:
            ValueError: If the method does not fit the target; before anything is drawn or computed.
        """

    @abstractmethod
    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """The ``attribution_score`` of every training image for every query, larger = helps the query.

        Equal on every process, and for every number of them.

        Args:
            scene: Of the verb; ``scene.reference()`` has the training images, ``scene.workers`` deals out.
            queries: What is explained.

        Returns:
            float64 [Q, N], one column an image, in the order of ``scene.reference().indices``; where training flips,
            both orientations are one image.

        Raises:
            ValueError: If the queries do not fit the method, or a score is not finite.
        """

    def cost(self) -> Mapping[str, float]:
        """What :meth:`scores` took, once it has run: ``trainings``, ``gradients``, ``bytes`` ..., whatever applies.

        ``seconds`` are measured by the caller where the method names none.
        """
        return {}


class AbstractExplanation(ABC):
    """What the verb ``attribute`` does with a target: it draws what is to be explained, then asks methods.

    Attributes:
        name: Short; names the folder of the results.
    """

    name: str

    @abstractmethod
    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of everything that decides the result; names the folder of the results.

        Args:
            target: The model.
            path: Where it came from: a checkpoint or a diffusers folder.
            home: Its run folder.

        Raises:
            ValueError: If something that was given does not fit the target; before anything is drawn.
        """

    @abstractmethod
    def run(self, scene: Scene) -> list[Record]:
        """Explain; every process gets the records.

        Tables and pictures go into ``scene.folder``; the records are written by the caller.
        """

    def table(self, records: Sequence[Record]) -> Table:
        """The records on the screen."""
        return records_table(records, self.name)
