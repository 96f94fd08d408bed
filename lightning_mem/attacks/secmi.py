"""SecMI: how far one DDIM step there and back misses, after a deterministic way to the timestep."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.asked import AskedMembership
from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.query import Measure, Query
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion.additions import AbstractAddition


class SecMI(AskedMembership):
    r"""Tells members from held-out images by the t-error, the statistic of SecMI.

    .. math:: \ell_t(x) = \big\lVert \psi(\phi(\tilde x_t, t), t + k) - \tilde x_t \big\rVert^2, \qquad
        \tilde x_t = \phi(\cdots \phi(\phi(x, 0), k) \cdots, t - k)

    where :math:`\phi` is a DDIM step of k timesteps towards noise and :math:`\psi` one back. The error is read *at* t;
    the authors' release ends its way at t - k although it names t: ``timesteps: [90]`` here is its ``t_sec`` 100.
    Records and attackers: :class:`AbstractMembership`.

    Args:
        stride: k, at least 1; every timestep is a multiple of it.
        protection: What the denoiser is protected by, by class_path; null attacks the plain denoiser only.
        setting: Word for ``definition.setting``.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 100.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of the split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, a timestep is no multiple of the stride or ends outside the schedule,
            or the protection does not belong to the target.

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other.

    Source:
        Duan et al., arXiv:2302.01316, eq. 9 and 10 (SecMI_stat).
    """

    name = "secmi"
    title = "SecMI"
    threat_model = (
        "SecMI may ask the served denoiser, protected where it is, for its noise prediction on images of its choice, "
        "t / k + 2 times an image. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (100,)

    def __init__(
        self,
        stride: int = 10,
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
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        odd = [t for t in self.times if t % stride]
        if odd:
            raise ValueError(f"timesteps must be multiples of the stride {stride}, got {odd}")
        self.stride = stride

    @property
    def about(self) -> dict[str, Any]:
        """The stride."""
        return {"stride": self.stride}

    def steps(self, t: int) -> list[int]:
        """Timesteps that the way to t passes, from 0 to t."""
        return list(range(0, t + 1, self.stride))

    def reach(self, times: Sequence[int]) -> int:
        """The error at t looks one stride ahead."""
        return max(times) + self.stride

    def evaluations(self, t: int) -> int:
        """The way there, and one step there and back."""
        return t // self.stride + 2

    def differences(self, query: Query, x0: Tensor, rows: Tensor) -> Tensor:
        """By what one step there and back misses, [B, T, C, H, W]; one way serves all timesteps."""
        found, x, at = [], x0, 0
        for t in self.times:
            while at < t:
                x = query.ddim(x, at, at + self.stride, rows)
                at += self.stride
            there = query.ddim(x, t, t + self.stride, rows)
            found.append(query.ddim(there, t + self.stride, t, rows) - x)
        return torch.stack(found, 1)

    def measure(self, name: str) -> Measure:
        """The t-error; see :class:`AskedMembership`."""
        return self.errors

    def errors(self, query: Query, x0: Tensor, rows: Tensor) -> Tensor:
        """The t-error of a block, float64 [B, T]."""
        return self.differences(query, x0, rows).double().square().flatten(2).sum(2)
