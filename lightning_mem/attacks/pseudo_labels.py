"""SIDE's pseudo-labels: a data source of generated images, each labelled by the cluster it falls into."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lightning_mem.attacks.clusters import (
    Clusters,
    Dropped,
    Rank,
    cluster,
    cohesion,
    isolation,
    keep_clusters,
)
from lightning_mem.data import AbstractSource, ArraySource
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation import Workers
from lightning_mem.evaluation.blocks import Blocks, draw_block
from lightning_mem.evaluation.evaluate import best_device
from lightning_mem.evaluation.table import LOOK
from lightning_mem.metrics import AbstractExtractor, build_extractor
from lightning_mem.modules import load_target
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.records import digest
from lightning_mem.types import SampleSet, Weights

Verify = Literal["block", "all"]
"""How much of a given SampleSet is drawn again: 64 rows at an addressed random place, or every row."""

SMALLEST = {"sscd": 32}
"""Side in pixels below which an extractor says nothing about an image."""

DRAW = ("sampler", "num_steps", "eta", "sample_seed")
"""Settings without which samples cannot be drawn again."""


def clusters_file(labelled: Path) -> Path:
    """Where the centroids of a labelled SampleSet are."""
    return labelled.with_suffix(".clusters.npz")


class PseudoLabels(AbstractSource):
    """Images drawn from a trained target, labelled by K-means clusters of their features: SIDE's training data.

    Sees generated images only. Draws ``num_images`` (in blocks: a stopped draw continues), clusters their features,
    keeps cohesive clusters, and labels *every* image by the nearest kept centroid. Both steps are kept in ``cache_dir``
    under the digest of everything that decides them; the result is a labelled SampleSet, whose manifest holds cohesion,
    isolation and size of each kept cluster.

    Args:
        target: The model to be attacked: a run folder, a ``.ckpt``, a diffusers folder or hub id. null only inside an
            attack, which puts its own there.
        num_images: How many images are drawn; of ``samples``, how many are taken (the first).
        num_clusters: K of K-means.
        tau: Least cohesion of a kept cluster, in [-1, 1] (the paper's 0.5 is of SSCD's cosines); null for none.
        keep: Keep at most this many clusters, those that ``rank`` puts first; null for all that pass.
        rank: What ``keep`` ranks by: ``cohesion``, or ``isolation`` (ours: how empty a cluster's neighbourhood is).
        min_size: Least number of images of a kept cluster.
        centered: Take cosines after subtracting the mean feature (ours; for features that are never negative).
        dropped: ``relabel``: images of dropped clusters go to the nearest kept centroid, as in the paper;
            ``background``: they become one more class, which is never a target (ours, beyond the paper).
        extractor: Feature space: ``sscd``, ``timm/<model>``, ``pixels``, ``inception``.
        extractor_weights: Its local weight file; ``sscd`` needs one.
        n_init: Starts of K-means.
        seed: Of the draw and of K-means; null takes the run's ``seed_everything``.
        num_steps: Sampler steps of the draw.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        weights: Of the target: ``ema`` takes averaged weights where there are any.
        samples: A SampleSet of the same target (``.npz`` with its manifest) instead of a draw; rows of it are drawn
            again and compared, so that no training image is among them.
        verify: Of ``samples``: ``block`` draws 64 rows again, ``all`` every row.
        cache_dir: Where both steps are kept; null for ``pseudo_labels`` in the target's run folder.
        device: Where to draw and extract; ``auto`` takes a GPU where there is one.

    Raises:
        ValueError: If a number is out of range, there are more clusters than images, fewer than two clusters stay, the
            extractor does not fit the image size, or ``samples`` are another target's or not drawn from it.

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1, steps 1 to 4.
    """

    def __init__(
        self,
        target: str | None = None,
        num_images: int = 10_000,
        num_clusters: int = 100,
        tau: float | None = 0.5,
        keep: int | None = None,
        rank: Rank = "cohesion",
        min_size: int = 2,
        centered: bool = False,
        dropped: Dropped = "relabel",
        extractor: str = "sscd",
        extractor_weights: str | None = None,
        n_init: int = 10,
        seed: int | None = None,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        weights: Weights = "ema",
        samples: str | None = None,
        verify: Verify = "block",
        cache_dir: str | None = None,
        device: str = "auto",
    ) -> None:
        if num_clusters < 2 or num_images < num_clusters:
            raise ValueError(
                f"num_clusters must lie in [2, num_images = {num_images}], got {num_clusters}: ask for fewer "
                "clusters or draw more images"
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._target, self.weights, self.device = target, weights, device
        self.num_images, self.seed = num_images, seed
        self.num_steps, self.sampler, self.eta = num_steps, sampler, eta
        self.samples, self.verify, self.cache_dir = samples, verify, cache_dir
        self.extractor, self.extractor_weights = extractor, extractor_weights
        self.clustering: dict[str, Any] = {
            "num_clusters": num_clusters, "tau": tau, "keep": keep, "rank": rank, "min_size": min_size,
            "centered": centered, "dropped": dropped, "n_init": n_init, "seed": seed,
        }  # fmt: skip

    @property
    def target(self) -> str:
        """The model that the images are drawn from.

        Raises:
            ValueError: If none was named.
        """
        if self._target is None:
            raise ValueError("PseudoLabels needs target, the model to be attacked: a run folder or a checkpoint")
        return self._target

    def take_target(self, path: str, weights: Weights) -> None:
        """Take this target, where none was named."""
        if self._target is None:
            self._target, self.weights = path, weights

    @property
    def name(self) -> str:
        """``pseudo-labels:<target>``."""
        return f"pseudo-labels:{Path(self.target).name}"

    @property
    def num_classes(self) -> int:
        """Classes of the classifier: K', and one more where there is a background; known after :meth:`prepare`."""
        return int(self.provenance()["num_classes"])

    @property
    def num_targets(self) -> int:
        """K', the kept clusters: classes 0 .. K'-1."""
        return int(self.provenance()["num_targets"])

    def provenance(self) -> dict[str, Any]:
        """Target, images, extractor, clustering and what came of it; see :class:`PseudoLabels`."""
        return self._array.provenance()

    def clusters(self) -> Clusters:
        """All centroids, and which were kept."""
        return Clusters.load(clusters_file(self.file))

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`. Only the target's own size is legal.

        Raises:
            ValueError: If another size is asked for.
        """
        shape = self._identity[1]
        if (channels, image_size, image_size) != shape:
            raise ValueError(
                f"{self.target} draws images of (channels, height, width) {shape}, but the data options ask for "
                f"{(channels, image_size, image_size)}: set data.image_size {shape[1]} and data.channels {shape[0]}"
            )
        return self._array.read(index, image_size, channels)

    def labels(self) -> np.ndarray | None:
        """The class of each image, int64 [N]."""
        return self._array.labels()

    def prepare(self) -> None:
        """Draw, cluster, label and write, unless it is there already; on one process."""
        if self.file.is_file():
            return
        samples, extractor = self._samples(), self._extractor
        features = self._features(samples.images, extractor)
        labelled, found = self._labelled(samples, features, extractor)
        found.save(clusters_file(self.file))
        labelled.save(self.file)  # last: it says that the rest is there
        rank_zero_info(f"{len(labelled)} labelled images (digest {labelled.digest}) in {self.file}")

    @cached_property
    def _array(self) -> ArraySource:
        if not self.file.is_file():
            raise ValueError(f"there is no {self.file} yet: call prepare() first (a Trainer does, on one process)")
        return ArraySource(str(self.file))

    @cached_property
    def _identity(self) -> tuple[str, tuple[int, int, int]]:
        """Digest and shape of the target; its network is not kept."""
        found = load_target(self.target, self.weights)
        return found.digest, found.shape

    @cached_property
    def _extractor(self) -> AbstractExtractor:
        side, least = self._identity[1][1], SMALLEST.get(self.extractor, 1)
        if side < least:
            raise ValueError(
                f"{self.extractor} needs images of at least {least} pixels, those of {self.target} have {side}: choose "
                "another extractor, e.g. pixels"
            )
        return build_extractor(self.extractor, self.extractor_weights, best_device(self.device))

    @property
    def folder(self) -> Path:
        """Where both steps are kept."""
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        path = Path(self.target)
        if path.suffix == ".ckpt":
            return path.parent.parent / "pseudo_labels"
        if not path.is_dir():
            raise ValueError(f"{self.target} is no folder: say with cache_dir where the pseudo-labels are kept")
        return path / "pseudo_labels"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the draw; its seed is an address of its own, so no attack starts from the same noise."""
        return {
            "sampler": self.sampler, "num_steps": self.num_steps, "eta": self.eta, "block": BLOCK,
            "sample_seed": derive_seed(self.seed, "pseudo-labels"), "target": self._identity[0],
        }  # fmt: skip

    @cached_property
    def file(self) -> Path:
        """The labelled SampleSet."""
        extractor = (self._extractor.name, self._extractor.digest, self._extractor.resize)
        drawn = self.settings if self.samples is None else SampleSet.load(self.samples).digest
        key = digest(drawn, self.num_images, self.weights, extractor, self.clustering, self._identity[0])
        return self.folder / f"labels-{key}.npz"

    def _samples(self) -> SampleSet:
        if self.samples is not None:
            return self._given(SampleSet.load(self.samples))
        path = self.folder / f"samples-{digest(self.settings, self.num_images, self.weights)}.npz"
        if path.is_file():
            return SampleSet.load(path)
        blocks = Blocks(path.with_suffix(".blocks"), 0, self.num_images, self.settings)
        target = self._loaded()
        for addresses in tqdm(blocks, "drawing images to label", leave=False):
            drawn = draw_block(target, addresses, self.settings)
            drawn.save(blocks.file(int(addresses[0]) // BLOCK))
        samples = blocks.assemble()
        samples.save(path)
        blocks.remove()
        return samples

    def _loaded(self) -> Target:
        return load_target(self.target, self.weights, str(best_device(self.device)))

    def _given(self, samples: SampleSet) -> SampleSet:
        """The user's samples, after rows of them were drawn again from the target and found equal.

        Raises:
            ValueError: It names what differs.
        """
        own, settings = self._identity[0], samples.settings
        if settings.get("target", own) != own:
            raise ValueError(
                f"{self.samples} was drawn from the target {settings['target']}, but target ({self.target}) is {own}: "
                "pseudo-labels need images of the model that is attacked"
            )
        lacking = [key for key in (*DRAW, "block") if key not in settings]
        if lacking or "guidance" in settings:
            reason = "was drawn under guidance" if not lacking else f"does not say its {', '.join(lacking)}"
            raise ValueError(
                f"{self.samples} {reason}, so it cannot be checked against {self.target}: a pseudo-label set holds "
                "unguided images of the target only; draw one with `lightning-mem sample`, or leave samples out"
            )
        if len(samples) < self.num_images:
            raise ValueError(f"{self.samples} holds {len(samples)} images, num_images is {self.num_images}")
        labels = None if samples.labels is None else samples.labels[: self.num_images]
        cut = slice(self.num_images)
        samples = SampleSet(samples.images[cut], samples.addresses[cut], labels, samples.weights, settings)
        rows = torch.arange(len(samples))
        if self.verify == "block":
            rows = torch.randperm(len(samples), generator=generator(self.seed, "verify"))[:BLOCK].sort().values
        target = self._loaded()
        for part in tqdm(rows.split(BLOCK), "drawing given images again", leave=False, delay=2):
            again = draw_block(target, samples.addresses[part], settings).images.int()
            # one level is what the rounding of another device may do to a pixel
            wrong = ((again - samples.images[part].int()).abs() > 1).flatten(1).any(1)
            if wrong.any():
                row = int(part[wrong][0])
                raise ValueError(
                    f"row {row} of {self.samples} is not what {self.target} draws at address "
                    f"{int(samples.addresses[row])} ({int(wrong.sum())} of {len(part)} rows differ): a pseudo-label "
                    "set holds generated images only, of the target, as its manifest says they were drawn"
                )
        return samples

    def _features(self, images: Tensor, extractor: AbstractExtractor) -> Tensor:
        workers = Workers(device=extractor.device)
        try:
            found = workers.in_blocks(
                len(images), lambda rows: extractor(images[rows]), label=f"{extractor.name} of images to label"
            )
        except RuntimeError as error:  # of the network: the images are not of a kind it takes
            raise ValueError(
                f"{extractor.name} cannot take images {tuple(images.shape[1:])}: {error}; choose another extractor"
            ) from error
        return found.cpu()

    def _labelled(
        self, samples: SampleSet, features: Tensor, extractor: AbstractExtractor
    ) -> tuple[SampleSet, Clusters]:
        options = self.clustering
        assignment, centroids = cluster(features, options["num_clusters"], options["seed"], options["n_init"])
        tight = cohesion(features, assignment, centroids, options["centered"])
        apart, sizes = isolation(features, assignment, centroids), torch.bincount(assignment, minlength=len(centroids))
        rule = {key: options[key] for key in ("tau", "min_size", "keep", "rank")}
        kept = keep_clusters(tight, apart, sizes, **rule)
        found = Clusters(centroids, kept)
        labels = found.labels(features, options["dropped"])
        counts = torch.bincount(labels, minlength=len(kept))
        columns = {"cohesion": tight, "isolation": apart, "sizes": sizes}
        about = {
            **options, "num_images": len(samples), "extractor": extractor.name, "extractor_digest": extractor.digest,
            "extractor_resize": extractor.resize, "samples_digest": samples.digest,
            "clusters_digest": digest(centroids, kept), "num_targets": len(kept), "num_classes": len(counts),
            "class_counts": counts.tolist(), **{f"cluster_{name}": v[kept].tolist() for name, v in columns.items()},
        }  # fmt: skip
        _show(about, columns)
        settings = {**samples.settings, "target": self._identity[0], **about}
        return SampleSet(samples.images, samples.addresses, labels, samples.weights, settings), found


def _show(about: dict[str, Any], columns: dict[str, Tensor]) -> None:
    """A small table: what was kept, and what it was kept from."""
    title = f"{about['num_targets']} of {about['num_clusters']} clusters of {about['num_images']} images kept"
    if about["num_classes"] > about["num_targets"]:
        title += f", {about['class_counts'][-1]} images in the background class"
    table = Table(title=title, title_justify="left", title_style="bold", **LOOK)
    for heading in ("", "smallest", "median", "largest", "largest of all clusters"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in columns.items():
        kept = torch.tensor(about[f"cluster_{name}"], dtype=torch.float64)
        numbers = (kept.min(), kept.quantile(0.5), kept.max(), values.max())
        table.add_row(name, *(f"{float(number):.4g}" for number in numbers))
    counts = torch.tensor(about["class_counts"][: about["num_targets"]], dtype=torch.float64)
    table.add_row("images of a class", *(f"{float(v):.4g}" for v in (counts.min(), counts.quantile(0.5), counts.max())))
    Console().print(table)
