"""TracIn: dot products of gradients, summed over the checkpoints of a training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.attribution.features import GradientFeatures, GradientOptions, products, total_cost
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.evaluation.checkpoints import check_trained_on, find_checkpoints
from lightning_mem.modules import load_target, read_checkpoint
from lightning_mem.records import digest


@dataclass(frozen=True)
class Moment:
    """One checkpoint of a training.

    Args:
        target: Its model.
        weight: Learning rate times the optimizer steps since the checkpoint before.
        place: Of its features in a store; empty for the target alone.
    """

    target: Target
    weight: float
    place: str = ""


class TracIn(AbstractAttribution):
    r"""How much each training image helps a query, by dot products of the loss's gradients along the training.

    .. math:: I(i, x) = \sum_c \eta_c\,(s_c - s_{c-1})\,\Big\langle \frac{1}{K}\sum_k
        \nabla_\theta L(\theta_c; x_{t_k}),\ \frac{1}{K}\sum_k \nabla_\theta L(\theta_c; x_{i, t_k}) \Big\rangle

    over the checkpoints c that the run kept, at optimizer steps :math:`s_c` and learning rates :math:`\eta_c` (a
    checkpoint where the schedule has reached 0 counts for nothing). Positive: a step on the image lowers the query's
    loss. The paper takes an image's gradient at the timestep that its training step drew; here it is averaged over
    the query's timesteps, what that draw is in expectation; the factor batch size / N, one for all, is left out. The
    weights are the target's kind, averaged where it is. White box.

    Args:
        checkpoints: ``all`` that the run kept, up to the target; ``target`` alone.
        gradients: How gradients are taken; null for the defaults.

    Raises:
        ValueError: If the target has no network, or a checkpoint was trained on other images.

    Undefined when:
        The optimizer is no plain gradient descent: then the learning rate only says how far a step could go.

    Source:
        Pruthi et al., arXiv:2002.08484, eq. 1; for diffusion models: Xie et al., arXiv:2401.09031, section 4.
    """

    name = "tracin"
    unit = False

    def __init__(self, checkpoints: Literal["all", "target"] = "all", gradients: GradientOptions | None = None) -> None:
        if checkpoints not in ("all", "target"):
            raise ValueError(f"checkpoints must be all or target, got {checkpoints!r}")
        self.checkpoints = checkpoints
        self.gradients = gradients if gradients is not None else GradientOptions()
        self._cost: dict[str, float] = {}

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Of target, checkpoints and settings; see :class:`AbstractAttribution`."""
        self.gradients.check(target)
        along = [(moment.target.digest, moment.weight) for moment in self.moments(target, home)]
        return digest(self.name, target.digest, along, self.gradients.settings())

    def moments(self, target: Target, home: Path, device: torch.device | str = "cpu") -> list[Moment]:
        """The checkpoints that count, in order of steps; the target alone where there are no others.

        Args:
            target: The last of them.
            home: Its run folder.
            device: Where to put their networks.

        Raises:
            ValueError: If the run kept checkpoints, and none is the target.
        """
        kept = home / "checkpoints" / "*.ckpt"
        if self.checkpoints == "target" or not any(kept.parent.glob(kept.name)):
            return [Moment(target, 1.0)]
        found, before = [], 0
        for checkpoint in find_checkpoints(str(kept)):
            own = load_target(checkpoint.path, target.weights, str(device))
            rate = float(read_checkpoint(checkpoint.path)["optimizer_states"][0]["param_groups"][0]["lr"])
            found.append(Moment(own, rate * (checkpoint.step - before), f"step{checkpoint.step}"))
            before = checkpoint.step
            if own.digest == target.digest:
                counting = [moment for moment in found if moment.weight > 0]
                return counting if len(found) > 1 and counting else [Moment(target, 1.0)]
        raise ValueError(
            f"no checkpoint in {kept.parent} is the target, whose weights differ from all of them: set checkpoints to "
            "target"
        )

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """See :class:`AbstractAttribution`; one column an image, whichever way round training saw it."""
        reference = scene.reference()
        moments = self.moments(scene.target, scene.home, scene.workers.device)
        if any(moment.place for moment in moments):
            kept = find_checkpoints(str(scene.home / "checkpoints" / "*.ckpt"))
            check_trained_on(kept, reference.members_digest)
        total = torch.zeros(len(queries), len(reference.indices), dtype=torch.float64)
        asked = []
        for moment in moments:
            features = GradientFeatures(scene, moment.target, self.gradients, "loss", self.unit, moment.place)
            total += moment.weight * products(features.of_queries(queries), features.of_members())
            asked.append(features)
        self._cost = total_cost(asked)
        return total

    def cost(self) -> Mapping[str, float]:
        """Gradients of the network, and bytes of features on disk."""
        return self._cost
