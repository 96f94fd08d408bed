"""Rejection sampling: draw again until a sample is accepted; the oracle of protections by guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, ScoreTerm, Target, guidance_settings, sample
from lightning_mem.diffusion.additions import Judge
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.evaluation.workers import Workers
from lightning_mem.randomness import derive_seed
from lightning_mem.types import SampleSet


@dataclass(frozen=True)
class Accepted:
    """What rejection sampling gives.

    Args:
        samples: One a address; where no try was accepted, the last try.
        accepted: bool [N].
        tries: int64 [N] >= 1, draws that each address took.
    """

    samples: SampleSet
    accepted: Tensor
    tries: Tensor

    @property
    def cost(self) -> float:
        """Mean draws a sample: network evaluations over those of plain sampling."""
        return self.tries.double().mean().item()


def try_seed(seed: int, attempt: int) -> int:
    """Seed of a try: the draw's own first, so that arms start from the same noise; fresh ones after it."""
    return seed if attempt == 0 else derive_seed(seed, "try", attempt)


def rejection_settings(guidance: Sequence[ScoreTerm], judge: Judge, max_tries: int) -> dict[str, Any]:
    """What identifies a draw under score terms and a judge, flat; a key that a term has gets the next number."""
    merged, number = guidance_settings(guidance), len(guidance) + 1
    own = {**judge.settings, "protection_max_tries": max_tries}
    return merged | {f"{key}_{number}" if key in merged else key: value for key, value in own.items()}


def rejection_sample(
    target: Target,
    addresses: Sequence[int] | Tensor,
    judge: Judge,
    *,
    seed: int = 0,
    max_tries: int = 100,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    guidance: Sequence[ScoreTerm] = (),
    workers: Workers | None = None,
) -> Accepted:
    """Samples of these addresses, each drawn again from fresh noise until the judge accepts it.

    Try k of an address depends on seed, k and the address only; labels (of a conditional target, of guidance) stay
    those of the address. What is accepted at once is the very sample that an unprotected draw gives.

    Args:
        target: What is drawn from.
        addresses: int64 [N], each once.
        judge: Says which samples may leave; a network behind it is on the device where it is to run.
        seed: Of the draw.
        max_tries: Draws an address may take, at least 1.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        guidance: Score terms with ``settings``, on the target's device.
        workers: How blocks are dealt out.

    Raises:
        ValueError: If max_tries is below 1, or there are no addresses.
    """
    if max_tries < 1:
        raise ValueError(f"max_tries must be at least 1, got {max_tries}")
    workers = workers or Workers()
    own = torch.as_tensor(addresses).cpu().flatten().to(torch.int64)
    if len(own) == 0:
        raise ValueError("addresses must name at least one sample, got none")
    labels = None if target.num_classes is None else draw_labels(target.num_classes, own, seed)
    images = torch.empty(0, dtype=torch.uint8)
    accepted, tries = torch.zeros(len(own), dtype=torch.bool), torch.zeros(len(own), dtype=torch.int64)
    for attempt in range(max_tries):
        rows = (~accepted).nonzero().flatten()
        if len(rows) == 0:
            break

        def draw(places: Tensor, rows: Tensor = rows, attempt: int = attempt) -> Tensor:
            mine = rows[places.unique()]
            found = sample(
                target,
                own[mine],
                seed=try_seed(seed, attempt),
                num_steps=num_steps,
                sampler=sampler,
                eta=eta,
                guidance=guidance,
                condition=None if labels is None else labels[mine],
                block=BLOCK,
            )
            return found[torch.searchsorted(mine, rows[places])].to(workers.device)

        drawn = workers.in_blocks(len(rows), draw, label=f"try {attempt + 1}").cpu()
        if attempt == 0:
            images = torch.empty_like(drawn)
        images[rows] = drawn
        tries[rows] += 1
        accepted[rows] = workers.gather(judge(drawn).to(workers.device))[0].cpu()  # one verdict for all processes
    settings = {
        "sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed,
        **rejection_settings(guidance, judge, max_tries),
    }  # fmt: skip
    return Accepted(SampleSet(images, own, labels, target.weights, settings), accepted, tries)
