"""LiRA: is this loss rather one of models that were trained with the image, or of models trained without it?"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.loss import LossAttack
from lightning_mem.attacks.loss_scores import RATES
from lightning_mem.attacks.membership import AbstractMembership, Told
from lightning_mem.attacks.membership_scores import Sides, paired_gains
from lightning_mem.data.split import image_digest
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.evaluation import Number, Workers
from lightning_mem.modules import load_target
from lightning_mem.randomness import generator
from lightning_mem.records import digest
from lightning_mem.types import Weights

Mode = Literal["online", "offline"]
Variance = Literal["global", "per_image"]

LEAST = 1e-12
"""Of a deviation: losses of closed forms may not vary at all."""


@dataclass(frozen=True)
class Shadow:
    """A model of the target's kind whose training images are known.

    Args:
        target: The model.
        digests: Content digests of its training images.
    """

    target: Target
    digests: frozenset[str]

    @classmethod
    def read(cls, folder: str | Path, weights: Weights = "ema") -> "Shadow":
        """The shadow in a run folder.

        Raises:
            ValueError: If the folder does not say which images it was trained on, or holds no trained network.
        """
        path = Path(folder) / "members.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no members.json: a shadow is the run folder of a model trained by `fit`")
        return cls(load_target(folder, weights), frozenset(json.loads(path.read_text())["members"]["digests"]))


class LiRA(AbstractMembership):
    r"""Tells members from held-out images by the likelihood ratio of their losses under shadow models.

    .. math:: s(x) = \log N(L;\ \mu_{\text{in}}, \sigma_{\text{in}}) -
        \log N(L;\ \mu_{\text{out}}, \sigma_{\text{out}}), \qquad
        s_{\text{offline}}(x) = (\mu_{\text{out}} - L) / \sigma_{\text{out}}

    L is the target's loss of x, averaged over draws of noise and flips; the means are over the losses of shadow models
    that were trained with x (in) and without it (out), at the same noise. A shadow trained on the very member set of
    the target is left out: the target is never its own shadow. Beside the records of :class:`AbstractMembership`:
    ``auc_gain``, ``tpr_gain_at_0.01`` and ``tpr_gain_at_0.001``, LiRA minus the loss attack on the same images at the
    same noise, with a paired bootstrap. An image's losses are asked of the target and of every shadow.

    Args:
        shadows: Run folders of the shadow models, trained by the recipe of the target on other splits of its pool.
        mode: ``online`` knows shadows with and without each image; ``offline`` uses those without it only.
        variance: ``global``: one deviation for all images, in and out; ``per_image`` needs many shadows.
        num_draws: Noise draws of an image that are averaged, at least 1.
        flips: Average over an image and its mirror image.
        weights: Of the shadows: ``ema`` takes averaged weights where there are any.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 100.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of noise and split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, a folder holds no shadow, or an image has too few shadows.

    Undefined when:
        Shadows were trained by another recipe, or on images of another kind.

    Source:
        Carlini et al., arXiv:2112.03570, algorithm 1 and section V; for diffusion models: arXiv:2301.13188, section 5.2
        (there over losses averaged over noise and flips).
    """

    name = "lira"
    title = "LiRA"
    threat_model = (
        "LiRA may ask the denoiser for its noise prediction on images of its choice, knows the target's recipe, and "
        "has a pool of images, among them those in question, to train shadow models on. The calibrated attacker knows "
        "the membership of half the images."
    )
    default_timesteps = (100,)

    def __init__(
        self,
        shadows: list[str],
        mode: Mode = "online",
        variance: Variance = "global",
        num_draws: int = 20,
        flips: bool = False,
        weights: Weights = "ema",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
    ) -> None:
        super().__init__(None, "", timesteps, candidates, curve, noise_seed, condition)
        for word, value, legal in (("mode", mode, get_args(Mode)), ("variance", variance, get_args(Variance))):
            if value not in legal:
                raise ValueError(f"{word} must be {' or '.join(legal)}, got {value!r}")
        if len(shadows) < 2 or len(set(shadows)) < len(shadows):
            raise ValueError(f"shadows must be at least 2 different run folders, got {shadows}")
        self.folders, self.mode, self.variance, self.weights = list(shadows), mode, variance, weights
        self.loss = LossAttack(None, "", self.times, None, num_draws, self.seed, None, flips)
        self._shadows: list[Shadow] = []
        self._plain: dict[str, Tensor] = {}

    @property
    def about(self) -> dict[str, Any]:
        """How scores are made."""
        return {"mode": self.mode, "variance": self.variance, "num_shadows": len(self._shadows), **self.loss.about}

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, shadows and settings; see :class:`AbstractAttack`."""
        self._shadows = self.read_shadows()
        found = [(shadow.target.digest, sorted(shadow.digests)) for shadow in self._shadows]
        return digest(super().identity(target, path, home), found)

    def at(self, times: Sequence[int]) -> Self:
        """With the losses it stands on; see :class:`AbstractMembership`."""
        other = super().at(times)
        other.loss = self.loss.at(times)
        return other

    def read_shadows(self) -> list[Shadow]:
        """All of them, from their folders."""
        return [Shadow.read(folder, self.weights) for folder in self.folders]

    def evaluations(self, t: int) -> int:
        """The loss attack's, of the target and of every shadow."""
        return self.loss.evaluations(t) * (1 + len(self._shadows))

    def scores(
        self, target: Target, images: Sides, arms: Mapping[str, Sequence[ScoreTerm]], workers: Workers
    ) -> dict[str, Sides]:
        """Of all images, whose deviations are pooled over both sides; see :class:`AbstractMembership`."""
        own = frozenset(image_digest(image) for image in images[0].numpy())
        self._shadows = [shadow for shadow in self._shadows or self.read_shadows() if shadow.digests != own]
        names = "members", "heldout"
        targets = [target, *(shadow.target for shadow in self._shadows)]
        losses = torch.cat(
            [
                torch.stack([self.side_errors(of, side, arms, name, workers)["none"] for of in targets])
                for side, name in zip(images, names, strict=True)
            ],
            1,
        )
        digests = [image_digest(image) for side in images for image in side.numpy()]
        trained_with = torch.tensor([[one in shadow.digests for one in digests] for shadow in self._shadows])
        counts = [len(side) for side in images]
        self._plain = dict(zip(names, (-losses[0]).split(counts), strict=True))
        ratios = likelihood_ratios(losses[0], losses[1:], trained_with, self.mode, self.variance)
        members, heldout = ratios.split(counts)
        return {"none": (members, heldout)}

    def side_errors(
        self, target: Target, images: Tensor, arms: Mapping[str, Sequence[ScoreTerm]], name: str, workers: Workers
    ) -> dict[str, Tensor]:
        """The losses of one model, target or shadow; see :class:`AbstractMembership`."""
        self.loss.conditions = self.conditions
        return self.loss.side_errors(target, images, arms, name, workers)

    def extra_numbers(self, told: Told, p_value: float) -> list[Number]:
        """With the gain over the plain losses at low false positive rates; see :class:`AbstractMembership`."""
        found = super().extra_numbers(told, p_value)
        own, other = told.scores["none"]
        for t in self.timesteps:
            place = told.times.index(t)
            mine = own[:, place], other[:, place]
            plain = self._plain["members"][:, place], self._plain["heldout"][:, place]
            about = {"attacker": "fixed", "t": t, "sign": 1, "against": "loss", **told.settings["none"]}
            gains = paired_gains(mine, plain, RATES, generator(self.seed, "lira gain", t))
            found += [self.defined(number, about) for number in gains]
        return found


