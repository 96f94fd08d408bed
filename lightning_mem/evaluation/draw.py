"""Drawing the samples that are measured: the same starting noise every time, dealt out to processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, ScoreTerm, Target, guidance_settings, sample
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
    guidance: Sequence[ScoreTerm] = (),
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
        guidance: Score terms with ``settings``, on the target's device; what they are is in the set's settings.
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
            target,
            own,
            seed=seed,
            num_steps=num_steps,
            sampler=sampler,
            eta=eta,
            guidance=guidance,
            condition=condition,
            block=BLOCK,
        )
        return images[torch.searchsorted(own, rows)].to(workers.device)

    settings = {"sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed}
    settings |= guidance_settings(guidance)
    images = workers.in_blocks(num_samples, draw, label="drawing samples").cpu()
    return SampleSet(images, addresses, labels, target.weights, settings)
