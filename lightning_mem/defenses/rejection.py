"""Rejection sampling: draw again until a sample is accepted; the oracle of protections by guidance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.defenses.certificates import final_confidence
from lightning_mem.defenses.confidence import check_tol
from lightning_mem.diffusion import PixelCodec, Sampler, ScoreTerm, Target, guidance_settings, sample
from lightning_mem.diffusion.guidance import Classifier, identity_of
from lightning_mem.evaluation import Workers, draw_labels
from lightning_mem.metrics import duplicate_groups, memorized, nearest_neighbors
from lightning_mem.randomness import derive_seed
from lightning_mem.records import digest
from lightning_mem.types import SampleSet


class Judge(Protocol):
    """Says which finished samples may leave."""

    settings: dict[str, Any]
    """What identifies the rule, flat."""

    def __call__(self, images: Tensor) -> Tensor:
        """Whether each of uint8 [N, C, H, W] is accepted, bool [N]."""


class Undecided:
    r"""Accepts what a random-label classifier is not certain of: :math:`\text{tol} \le p(1 \mid x) \le 1 - \text{tol}`.

    Args:
        classifier: As for :class:`CPSample`; asked at t = 0.
        tol: Tolerance in (0, 0.5); at 0.5 nothing would be accepted.
        codec: Between pixels and the classifier's space; null for pixels.

    Raises:
        ValueError: If tol is outside, or the classifier has no digest.

    Source:
        CPSample, arXiv:2409.07025: the rejection sampler it is claimed to act like.
    """

    def __init__(self, classifier: Classifier, tol: float = 0.5, codec: PixelCodec | None = None) -> None:
        identity = identity_of(classifier)
        if tol == 0.5:
            raise ValueError("tol 0.5 would accept only what is exactly undecided, nothing in practice: lower it")
        self.classifier, self.codec = classifier, codec
        self.edge = 1 / (1 + math.exp(-check_tol(tol)))
        self.settings = {"protection": "rejection", "protection_classifier": identity, "protection_tol": float(tol)}

    def __call__(self, images: Tensor) -> Tensor:
        """Whether q is at most 1 - tol."""
        return final_confidence(self.classifier, images, self.codec) <= self.edge


class NoCopy:
    """Accepts what the 1/3 rule does not call a copy of a training image.

    Args:
        bank: uint8 [N >= 2, C, H, W], the training images.
        threshold: Of the rule, in (0, 1).
        mirror: Whether mirror images count too, as one image with the original.

    Source:
        The rule: Gu et al., arXiv:2310.02664.
    """

    def __init__(self, bank: Tensor, threshold: float = 1 / 3, mirror: bool = False) -> None:
        self.bank = torch.cat([bank, bank.flip(-1)]) if mirror else bank
        self.groups, self.threshold = duplicate_groups(self.bank, mirror=mirror), threshold
        self.settings = {
            "protection": "rejection_nearest", "protection_bank": digest(self.bank), "protection_threshold": threshold,
        }  # fmt: skip

    def __call__(self, images: Tensor) -> Tensor:
        """Whether the nearest image is not much nearer than the second."""
        return ~memorized(nearest_neighbors(images, self.bank, 2, groups=self.groups)[0], self.threshold)


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
        judge: :class:`Undecided` or :class:`NoCopy`.
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
        accepted[rows] = judge(drawn)
    settings = {
        "sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed,
        **guidance_settings(guidance), **judge.settings, "protection_max_tries": max_tries,
    }  # fmt: skip
    return Accepted(SampleSet(images, own, labels, target.weights, settings), accepted, tries)