def least_shadows(images: int, mode: Mode = "online", variance: Variance = "global") -> int:
    r"""The smallest number of shadows that rather leaves every image of a pool enough of them than not.

    .. math:: S = \min\Big\{s : \big(1 - c \textstyle\sum_{k < l} \binom{s}{k} 2^{-s}\big)^N \ge \tfrac12\Big\}

    A random half is dealt to each shadow; l is 1, or 2 with ``per_image`` variance, c 2 online and 1 offline.

    Args:
        images: N of the pool, at least 1.
        mode: See :class:`LiRA`.
        variance: See there.
    """
    kinds, least = 2 if mode == "online" else 1, 2 if variance == "per_image" else 1
    count = 2
    while (1 - min(1.0, kinds * sum(math.comb(count, k) for k in range(least)) / 2**count)) ** images < 0.5:
        count += 1
    return count


def likelihood_ratios(
    losses: Tensor, shadow_losses: Tensor, trained_with: Tensor, mode: Mode = "online", variance: Variance = "global"
) -> Tensor:
    """LiRA's scores, larger = member; see :class:`LiRA`.

    Args:
        losses: Of the target, [N, T].
        shadow_losses: Of S shadows, [S, N, T].
        trained_with: bool [S, N]: whether a shadow was trained with an image.
        mode: ``online`` or ``offline``.
        variance: ``global`` pools the squared deviations from each image's own mean over all images.

    Returns:
        float64 [N, T].

    Raises:
        ValueError: If an image has too few shadows: 1 of each kind with the global variance (and 2 for some image), 2
            of each kind with its own; offline only those without it count.
    """
    x, known = losses.double(), shadow_losses.double()
    least = 2 if variance == "per_image" else 1

    def normal(mask: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        weights = mask.double()[:, :, None]
        counts = mask.sum(0)
        if int(counts.min()) < least or (variance == "global" and int(counts.max()) < 2):
            advice = "; offline needs none with it" if kind == "with" else ""
            raise ValueError(
                f"the {variance} variance needs at least {least} shadows trained {kind} every image, and 2 for some, "
                f"got {int(counts.min())} to {int(counts.max())} of {len(mask)}: train more half splits{advice}"
            )
        mean = (known * weights).sum(0) / counts[:, None]
        squares = ((known - mean).square() * weights).sum(0)
        if variance == "per_image":
            return mean, (squares / (counts[:, None] - 1)).sqrt().clamp(min=LEAST)
        return mean, (squares.sum(0) / (counts - 1).sum()).sqrt().clamp(min=LEAST).expand_as(mean)

    out_mean, out_deviation = normal(~trained_with, "without")
    if mode == "offline":
        return (out_mean - x) / out_deviation
    in_mean, in_deviation = normal(trained_with, "with")
    return (
        out_deviation.log()
        - in_deviation.log()
        + ((x - out_mean) / out_deviation).square() / 2
        - ((x - in_mean) / in_deviation).square() / 2
    )
