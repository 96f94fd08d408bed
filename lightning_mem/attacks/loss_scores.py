"""What the loss attack measures: reconstruction losses at paired noise, z, and what an attacker reads from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.conditions import Asked, on_device
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.sampling import evaluation_mode, network_of
from lightning_mem.evaluation import Number, Workers
from lightning_mem.metrics import Roc, roc
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is told."""


@torch.no_grad()
def reconstruction_losses(
    target: Target,
    images: Tensor,
    timesteps: Sequence[int],
    arms: Mapping[str, Sequence[ScoreTerm]],
    *,
    seed: int = 0,
    name: str = "",
    num_draws: int = 1,
    workers: Workers | None = None,
    condition: Asked | None = None,
    block: int = BLOCK,
) -> dict[str, Tensor]:
    r"""Mean squared error of the predicted noise, of every image, at fixed timesteps, for several arms at once.

    .. math:: L_t(x) = \frac{1}{D}\Big\lVert \epsilon - \hat\epsilon\big(\sqrt{\bar\alpha_t}\,x +
        \sqrt{1 - \bar\alpha_t}\,\epsilon,\ t\big) \Big\rVert^2, \qquad
        \hat\epsilon = \epsilon_\theta - \sqrt{1 - \bar\alpha_t}\,\sum_j s_j(x_t, t)

    where the s_j are an arm's score terms. All arms see the same noise, which depends on seed, name, image row,
    timestep and draw only. Nothing is clipped.

    Args:
        target: The denoiser.
        images: uint8 [N, C, H, W].
        timesteps: Training timesteps.
        arms: Score terms by the arm's name; none for the plain denoiser.
        seed: Of the noise.
        name: Address of these images' noise.
        num_draws: Noise draws of an image that are averaged.
        workers: How blocks are dealt out.
        condition: What each image is asked under; null for nothing, or the empty prompt.
        block: Images of a network call.

    Returns:
        float64 [N, timesteps] by arm.

    Raises:
        ValueError: If the target is conditioned on classes and there is no condition, or a loss is not finite.

    Source:
        Matsumoto et al., arXiv:2302.03262; with a protected denoiser: CPSample, arXiv:2409.07025.
    """
    if target.num_classes is not None and condition is None:
        raise ValueError(
            f"the target is conditioned on {target.num_classes} classes: it is asked about an image under a label, and "
            "there is none"
        )
    workers, process = workers or Workers(), target.process
    for call in (target.denoiser, *(term for terms in arms.values() for term in terms)):
        network = network_of(call)
        if network is not None:
            network.to(workers.device)

    def compute(rows: Tensor) -> Tensor:
        x0 = target.codec.encode(to_float(images[rows]).to(workers.device))
        given = None if condition is None else on_device(condition(rows), workers.device)
        found = torch.zeros(len(rows), len(arms), len(timesteps), dtype=torch.float64, device=workers.device)
        for place, at in enumerate(timesteps):
            t = torch.full((len(rows),), at, dtype=torch.int64, device=workers.device)
            for number in range(num_draws):
                draws = [generator(seed, "loss", name, int(row), at, number) for row in rows]
                eps = torch.stack([torch.randn(target.shape, generator=draw) for draw in draws]).to(workers.device)
                x_t = process.add_noise(x0, eps, t)
                output = target.denoiser(x_t, t, given)
                for arm, terms in enumerate(arms.values()):
                    own = output
                    for term in terms:
                        score = term(x_t, t, rows)
                        if score is not None:
                            own = process.add_score(own, score.float(), x_t, t, target.denoiser.prediction)
                    error = process.to_eps(own.float(), x_t, t, target.denoiser.prediction) - eps
                    found[:, arm, place] += error.double().square().flatten(1).mean(1) / num_draws
        return found

    with evaluation_mode(target.denoiser):
        losses = workers.in_blocks(len(images), compute, block, f"losses of {name}").cpu()
    if not torch.isfinite(losses).all():
        raise ValueError(f"{int((~torch.isfinite(losses)).sum())} of {losses.numel()} losses are not finite")
    return {arm: losses[:, place] for place, arm in enumerate(arms)}


def loss_z(members: Tensor, heldout: Tensor) -> float:
    r"""How many standard errors the mean loss of members lies below that of held-out images.

    .. math:: z = \frac{\bar L_{\text{held-out}} - \bar L_{\text{members}}}
        {\sqrt{s^2_{\text{held-out}}/n + s^2_{\text{members}}/m}}

    Args:
        members: [m >= 2] losses.
        heldout: [n >= 2] losses.

    Returns:
        Positive where members are reconstructed better; standard normal where nothing leaks. Far below 0 is a leak too.
        It grows as the root of the numbers of images, and says nothing about low false positive rates.

    Raises:
        ValueError: If a side has fewer than 2 losses, or all losses are equal.

    Source:
        CPSample, arXiv:2409.07025, its membership test; as a Welch statistic over images, not batches.
    """
    if len(members) < 2 or len(heldout) < 2:
        raise ValueError(f"z needs at least 2 losses on each side, got {len(members)} and {len(heldout)}")
    a, b = members.double(), heldout.double()
    variance = float(a.var() / len(a) + b.var() / len(b))
    if variance == 0:
        raise ValueError("all losses of a side are equal: z does not exist")
    return float(b.mean() - a.mean()) / math.sqrt(variance)


