"""Guidance towards classes of public images of the same kind: the attacker has labels, but no training image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.attacks.guided import draw_targets
from lightning_mem.data.labels import assign_labels
from lightning_mem.diffusion import ClassifierGuidance, EmpiricalClassifier, ScaleSchedule, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import run_data
from lightning_mem.types import to_float


class ClassGuidance(AbstractAddition):
    r"""Guides every sample towards a class, by the closed form of labelled images that the target never saw.

    .. math:: s_\theta(x_t, t) + \lambda(t)\,\nabla_{x_t} \log p(c \mid x_t)

    with p of :class:`EmpiricalClassifier`. The attacker knows what kind of images the target was trained on, and has
    others of that kind with their true classes; no training image, no held-out image, no pseudo-label and no cluster.
    The images are those of the target's source that are neither members nor held out, read from its run folder; both
    orientations where it trained with flips.

    Args:
        label: The class; null draws one for each sample, equally often.
        guidance_scale: Lambda; 0 for none.
        schedule: How lambda runs over the timesteps.
        interval: Training timesteps [low, high) with guidance; null for all.
        label_seed: Of drawn classes.
        num_images: At most so many public images, an addressed draw; at least 1.

    Raises:
        ValueError: If a number is out of range, the target lies in no run folder or its images have changed (by
            digest), its source has no true labels, no public images, or none of some class.

    Source:
        Guidance: Dhariwal and Nichol, arXiv:2105.05233, algorithm 2; the closed form is ours.
    """

    def __init__(
        self,
        label: int | None = None,
        guidance_scale: float = 1.0,
        schedule: ScaleSchedule = "constant",
        interval: tuple[int, int] | None = None,
        label_seed: int = 0,
        num_images: int = 2048,
    ) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.label, self.scale, self.schedule, self.interval = label, guidance_scale, schedule, interval
        self.label_seed, self.num_images = label_seed, num_images

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """The one term; see :class:`AbstractAddition`."""
        data = run_data(path)
        public = data.fresh(self.num_images)
        if len(public) == 0:
            raise ValueError(
                f"{data.source.name} has no image beside the members and held-out images of {path}: lower "
                "data.num_heldout and train again, or guide by a surrogate"
            )
        found = assign_labels(
            "true", indices=public.indices.numpy(), num_classes=None, true_labels=data.source.labels(), seed=0,
            source=data.source.name,
        )  # fmt: skip
        labels, images = torch.as_tensor(found), public.images
        if data.flip:
            labels, images = torch.cat([labels, labels]), torch.cat([images, images.flip(-1)])
        encoded = torch.cat([target.codec.encode(to_float(part)).cpu() for part in images.split(64)])
        classifier = EmpiricalClassifier(encoded, labels, target.process, data.source.num_classes)
        if self.label is None:
            wanted = draw_targets(torch.ones(classifier.num_classes), addresses, self.label_seed)
        else:
            wanted = torch.full_like(addresses, self.label)
        return [
            ClassifierGuidance(
                classifier, wanted, self.scale, addresses=addresses, interval=self.interval, schedule=self.schedule,
                process=target.process,
            )
        ]  # fmt: skip
