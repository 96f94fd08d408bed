"""Projected gradients of training images, held-out images and queries, kept on disk for every method that asks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attribution.base import Queries
from lightning_mem.attribution.gradients import OUTPUTS, ImageGradients, OutputName, spaced_timesteps
from lightning_mem.attribution.projection import ProjectionKind, RandomProjection, check_projection
from lightning_mem.attribution.store import FeatureStore
from lightning_mem.data.split import image_digest
from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation import Scene
from lightning_mem.records import digest


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are taken, projected and kept.

    Args:
        num_timesteps: Uniformly spaced timesteps that an image's gradient is averaged over; 100 in the papers, 10 as
            their cheap setting.
        num_draws: Draws of noise a timestep.
        dimensions: Of the random projection, a power of two with ``signs``; null keeps gradients whole, which a store
            of small networks may bear (4 bytes a weight and image).
        projection: ``signs`` (fast) or ``normal`` (the papers', far slower on a CPU); equally good.
        shared_noise: One noise for all images (far better at naming sources); else each its own.
        seed: Of noise and projection.
        images_at_once: Images whose gradients are held at a time, each as large as the network; also of a file.
        calls_at_once: Noised images that are differentiated together.
        store: Folder where features are kept for several runs; null keeps them in the folder of the results. Features
            of another model, other images or settings are refused.

    Raises:
        ValueError: If a number is out of range.
    """

    num_timesteps: int = 10
    num_draws: int = 1
    dimensions: int | None = 4096
    projection: ProjectionKind = "signs"
    shared_noise: bool = True
    seed: int = 0
    images_at_once: int = 64
    calls_at_once: int = 128
    store: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_timesteps", "num_draws", "images_at_once", "calls_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dimensions is not None:
            check_projection(self.dimensions, self.projection)

    def settings(self) -> dict[str, Any]:
        """What decides the features, flat."""
        return {key: value for key, value in asdict(self).items() if key != "store"}

    def check(self, target: Target) -> None:
        """Refuse a target whose gradients cannot be taken so.

        Raises:
            ValueError: If it has no network, or fewer timesteps than are asked for.
        """
        network = network_of(target.denoiser)
        if network is None or not any(True for _ in network.parameters()):
            raise ValueError("gradients need a target with a network: a closed form has no parameters")
        spaced_timesteps(self.num_timesteps, target.process.num_timesteps)


class GradientFeatures:
    """The features of one target under one output, in stores below ``<store>/<output>-<digest of the settings>/``.

    Args:
        scene: Of the verb: reads the images, deals out blocks.
        target: Whose gradients: the scene's, or another checkpoint of its run.
        options: See there.
        output: What is differentiated.
        unit: Divide the gradient of each timestep by its norm.
        place: Folder between the store and its features, for checkpoints beside the target.
    """

    def __init__(
        self,
        scene: Scene,
        target: Target,
        options: GradientOptions,
        output: OutputName = "loss",
        unit: bool = False,
        place: str = "",
    ) -> None:
        self.scene, self.options = scene, options
        self.gradients = ImageGradients(
            target, OUTPUTS[output], options.num_timesteps, options.num_draws, unit, options.shared_noise,
            options.seed, options.calls_at_once, scene.workers.device,
        )  # fmt: skip
        self.settings = {"output": output, "unit": unit, "target": target.digest, **options.settings()}
        self.count = 0
        """Gradients of the network that the features so far take."""
        self.nbytes = 0
        """Bytes that they take on disk."""
        own = digest({key: value for key, value in self.settings.items() if key != "target"})[:8]
        root = Path(options.store) if options.store is not None else scene.folder / "features"
        self.folder = root / place / f"{output}{'-unit' if unit else ''}-{own}"
        self._memory: Tensor | None = None
        self.project: RandomProjection | None = None
        if options.dimensions is not None:
            self.project = RandomProjection(
                self.gradients.num_weights, options.dimensions, options.projection, options.seed
            )

    def of_members(self) -> FeatureStore:
        """Of the training images, one row an image: where training flips, the mean over both orientations."""
        reference = self.scene.reference()
        labels = None if reference.labels is None else reference.labels[0]
        # the first rows of the bank are the images as they are; their mirror images follow
        images = reference.members[: len(reference.indices)]
        return self._filled("members", images, labels, reference.mirror)

    def of_heldout(self, count: int, apart_from: Queries) -> FeatureStore:
        """Of at most ``count`` held-out images that are no queries, in an addressed draw.

        Raises:
            ValueError: If there are none.
        """
        reference = self.scene.reference()
        images = reference.heldout[: len(reference.heldout) // (2 if reference.mirror else 1)]
        asked = {image_digest(image) for image in apart_from.images.cpu().numpy()}
        left = [row for row, image in enumerate(images.numpy()) if image_digest(image) not in asked]
        if not left:
            raise ValueError("lam is chosen on held-out images that are no queries, and there are none: give lam")
        rows = torch.tensor(left)
        rows = rows[reference.cut(rows, "attribution", count)]
        labels = None if reference.labels is None else reference.labels[1][rows]
        return self._filled(f"heldout-{digest(images[rows])[:8]}", images[rows], labels, False)

    def of_queries(self, queries: Queries) -> FeatureStore:
        """Of the queries, as they are."""
        queries.fitting(self.scene.reference().members.shape[1:])
        labels = self.gradients.needed(queries.labels)
        own = digest(queries.images, None if labels is None else labels)
        return self._filled(f"queries-{own[:8]}", queries.images, labels, False)

    def _filled(self, name: str, images: Tensor, labels: Tensor | None, mirror: bool) -> FeatureStore:
        labels = self.gradients.needed(labels)
        manifest = {**self.settings, "images": digest(images), "mirror": mirror}
        if labels is not None:
            manifest["labels"] = digest(labels)
        width = self.options.dimensions or self.gradients.num_weights
        store = FeatureStore(self.folder / name, manifest, len(images), width, self.options.images_at_once)

        def compute(rows: Tensor) -> Tensor:
            if self._memory is None or len(self._memory) != len(rows):
                self._memory = self.gradients.memory(len(rows))
            found = self.gradients(images[rows], None if labels is None else labels[rows], mirror, self._memory)
            return found if self.project is None else self.project(found)

        store.fill(compute, self.scene.workers, self.scene.first, f"gradients of {name}")
        self.count += len(images) * self.gradients.per_image * (2 if mirror else 1)
        self.nbytes += store.nbytes
        return store


def products(left: FeatureStore, right: FeatureStore) -> Tensor:
    """All dot products of two stores' features, float64 [N, M], without holding either."""
    return torch.cat([torch.cat([a @ b.T for b in right.blocks()], dim=1) for a in left.blocks()])


def total_cost(parts: Sequence[GradientFeatures]) -> dict[str, float]:
    """Gradients of the network that these features take, and their bytes on disk."""
    return {"gradients": float(sum(part.count for part in parts)), "bytes": float(sum(p.nbytes for p in parts))}
