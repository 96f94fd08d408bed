"""PFAMI: a member is reconstructed better than its own neighbours, images a little zoomed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.loss_scores import reconstruction_losses
from lightning_mem.attacks.membership import AbstractMembership
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Workers
from lightning_mem.types import to_float, to_uint8


class PFAMI(AbstractMembership):
    r"""Tells members from held-out images by how much better an image is reconstructed than crops of it.

    .. math:: F_t(x) = \frac{1}{|\mathcal T_t|} \sum_{s \in \mathcal T_t} \Big( L_s(x) -
        \frac{1}{K} \sum_{k=1}^{K} L_s\big(\mathrm{zoom}_{\lambda_k}(x)\big) \Big), \qquad
        \mathcal T_t = \{t \bmod h,\ \dots,\ t - h,\ t\}

    L is the loss attack's, all views of an image at the same noise; a zoom shows the central share :math:`\lambda` of
    either side, resized bilinearly and rounded to 8 bits. A member lies at a peak of the likelihood, of which -L is a
    bound; what makes an image easy in itself leaves with the difference. Records and attackers:
    :class:`AbstractMembership`.

    Args:
        zooms: The K shares :math:`\lambda`, in (0, 1); null: ten from 0.95 to 0.7.
        stride: h, at least 1: timesteps between those that are averaged up to t; null for t alone.
        num_draws: Noise draws of an image that are averaged.
        protection: What the denoiser is protected by, by class_path; null attacks the plain denoiser only.
        setting: Word for ``definition.setting``.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 450, the mean of ten with h = 50.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of noise and split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target.

    Undefined when:
        Members were trained on with crops: then a crop is a member too.

    Source:
        Fu et al., arXiv:2308.12143 (the mean fluctuation, without their network). Timesteps, shares and sign are those
        of a reimplementation beside SimA (arXiv:2509.25003, MIT), which draws each view its own noise; the paper's own
        equations were not read, so whether it divides by L(x) is not verified.
    """

    name = "pfami"
    title = "PFAMI"
    threat_model = (
        "PFAMI may ask the served denoiser, protected where it is, for its noise prediction on images of its choice "
        "and on crops of them. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (450,)

    def __init__(
        self,
        zooms: list[float] | None = None,
        stride: int | None = 50,
        num_draws: int = 1,
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
        self.zooms = torch.linspace(0.95, 0.7, 10).double().tolist() if zooms is None else list(zooms)
        if not self.zooms or not all(0 < share < 1 for share in self.zooms):
            raise ValueError(f"zooms must be at least one share in (0, 1), got {zooms}")
        for word, value in (("stride", 1 if stride is None else stride), ("num_draws", num_draws)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, got {value}")
        self.stride, self.num_draws = stride, num_draws

    @property
    def about(self) -> dict[str, Any]:
        """What is averaged."""
        zooms = " ".join(f"{share:.3g}" for share in self.zooms)
        return {"num_draws": self.num_draws, "stride": self.stride or 0, "zooms": zooms}

    def steps(self, t: int) -> list[int]:
        """The timesteps that are averaged for t."""
        return [t] if self.stride is None else list(range(t % self.stride, t + 1, self.stride))

    def evaluations(self, t: int) -> int:
        """One a draw and timestep, of the image and of every view."""
        return self.num_draws * len(self.steps(t)) * (1 + len(self.zooms))

    def side_errors(
        self, target: Target, images: Tensor, arms: Mapping[str, Sequence[ScoreTerm]], name: str, workers: Workers
    ) -> dict[str, Tensor]:
        """F; see :class:`AbstractMembership`."""
        asked = sorted({at for t in self.times for at in self.steps(t)})
        means = torch.zeros(len(asked), len(self.times), dtype=torch.float64)
        for place, t in enumerate(self.times):
            own = [asked.index(at) for at in self.steps(t)]
            means[own, place] = 1 / len(own)

        def losses(view: Tensor) -> dict[str, Tensor]:
            return reconstruction_losses(
                target, view, asked, arms, seed=self.seed, name=name, num_draws=self.num_draws, workers=workers,
                condition=self.conditions.of(target, name), block=self.block,
            )  # fmt: skip

        whole = losses(images)
        for share in self.zooms:
            neighbours = losses(zoom(images, share))
            whole = {arm: whole[arm] - neighbours[arm] / len(self.zooms) for arm in arms}
        return {arm: whole[arm] @ means for arm in arms}


def zoom(images: Tensor, share: float) -> Tensor:
    """The central share of both sides of uint8 [N, C, H, W], resized to the whole by bilinear interpolation."""
    theta = torch.tensor([[share, 0.0, 0.0], [0.0, share, 0.0]]).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return to_uint8(nn.functional.grid_sample(to_float(images), grid, padding_mode="border", align_corners=False))
