"""Membership attacks that ask the denoiser about one block of images at a time, all in the same way."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_mem.attacks.membership import AbstractMembership
from lightning_mem.attacks.query import Measure, ask_images
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.evaluation import Workers


class AskedMembership(AbstractMembership):
    """A membership attack whose error is a measure of the denoiser's answers about a block; says only the measure."""

    @abstractmethod
    def measure(self, name: str) -> Measure:
        """What is found for a block of one side's images, float64 [B, T] over ``times``, lower = member.

        Args:
            name: ``members`` or ``heldout``, as in the addresses of noise.
        """

    def side_errors(
        self, target: Target, images: Tensor, arms: Mapping[str, Sequence[ScoreTerm]], name: str, workers: Workers
    ) -> dict[str, Tensor]:
        """The measure of every image; see :class:`AbstractMembership`."""
        asked, label = self.conditions.of(target, name), f"{self.title} on {name}"
        return ask_images(target, images, arms, self.measure(name), workers, label, asked, self.block)
