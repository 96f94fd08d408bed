"""Guidance of any draw by a trained surrogate: the surrogate checked against its target, and each sample's class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.diffusion import ClassifierGuidance, ScaleSchedule, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.modules import LoadedClassifier, load_classifier
from lightning_mem.randomness import derive_seed
from lightning_mem.types import Weights


def draw_targets(weights: Tensor, addresses: Tensor, seed: int) -> Tensor:
    """The class of every sample, int64 [N]; addressed, so sample 17 has the same class in any draw.

    Args:
        weights: float64 [K'] >= 0, not all 0; classes are drawn in proportion to them.
        addresses: int64 [N].
        seed: Of the draw.

    Raises:
        ValueError: If a weight is negative or not finite, or all are 0.
    """
    if not torch.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise ValueError(f"weights of clusters must be at least 0 and not all 0, got {weights.tolist()[:8]}")
    shares = [derive_seed(seed, "target cluster", int(address)) / 2**63 for address in addresses]
    edges = weights.double().cumsum(0) / weights.double().sum()
    return torch.searchsorted(edges, torch.tensor(shares, dtype=torch.float64), right=True).clamp(max=len(weights) - 1)


def load_surrogate(given: str, weights: Weights, target: Target, path: str) -> LoadedClassifier:
    """A trained classifier of this target.

    Args:
        given: Its run folder or checkpoint.
        weights: ``ema`` or ``raw``.
        target: What it is to guide.
        path: Where that came from.

    Raises:
        ValueError: If it was trained for another target (by digest).
    """
    found = load_classifier(given, weights)
    if found.target_digest != target.digest:
        raise ValueError(
            f"{given} was trained for the target {found.target_digest}, but {path} is {target.digest}: train a "
            "surrogate for this target (model.init_args.target), or take the other one"
        )
    return found


class SurrogateGuidance(AbstractAddition):
    """Guides every sample towards one class of a trained surrogate, or each towards a drawn one.

    Args:
        surrogate: Run folder or checkpoint of a SurrogateModule trained for the target that is drawn from.
        label: The class; null draws one for each sample, equally often.
        guidance_scale: Lambda; 0 for none.
        schedule: How lambda runs over the timesteps.
        interval: Training timesteps [low, high) with guidance; null for all.
        label_seed: Of drawn classes.
        surrogate_weights: ``ema`` takes averaged weights where there are any.

    Raises:
        ValueError: If the surrogate belongs to another target, or has no such class.
    """

    def __init__(
        self,
        surrogate: str,
        label: int | None = None,
        guidance_scale: float = 1.0,
        schedule: ScaleSchedule = "constant",
        interval: tuple[int, int] | None = None,
        label_seed: int = 0,
        surrogate_weights: Weights = "ema",
    ) -> None:
        self.surrogate, self.label, self.label_seed = surrogate, label, label_seed
        self.scale, self.schedule, self.interval = guidance_scale, schedule, interval
        self.surrogate_weights = surrogate_weights

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """The one term; see :class:`AbstractAddition`."""
        classifier = load_surrogate(self.surrogate, self.surrogate_weights, target, path)
        # a background class is nobody's target
        classes = int(classifier.pseudo_labels.get("num_targets", classifier.num_classes))
        if self.label is None:
            labels = draw_targets(torch.ones(classes), addresses, self.label_seed)
        else:
            labels = torch.full_like(addresses, self.label)
        return [
            ClassifierGuidance(
                classifier, labels, self.scale, addresses=addresses, interval=self.interval, schedule=self.schedule,
                process=target.process,
            )
        ]  # fmt: skip
