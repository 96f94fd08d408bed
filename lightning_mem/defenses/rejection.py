"""Which finished samples may leave: what a random-label classifier is undecided on, or what is no copy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.defenses.amg import check_bank
from lightning_mem.defenses.certificates import final_confidence
from lightning_mem.defenses.confidence import check_tol
from lightning_mem.defenses.protection import load_protector, training_images
from lightning_mem.diffusion import Codec, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.diffusion.guidance import Classifier, identity_of
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.metrics import duplicate_groups, memorized, nearest_neighbors
from lightning_mem.records import digest
from lightning_mem.types import Weights


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

    def __init__(self, classifier: Classifier, tol: float = 0.01, codec: Codec | None = None) -> None:
        identity = identity_of(classifier)
        self.edge = undecided_edge(tol)
        self.classifier, self.codec = classifier, codec
        self.settings = {"protection": "rejection", "protection_classifier": identity, "protection_tol": float(tol)}

    @property
    def module(self) -> torch.nn.Module | None:
        """The classifier's network, so that whoever draws can move it; None for a closed form."""
        return network_of(self.classifier)

    def __call__(self, images: Tensor) -> Tensor:
        """Whether q is at most 1 - tol."""
        return final_confidence(self.classifier, images, self.codec) <= self.edge


def undecided_edge(tol: float) -> float:
    """The largest confidence that is accepted, 1 - tol as :class:`CPSample` rounds it.

    Raises:
        ValueError: If tol lies outside (0, 0.5).
    """
    if tol == 0.5:
        raise ValueError("tol 0.5 would accept only what is exactly undecided, nothing in practice: lower it")
    return 1 / (1 + math.exp(-check_tol(tol)))


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


class UndecidedRejection(AbstractAddition):
    """Samples that a random-label classifier is certain of are drawn again.

    Args:
        random_label: Run folder or checkpoint of a RandomLabelModule trained on the target's members.
        tol: Tolerance in (0, 0.5): a sample leaves where the confidence is at most 1 - tol.
        random_label_weights: ``ema`` takes averaged weights where there are any.

    Raises:
        ValueError: If tol is outside, or the classifier is of another image size, schedule or member set.

    Source:
        CPSample, arXiv:2409.07025: the rejection sampler it is claimed to act like.
    """

    def __init__(self, random_label: str, tol: float = 0.01, random_label_weights: Weights = "ema") -> None:
        undecided_edge(tol)
        self.random_label, self.tol, self.random_label_weights = random_label, tol, random_label_weights

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """None: every try is an unprotected sample."""
        return ()

    def judge(self, target: Target, path: str) -> Undecided:
        """The rule; see :class:`AbstractAddition`."""
        classifier = load_protector(self.random_label, self.random_label_weights, target, path)
        return Undecided(classifier, self.tol, target.codec)


class NearestRejection(AbstractAddition):
    """Samples that the 1/3 rule calls copies of a training image are drawn again.

    Args:
        bank: The training images: a folder, or ``.npz`` or ``.npy`` with uint8 [N, H, W, C]; null for the target's own
            members, read from its run folder.
        threshold: Of the rule, in (0, 1): a copy's nearest image is closer than this share of the second distance.
        mirror: Whether mirror images count as training images too; null: where the target's run trained with flips.

    Raises:
        ValueError: If the threshold is outside, the images have another size than the target's, or the target's own
            members are asked for and cannot be read or have changed (by digest).

    Source:
        The rule: Gu et al., arXiv:2310.02664.
    """

    def __init__(self, bank: str | None = None, threshold: float = 1 / 3, mirror: bool | None = None) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.bank, self.threshold, self.mirror = bank, threshold, mirror

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """None: every try is an unprotected sample."""
        return ()

    def judge(self, target: Target, path: str) -> NoCopy:
        """The rule; see :class:`AbstractAddition`."""
        images, mirror = training_images(self.bank, self.mirror, path)
        check_bank(images, target)
        return NoCopy(images, self.threshold, mirror)
