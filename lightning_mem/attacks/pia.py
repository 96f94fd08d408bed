"""PIA: the noise a denoiser sees in the clean image, put in and asked for again."""

from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.asked import AskedMembership
from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.query import Measure, Query
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion.additions import AbstractAddition


class PIA(AskedMembership):
    r"""Tells members from held-out images by the proximal initialization: two denoiser calls, no random noise.

    .. math:: R_t(x) = \Big\lVert \epsilon_0 - \hat\epsilon\big(\sqrt{\bar\alpha_t}\,x +
        \sqrt{1 - \bar\alpha_t}\,\epsilon_0,\ t\big) \Big\rVert_p, \qquad \epsilon_0 = \hat\epsilon(x, 0)

    PIAN first rescales :math:`\epsilon_0` by :math:`\sqrt{2/\pi} / \mathrm{mean}|\epsilon_0|`, so that it has the mean
    absolute value of a standard normal draw. Records and attackers: :class:`AbstractMembership`.

    Args:
        normalize: PIAN.
        power: p, positive.
        protection: What the denoiser is protected by, by class_path; null attacks the plain denoiser only.
        setting: Word for ``definition.setting``.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 200.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of the split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target.

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other.

    Source:
        Kong et al., arXiv:2305.18355, eq. 9; the scale of PIAN is that of the release: eq. 10 is pi/2 larger than a
        unit scale.
    """

    threat_model = (
        "PIA may ask the served denoiser, protected where it is, for its noise prediction on images of its choice, "
        "twice an image. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (200,)

    def __init__(
        self,
        normalize: bool = False,
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
        self.normalize, self.power = normalize, power
        self.name, self.title = ("pian", "PIAN") if normalize else ("pia", "PIA")

    @property
    def about(self) -> dict[str, Any]:
        """The norm."""
        return {"power": self.power}

    def evaluations(self, t: int) -> int:
        """At t, and at 0."""
        return 2

    def measure(self, name: str) -> Measure:
        """R; see :class:`AskedMembership`."""
        return self.errors

    def errors(self, query: Query, x0: Tensor, rows: Tensor) -> Tensor:
        """R of a block, float64 [B, T]."""
        eps = query(x0, 0, rows)
        if self.normalize:
            eps = unit_scale(eps)
        found = []
        for at in self.times:
            alpha_bar = float(query.process.alpha_bar[at])
            x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps
            away = (eps - query(x_t, at, rows)).double().flatten(1)
            found.append(torch.linalg.vector_norm(away, self.power, dim=1))
        return torch.stack(found, 1)


def unit_scale(eps: Tensor) -> Tensor:
    r"""Each row times :math:`\sqrt{2/\pi} / \mathrm{mean}|\epsilon|`: a standard normal row stays as it is, nearly."""
    mean = eps.abs().flatten(1).mean(1).reshape(-1, *[1] * (eps.ndim - 1))
    return eps * ((2 / torch.pi) ** 0.5 / mean)