@dataclass(frozen=True)
class Verdict:
    """What one attacker reaches on one arm.

    Args:
        arm: ``none`` or the protection.
        attacker: ``fixed``: t was named before, lower loss = member; ``calibrated``: t and sign from other images.
        t: Training timestep.
        sign: 1 where a lower loss means member, -1 where a higher one does.
        z: See :func:`loss_z`; its sign is not turned.
        curve: Of the score ``-sign * loss``.
    """

    arm: str
    attacker: str
    t: int
    sign: int
    z: float
    curve: Roc

    @property
    def definition(self) -> dict[str, Any]:
        """What its numbers mean, flat."""
        return {
            "attacker": self.attacker, "t": self.t, "sign": self.sign, "num_members": self.curve.num_members,
            "num_heldout": self.curve.num_heldout,
        }  # fmt: skip


def fixed_verdicts(arm: str, members: Tensor, heldout: Tensor, timesteps: Sequence[int]) -> list[Verdict]:
    """The attacker who was told t, and takes a low loss for a member; losses [m, T] and [n, T]."""
    return [
        Verdict(arm, "fixed", t, 1, loss_z(own, other), roc(-own, -other))
        for t, own, other in zip(timesteps, members.unbind(1), heldout.unbind(1), strict=True)
    ]


def halves(count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Rows to calibrate on and rows to test on, an addressed draw; each half of them."""
    order = torch.randperm(count, generator=generator(seed, "calibration split", name))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def calibrated_verdict(arm: str, members: Tensor, heldout: Tensor, timesteps: Sequence[int], seed: int) -> Verdict:
    """The attacker who picks t and sign, by AUC, on half of the images whose membership is known; told on the others.

    Args:
        arm: Its name.
        members: Losses float64 [m >= 4, T].
        heldout: Losses float64 [n >= 4, T].
        timesteps: The T candidates.
        seed: Of the split.
    """
    (own, own_test), (other, other_test) = halves(len(members), seed, "members"), halves(len(heldout), seed, "heldout")
    found = [roc(-members[own, place], -heldout[other, place]).auc for place in range(len(timesteps))]
    place = max(range(len(found)), key=lambda place: max(found[place], 1 - found[place]))
    sign = 1 if found[place] >= 0.5 else -1
    a, b = members[own_test, place], heldout[other_test, place]
    return Verdict(arm, "calibrated", timesteps[place], sign, loss_z(a, b), roc(-sign * a, -sign * b))


def all_verdicts(
    arm: str,
    members: Tensor,
    heldout: Tensor,
    times: Sequence[int],
    timesteps: Sequence[int],
    candidates: Sequence[int],
    seed: int,
) -> list[Verdict]:
    """The fixed attacker at every timestep, then the calibrated one.

    Args:
        arm: Its name.
        members: Losses float64 [m >= 4, T].
        heldout: Losses float64 [n >= 4, T].
        times: The T timesteps.
        timesteps: Of the fixed attacker, among them.
        candidates: Of the calibrated one, among them.
        seed: Of the split.
    """
    fixed, free = ([times.index(t) for t in given] for given in (timesteps, candidates))
    return [
        *fixed_verdicts(arm, members[:, fixed], heldout[:, fixed], timesteps),
        calibrated_verdict(arm, members[:, free], heldout[:, free], candidates, seed),
    ]


def verdict_numbers(verdict: Verdict) -> list[Number]:
    """``z``, ``auc``, ``auc_folded`` and ``tpr_at_<rate>`` of a verdict, with their intervals."""
    curve, z, half = verdict.curve, verdict.z, NormalDist().inv_cdf(0.975)
    n = curve.num_members + curve.num_heldout

    def number(
        name: str, value: float, ends: tuple[float, float], how: str, n: int, unit: str = "fraction", **further: str
    ) -> Number:
        return Number(name, value, n, {**verdict.definition, "interval": how, **further}, ends, unit)

    return [
        number("z", z, (z - half, z + half), "normal", n, "standard errors"),
        number("auc", curve.auc, curve.auc_interval(), "delong", n),
        number("auc_folded", curve.auc_folded, curve.auc_folded_interval(), "delong, folded", n),
        *(
            number(
                f"tpr_at_{rate}", curve.tpr_at(rate), curve.tpr_interval(rate), "order statistics and wilson",
                curve.num_heldout, point="at_most",
            )
            for rate in RATES
        ),
    ]  # fmt: skip
