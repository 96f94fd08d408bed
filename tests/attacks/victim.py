"""Targets to attack: one whose network was never trained, and scenes around exact ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks import Clusters
from lightning_mem.attacks.pseudo_labels import clusters_file
from lightning_mem.diffusion import DiffusionProcess, Target, guidance_settings
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.evaluation.blocks import draw_block
from lightning_mem.metrics import PixelsExtractor
from lightning_mem.modules import DenoiserModule, SurrogateModule
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig
from lightning_mem.types import SampleSet


def write_target(folder: Path, seed: int = 0) -> str:
    """A run folder with one checkpoint, of 8 x 8 grey images."""
    torch.manual_seed(seed)
    process = DiffusionProcess("linear", num_timesteps=100)
    module = DenoiserModule(network=UNetConfig((8,), norm_num_groups=4, mid_attention=False), process=process)
    meta = {"module": "DenoiserModule", "seed": 0, "step": 7, "members_digest": "", "num_members": 0}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)


def write_surrogate(target: str, classes: int, pseudo_labels: dict[str, Any], time_dependent: bool = True) -> str:
    """A checkpoint as training leaves it."""
    config = ClassifierConfig(widths=(8,), blocks=(2,))
    module = SurrogateModule(target, network=config, time_dependent=time_dependent, seed=0)
    module.num_classes, module.pseudo_labels = classes, pseudo_labels
    module._build()
    meta = {"module": "SurrogateModule", "seed": 0, "step": 1, "members_digest": "", "num_members": 0}
    path = f"surrogate{classes}{time_dependent}.ckpt"
    torch.save({META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}, path)
    return path


def patterns(count: int, seed: int = 0) -> Tensor:
    """Random 8 x 8 images: any two are equally far from each other."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)


def write_labels(path: Path, images: Tensor, labels: Tensor, kept: list[int], centroids: Tensor, digest: str) -> str:
    """A labelled SampleSet with its clusters, as PseudoLabels leaves it."""
    n = len(kept)
    about = {
        "target": digest, "extractor": "pixels", "extractor_digest": PixelsExtractor().digest, "num_targets": n,
        "num_classes": int(labels.max()) + 1, "num_clusters": len(centroids), "num_images": len(images), "tau": 0.5,
        "keep": None, "rank": "cohesion", "min_size": 2, "centered": False, "dropped": "background",
        "cluster_cohesion": [0.9] * n, "cluster_isolation": [0.5] * n, "cluster_sizes": list(range(1, n + 1)),
    }  # fmt: skip
    SampleSet(images, torch.arange(len(images)), labels, "raw", about).save(path)
    Clusters(centroids.double(), torch.tensor(kept)).save(clusters_file(path))
    return str(path)


def scene_of(target: Target, members: Tensor, heldout: Tensor, folder: Path = Path("results")) -> Scene:
    """A scene in one process, without a Trainer; every draw is kept in memory alone."""

    def blocks(file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[Any]) -> SampleSet:
        addresses = torch.arange(first, first + count)
        return draw_block(target, addresses, {**settings, **guidance_settings(guidance)}, guidance)

    return Scene(target, Path("home"), folder, blocks, lambda: Reference.from_images(members, heldout))
