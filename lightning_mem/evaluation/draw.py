"""Drawing the samples that are measured: the same starting noise every time, dealt out to processes."""

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target, sample
from lightning_mem.evaluation.workers import Workers
from lightning_mem.randomness import derive_seed
from lightning_mem.types import SampleSet


def draw_labels(num_classes: int, addresses: Tensor, seed: int) -> Tensor:
    """Uniform labels addressed by sample, int64 [N]."""
    return torch.tensor([derive_seed(seed, "condition", int(a)) % num_classes for a in addresses], dtype=torch.int64)


def draw_samples(
    target: Target,
    num_samples: int,
    *,
    seed: int = 0,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    workers: Workers | None = None,
) -> SampleSet:
    """Samples 0 .. num_samples-1 of a seed, from the same starting noise every time.

    Args:
        target: What to sample.
        num_samples: How many.
        seed: Of noise and labels.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        workers: How blocks are dealt out.
    """
    workers = workers or Workers()
    addresses = torch.arange(num_samples)
    labels = None if target.num_classes is None else draw_labels(target.num_classes, addresses, seed)

    def draw(rows: Tensor) -> Tensor:
        # the rows that pad the last block repeat an address; sample() pads by itself and gives the same pixels
        own = rows.unique()
        condition = None if labels is None else labels[own]
        images = sample(
            target, own, seed=seed, num_steps=num_steps, sampler=sampler, eta=eta, condition=condition, block=BLOCK
        )
        return images[torch.searchsorted(own, rows)].to(workers.device)

    images = workers.in_blocks(num_samples, draw, label="drawing samples").cpu()
    settings = {"sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed}
    return SampleSet(images, addresses, labels, target.weights, settings)
