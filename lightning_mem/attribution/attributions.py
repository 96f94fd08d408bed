"""The verb's main use: for some images, the training images that made them, by several methods, side by side."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lightning_mem.attribution.asking import (
    Scores,
    check_names,
    given_queries,
    heldout_queries,
    model_queries,
    scores_of,
)
from lightning_mem.attribution.attributions_report import Explained, explained_table, write_explained
from lightning_mem.attribution.base import AbstractAttribution, AbstractExplanation, Queries, QueryKind
from lightning_mem.attribution.ensemble_ablation import EnsembleAblation
from lightning_mem.attribution.similarity import PixelSimilarity
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target, sample
from lightning_mem.evaluation import Banks, Reference, Scene
from lightning_mem.metrics import memorized
from lightning_mem.records import Record, digest


@dataclass(frozen=True)
class QueryOptions:
    """Which images are explained.

    Args:
        kind: ``model``: samples of the target; ``heldout``: real images it never saw; ``ensemble``: samples of the
            ensemble that a method of the list leaves out members of; ``given``: images of ``path``.
        num: How many, at least 1; of ``given`` ones the first so many.
        path: File, folder or run folder of ``given`` images, of the training images' size.
        num_steps: Sampler steps of ``model``; an ensemble's are its method's.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        seed: Of the draw; null takes ``seed_everything``.

    Raises:
        ValueError: If a number is out of range, or there is a path without the kind ``given`` or the other way round.
    """

    kind: QueryKind = "model"
    num: int = 64
    path: str | None = None
    num_steps: int = 25
    sampler: Sampler = "ddim"
    eta: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"queries.num must be at least 1, got {self.num}")
        if (self.path is None) == (self.kind == "given"):
            raise ValueError(
                f"queries.path names the images of the kind given, and of no other, got {self.path} and {self.kind}"
            )


class Attributions(AbstractExplanation):
    """Which training images made these images? Each method's first ones, beside the nearest neighbours.

    ``images/attribution.png`` shows queries, their nearest training images and each method's first; rows of
    ``tables/attribution.csv`` are a query's first images by a method, with what the run's ledger says of them;
    ``tables/attribution_images.csv`` has a row for every training image: how often each method puts it first, and its
    mean score; ``scores.npz`` holds all scores. Planted truth: a query that is a copy by the 1/3 rule must name what it
    copies. Records of every method: ``attribution/<name>/source_first`` and ``/source_first_five``, shares of the
    copies whose nearest training image is put first, or among the first five, ``/source_rank``, its median rank, and
    what it cost (``/seconds``, ``/gradients``, ...; seconds are of what was still to do: gradients that methods share
    are taken by the first of them). Images equal pixel for pixel count as one; who ties with the
    source is put before it.

    Args:
        methods: By class_path; names differ.
        queries: Which images are explained; null for 64 samples of the target.
        top: Training images told of each query and method, at least 1.
        pictures: Queries in the picture, copies first; 0 for no picture.
        threshold: Of the copying rule, in (0, 1).

    Raises:
        ValueError: If a number is out of range, two methods share a name, or queries of an ensemble are asked for
            without a method that has one.

    Source:
        The rule: Yoon et al. (2023); planted truth by it is ours.
    """

    name = "attributions"

    def __init__(
        self,
        methods: list[AbstractAttribution],
        queries: QueryOptions | None = None,
        top: int = 5,
        pictures: int = 9,
        threshold: float = 1 / 3,
    ) -> None:
        check_names(methods)
        for word, least, given in (("top", 1, top), ("pictures", 0, pictures)):
            if given < least:
                raise ValueError(f"{word} must be at least {least}, got {given}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.methods, self.top, self.pictures, self.threshold = methods, top, pictures, threshold
        self.queries = QueryOptions() if queries is None else queries
        seed = self.queries.seed
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        ensembles = [method for method in methods if isinstance(method, EnsembleAblation)]
        if self.queries.kind == "ensemble" and not ensembles:
            raise ValueError(
                "queries of kind ensemble are drawn by the ensemble of a method: name "
                "lightning_mem.attribution.EnsembleAblation among the methods"
            )
        self._ensemble = ensembles[0] if ensembles else None
        self._identities: dict[str, str] = {}
        self._given: Queries | None = None

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, methods, queries and settings; see :class:`AbstractExplanation`."""
        self._identities = {method.name: method.identity(target, path, home) for method in self.methods}
        asked: Any = {**asdict(self.queries), "seed": self.seed}
        if self.queries.path is not None:
            self._given = given_queries(self.queries.path, self.queries.num).fitting(
                target.codec.pixel_shape(target.shape)
            )
            asked = self._given.digest
        return digest(target.digest, self._identities, asked, self.top, self.pictures, self.threshold)

    def run(self, scene: Scene) -> list[Record]:
        """Queries, then the scores of every method; see :class:`AbstractExplanation`."""
        queries = self._drawn(scene)
        reference = scene.reference()
        if queries is None:
            queries = heldout_queries(reference, self.queries.num)
        queries.fitting(tuple(reference.members.shape[1:]))
        found = self._explained(scene, queries, reference)
        records = [
            scene.record("attribution/", number, seed=self.seed, data_digest=reference.members_digest)
            for number in found.numbers()
        ]
        scene.first(lambda: write_explained(scene, found, self.top, self.pictures))
        return records

    def _drawn(self, scene: Scene) -> Queries | None:
        """Queries that need no training image; null for held-out ones."""
        asked = self.queries
        if asked.kind == "given":
            return self._given
        if asked.kind == "model":
            options: dict[str, Any] = {"num_steps": asked.num_steps, "sampler": asked.sampler, "eta": asked.eta}
            return model_queries(scene.draw("queries", asked.num, seed=self.seed, **options))
        if asked.kind == "ensemble" and self._ensemble is not None:
            whole, drawing = self._ensemble.ensemble.target(), self._ensemble.drawing

            def draw(rows: Tensor) -> Tensor:
                return sample(whole, rows, block=BLOCK, **drawing)

            images = scene.workers.in_blocks(asked.num, draw, label="samples of the ensemble")
            return Queries(images.cpu(), "ensemble", torch.arange(asked.num))
        return None

    def _explained(self, scene: Scene, queries: Queries, reference: Reference) -> Explained:
        scores: dict[str, Scores] = {}
        hidden = None if scene.workers.rank == 0 else True
        for method in tqdm(self.methods, "methods", leave=False, disable=hidden):
            scores[method.name] = scores_of(method, self._identities[method.name], scene, queries)
        banks = Banks(reference, [], scene.workers)
        distances, rows = banks.search(queries.images, "members", 2)
        if distances.shape[1] < 2:
            raise ValueError("the copying rule needs two different training images, got one")
        groups = torch.empty_like(reference.indices)
        groups[reference.owners.flip(0)] = banks.groups["members"].flip(0)  # an image's own orientation comes first
        return Explained(
            queries=queries,
            reference=reference,
            scores=scores,
            about={method.name: about(method) for method in self.methods},
            rms=-PixelSimilarity().scores(scene, queries),
            groups=groups,
            source=reference.owners[rows[:, 0]],
            copied=memorized(distances, self.threshold),
            ratio=distances[:, 0] / distances[:, 1],
            definition={"threshold": self.threshold, **banks.describe("members")},
        )

    def table(self, records: Sequence[Record]) -> Table:
        """One row a method."""
        return explained_table(records)


def about(method: AbstractAttribution) -> Mapping[str, Any]:
    """What the definition of a method's numbers says of its score: the method's name, or the word it was set to."""
    return {"score": str(getattr(method, "score", method.name))}
