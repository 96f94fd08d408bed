"""The loss attack: members are reconstructed better than held-out images, by a plain and by a protected denoiser."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.loss_scores import reconstruction_losses
from lightning_mem.attacks.membership import AbstractMembership, Told
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Reference, Scene, Workers
from lightning_mem.records import atomic_write


class LossAttack(AbstractMembership):
    r"""Tells members from held-out images by the reconstruction loss at a fixed timestep.

    The plain denoiser (``definition.protection`` none) and, where one is given, the protected one answer the same
    images at the same noise. At every t of ``timesteps``, named before looking, an attacker takes a lower loss for a
    member: ``attack/loss/z``, ``attack/loss/auc``, ``attack/loss/auc_folded`` (max(a, 1 - a)),
    ``attack/loss/tpr_at_0.01`` and ``attack/loss/tpr_at_0.001``. A second attacker picks t, among ``candidates``, and
    the sign on half of the images and is told on the other half (``definition.attacker`` calibrated). Two-sided: a z
    far below 0 leaks as much as one far above. Every image's losses are in ``tables/losses.csv``. Further records:
    :class:`AbstractMembership`.

    Args:
        protection: What the denoiser is protected by, by class_path: ``lightning_mem.defenses.CPSampleProtection`` ...;
            null attacks the plain denoiser only.
        setting: Word for ``definition.setting``, such as ``copies`` or ``membership``.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 100 and 200.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        num_draws: Noise draws of an image that are averaged.
        noise_seed: Of noise and split; null takes ``seed_everything``.
        curve: Timesteps of ``auc_curve``; null for none.
        flips: Average over an image and its mirror image, each at its own noise.
        spread: Average over t - spread, t and t + spread, as far as they lie in the schedule; 0 for t alone.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target.

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other.

    Source:
        Carlini et al., arXiv:2301.13188, section 5.2; Matsumoto et al., arXiv:2302.03262; protected denoiser and z:
        CPSample, arXiv:2409.07025.
    """

    name = "loss"
    title = "Loss attack"
    threat_model = (
        "The loss attack may ask the served denoiser, protected where it is, for its noise prediction on images of its "
        "choice. Whoever has the weights drops the protection and is the row `none`; whoever has the protection's "
        "classifier reads one bit of every member from it. The calibrated attacker knows the membership of half the "
        "images."
    )
    default_timesteps = (100, 200)

    def __init__(
        self,
        protection: AbstractAddition | None = None,
        setting: str = "",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        num_draws: int = 1,
        noise_seed: int | None = None,
        curve: list[int] | None = None,
        flips: bool = False,
        spread: int = 0,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(protection, setting, timesteps, candidates, curve, noise_seed, condition, block)
        for word, least, value in (("num_draws", 1, num_draws), ("spread", 0, spread)):
            if value < least:
                raise ValueError(f"{word} must be at least {least}, got {value}")
        self.num_draws, self.flips, self.spread = num_draws, flips, spread

    @property
    def about(self) -> dict[str, Any]:
        """What is averaged."""
        averaged = {"flips": self.flips, "spread": self.spread}
        return {"num_draws": self.num_draws, **{word: value for word, value in averaged.items() if value}}

    def evaluations(self, t: int) -> int:
        """One a draw, orientation and timestep that are averaged."""
        return self.num_draws * (2 if self.flips else 1) * len(set(self._around(t, t + self.spread + 1)))

    def _around(self, t: int, num_timesteps: int) -> list[int]:
        """The timesteps that stand for t."""
        return [at for at in (t - self.spread, t, t + self.spread) if 0 <= at < num_timesteps]

    def side_errors(
        self, target: Target, images: Tensor, arms: Mapping[str, Sequence[ScoreTerm]], name: str, workers: Workers
    ) -> dict[str, Tensor]:
        """The losses; all arms share every draw of noise. See :class:`AbstractMembership`."""
        last = target.process.num_timesteps
        asked = sorted({at for t in self.times for at in self._around(t, last)})
        means = torch.zeros(len(self.times), len(asked), dtype=torch.float64)
        for place, t in enumerate(self.times):
            around = [asked.index(at) for at in self._around(t, last)]
            means[place, around] = 1 / len(around)
        views = {name: images, f"{name}, mirrored": images.flip(-1)} if self.flips else {name: images}
        options: dict[str, Any] = {
            "seed": self.seed, "num_draws": self.num_draws, "workers": workers,
            "condition": self.conditions.of(target, name), "block": self.block,
        }  # fmt: skip
        found = [reconstruction_losses(target, view, asked, arms, name=word, **options) for word, view in views.items()]
        whole = {arm: found[0][arm] if len(found) == 1 else (found[0][arm] + found[1][arm]) / 2 for arm in arms}
        return whole if self.spread == 0 else {arm: losses @ means.T for arm, losses in whole.items()}

    def write(self, scene: Scene, reference: Reference, told: Told) -> None:
        """``tables/membership.csv``, and ``tables/losses.csv`` with one row an image, arm and timestep."""
        super().write(scene, reference, told)
        with atomic_write(scene.folder / "tables" / "losses.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["protection", "set", "row", "t", "loss"])
            for side, word in enumerate(("members", "heldout")):
                for arm, sides in told.scores.items():
                    for row, own in enumerate((-sides[side]).tolist()):
                        lines = ([arm, word, row, t, f"{loss:.9g}"] for t, loss in zip(told.times, own, strict=True))
                        writer.writerows(lines)
