"""SimA: one call of the denoiser on the clean image; the less noise it sees in it, the nearer is a training image."""

from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.asked import AskedMembership
from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.query import Measure, Query
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion.additions import AbstractAddition


class SimA(AskedMembership):
    r"""Tells members from held-out images by the norm of the noise predicted in the image itself.

    .. math:: S_t(x) = \lVert \hat\epsilon(x, t) \rVert_p

    No noise is drawn, and x is put in as it is, neither noised nor scaled. By Tweedie's formula the prediction points
    from a mean of nearby training images to x: it is short at a member. Records and attackers:
    :class:`AbstractMembership`.

    Args:
        power: p, positive.
        protection: What the denoiser is protected by, by class_path; null attacks the plain denoiser only.
        setting: Word for ``definition.setting``.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 100.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of the split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target.

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other. A darker or
        smoother image has a shorter prediction, member or not.

    Source:
        Rao et al., arXiv:2509.25003, as its abstract and the authors' release (MIT) state it, which sums
        :math:`|\hat\epsilon|^4` (the same order) and names the best of six timesteps after looking; the paper's
        equations and its own timestep were not read.
    """

    name = "sima"
    title = "SimA"
    threat_model = (
        "SimA may ask the served denoiser, protected where it is, for its noise prediction on images of its choice, "
        "once an image. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (100,)

    def __init__(
        self,
        power: float = 4.0,
        protection: AbstractAddition | None = None,
        setting: str = "",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(protection, setting, timesteps, candidates, curve, noise_seed, condition, block)
        if not power > 0:
            raise ValueError(f"power must be positive, got {power}")
        self.power = power

    @property
    def about(self) -> dict[str, Any]:
        """The norm."""
        return {"power": self.power}

    def evaluations(self, t: int) -> int:
        """At t."""
        return 1

    def measure(self, name: str) -> Measure:
        """S; see :class:`AskedMembership`."""
        return self.errors

    def errors(self, query: Query, x0: Tensor, rows: Tensor) -> Tensor:
        """S of a block, float64 [B, T]."""
        found = [query(x0, at, rows).double().flatten(1) for at in self.times]
        return torch.stack([torch.linalg.vector_norm(eps, self.power, dim=1) for eps in found], 1)
