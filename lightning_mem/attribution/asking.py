"""Getting queries and asking methods about them: drawn before the training images are read, scored once, kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.data.split import image_digest
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.evaluation.inputs import read_samples
from lightning_mem.records import atomic_write, digest
from lightning_mem.types import SampleSet


def model_queries(samples: SampleSet) -> Queries:
    """Samples of the target as queries."""
    return Queries(samples.images, "model", samples.addresses, samples.labels)


def given_queries(path: str | Path, count: int) -> Queries:
    """The first images of a file, folder or run; see :func:`lightning_mem.evaluation.inputs.read_samples`."""
    samples = read_samples(path)
    labels = None if samples.labels is None else samples.labels[:count]
    return Queries(samples.images[:count], "given", samples.addresses[:count], labels)


def heldout_queries(reference: Reference, count: int) -> Queries:
    """Real images that the target never saw: the held-out images, then others of the source.

    Raises:
        ValueError: If there are fewer than ``count``.
    """
    own = reference.heldout[: len(reference.heldout) // 2] if reference.mirror else reference.heldout
    labels = None if reference.labels is None else reference.labels[1]
    if len(own) >= count:
        rows = torch.arange(count)
        return Queries(own[rows], "heldout", rows, None if labels is None else labels[rows])
    further = reference.fresh(count - len(own)) if reference.fresh is not None else own[:0]
    images = torch.cat([own, further])
    if len(images) < count:
        raise ValueError(
            f"{count} held-out queries were asked for, but there are {len(own)} held-out images and {len(further)} "
            "others that are no training images: ask for fewer, or hold more out (data.num_heldout)"
        )
    if labels is not None:
        raise ValueError(
            f"{count} held-out queries were asked for, but only {len(own)} images with labels are held out: ask for "
            "fewer, or hold more out (data.num_heldout)"
        )
    return Queries(images, "heldout", torch.arange(count))


@dataclass(frozen=True)
class Scores:
    """What a method gave.

    Args:
        values: float64 [Q, N].
        cost: See :meth:`AbstractAttribution.cost`; with ``seconds``.
    """

    values: Tensor
    cost: Mapping[str, float]


def scores_of(method: AbstractAttribution, identity: str, scene: Scene, queries: Queries) -> Scores:
    """Scores of a method, read from ``scores/`` where they were finished before.

    Args:
        method: Which.
        identity: Its own.
        scene: Of the verb.
        queries: What is explained.

    Raises:
        ValueError: If the method gives scores of another shape, or one that is not finite.
    """
    return kept_scores(method.name, identity, lambda: (method.scores(scene, queries), method.cost()), scene, queries)


def kept_scores(
    name: str,
    identity: str,
    compute: Callable[[], tuple[Tensor, Mapping[str, float]]],
    scene: Scene,
    queries: Queries,
) -> Scores:
    """As :func:`scores_of`, of any function that gives scores and their cost."""
    reference = scene.reference()
    said = digest(identity, queries.digest, reference.members_digest)
    file = scene.folder / "scores" / f"{name}-{queries.kind}.npz"
    known = _read(file, said)
    scene.first(lambda: None)  # nobody writes before all have looked
    if known is not None:
        return known
    begun = time.perf_counter()
    values, cost = compute()
    wanted = (len(queries), len(reference.indices))
    if tuple(values.shape) != wanted:
        raise ValueError(f"{name} gave scores {tuple(values.shape)}, not [queries, training images] {wanted}")
    if not torch.isfinite(values).all():
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {values.numel()} scores of {name} are not finite")
    cost = {"seconds": time.perf_counter() - begun, **cost}

    def write() -> None:
        with atomic_write(file, "wb") as out:
            np.savez(
                out, allow_pickle=False, identity=np.array(said), scores=values.numpy(), kinds=np.array(list(cost)),
                costs=np.array(list(cost.values())),
            )  # fmt: skip

    scene.first(write)
    return Scores(values, cost)


def _read(file: Path, identity: str) -> Scores | None:
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        archive = np.load(opened, allow_pickle=False)
        if str(archive["identity"]) != identity:
            return None
        cost = dict(zip(archive["kinds"].tolist(), archive["costs"].tolist(), strict=True))
        return Scores(torch.from_numpy(archive["scores"]), cost)


def member_digests(reference: Reference) -> list[str]:
    """Content digest of every training image, each image once."""
    return [image_digest(image) for image in reference.members[: len(reference.indices)].numpy()]


def check_names(methods: Sequence[AbstractAttribution]) -> None:
    """Refuse methods of one name: their records and files could not be told apart.

    Raises:
        ValueError: If there is no method, or two share a name.
    """
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be at least one and no two of one name, got {names}")
