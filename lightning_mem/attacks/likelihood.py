"""The likelihood attack: the density that the target gives an image, by its probability flow."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.asked import AskedMembership
from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.query import Measure, Query
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.randomness import generator


class FlowLikelihood(AskedMembership):
    r"""Tells members from held-out images by minus the log density of the noised data at the scaled image.

    .. math:: B_t(x) = -\frac{\log_2 p_t(\sqrt{\bar\alpha_t}\,x)}{D}, \qquad
        \log p_t(x_t) = \log N(x_T; 0, I) + \frac{D}{2} \log\frac{\bar\alpha_T}{\bar\alpha_t} +
        \int_{\sigma_t}^{\sigma_T} \nabla_y \cdot \hat\epsilon\; d\sigma

    along the flow :math:`dy = \hat\epsilon\, d\sigma` of :math:`y = x_t / \sqrt{\bar\alpha_t}` and
    :math:`\sigma^2 = (1 - \bar\alpha_t) / \bar\alpha_t`, which carries the image to noise. Bits per dimension of a
    density over values in [-1, 1], or over latents: of 8-bit values they are :math:`\log_2 127.5` more. At t = 0 it is
    the model's likelihood. Records and attackers: :class:`AbstractMembership`.

    Args:
        num_steps: Heun steps from t to the last timestep T, evenly spaced in :math:`\log\sigma` as far as timesteps
            are; at least 1.
        num_probes: Random signs that estimate the divergence (Hutchinson), at least 1; null: exactly, by D products
            with the Jacobian, for small images.
        timesteps: Training timesteps of the fixed attacker, increasing, num_steps or more before the end; null: 0.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of signs and split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the target cannot be differentiated.

    Undefined when:
        The schedule ends before the data is noise, :math:`\bar\alpha_T` not near 0. A simple image is likely, member
        or not.

    Source:
        Song et al., arXiv:2011.13456, section 4.3 and appendix D.2 (here in y and sigma); Hutchinson's estimate:
        Grathwohl et al., arXiv:1810.01367. As an attack: Hu and Pang, arXiv:2302.03262, whose own solver and estimate
        were not compared.
    """

    name = "likelihood"
    title = "Likelihood"
    threat_model = (
        "The likelihood attack has the weights of the denoiser and back-propagates through it to images of its choice: "
        "no protection at sampling time is in its way. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (0,)

    def __init__(
        self,
        num_steps: int = 50,
        num_probes: int | None = 1,
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(None, "", timesteps, candidates, curve, noise_seed, condition, block)
        for word, value in (("num_steps", num_steps), ("num_probes", 1 if num_probes is None else num_probes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, got {value}")
        self.num_steps, self.num_probes = num_steps, num_probes

    @property
    def about(self) -> dict[str, Any]:
        """How the flow is integrated."""
        return {"num_steps": self.num_steps, "num_probes": self.num_probes or "exact"}

    def reach(self, times: Sequence[int]) -> int:
        """Every step goes on by a timestep or more."""
        return max(times) + self.num_steps

    def evaluations(self, t: int) -> int:
        """Two a step and one at the end; ``num_probes`` ways back (or D) at all but the middle ones."""
        return 2 * self.num_steps + 1

    def measure(self, name: str) -> Measure:
        """B; see :class:`AskedMembership`."""

        def bits(query: Query, x0: Tensor, rows: Tensor) -> Tensor:
            probes = self.probes(x0, rows, name)
            found = [log_density(query, x0, rows, self.nodes(query, t), probes) for t in self.times]
            return -torch.stack(found, 1) / (x0[0].numel() * math.log(2))

        return bits

    def nodes(self, query: Query, t: int) -> list[int]:
        """``num_steps + 1`` timesteps from t to the last one, near to evenly spaced in log sigma."""
        alpha_bar = query.process.alpha_bar
        last = len(alpha_bar) - 1
        if t + self.num_steps > last:
            raise ValueError(f"{self.num_steps} steps do not fit between timestep {t} and the last one, {last}")
        levels = ((1 - alpha_bar) / alpha_bar).log() / 2
        wanted = torch.linspace(float(levels[t]), float(levels[last]), self.num_steps + 1, dtype=torch.float64)
        nearest = (levels[t:] - wanted[:, None]).abs().argmin(1) + t
        found = [t]
        for step in range(1, self.num_steps + 1):
            found.append(min(max(int(nearest[step]), found[-1] + 1), last - self.num_steps + step))
        return found

    def probes(self, x0: Tensor, rows: Tensor, name: str) -> list[Tensor]:
        """Directions whose products with the Jacobian add up to its trace, or to a mean of estimates of it."""
        if self.num_probes is None:
            return list(torch.eye(x0[0].numel(), device=x0.device).reshape(-1, 1, *x0.shape[1:]).expand(-1, *x0.shape))
        found = []
        for number in range(self.num_probes):
            draws = [generator(self.seed, "likelihood", name, int(row), number) for row in rows]
            signs = torch.stack([torch.randint(2, x0.shape[1:], generator=draw) * 2.0 - 1 for draw in draws])
            found.append(signs.to(x0.device) / self.num_probes**0.5)
        return found


def log_density(query: Query, x0: Tensor, rows: Tensor, nodes: Sequence[int], probes: Sequence[Tensor]) -> Tensor:
    """log p_t of a block at x0 scaled to t, the first node; float64 [B]. The divergence is integrated over log sigma.

    Args:
        query: The denoiser.
        x0: [B, C, H, W].
        rows: int64 [B].
        nodes: Increasing timesteps of Heun's steps; the last one's noised data is taken for standard normal.
        probes: [B, C, H, W] each; see :meth:`FlowLikelihood.probes`.
    """
    alpha_bar = [float(query.process.alpha_bar[at]) for at in nodes]
    sigma = [math.sqrt((1 - signal) / signal) for signal in alpha_bar]
    y, integral = x0.double(), torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    eps, divergence = _slope(query, y, nodes[0], rows, probes)
    for place in range(1, len(nodes)):
        step = sigma[place] - sigma[place - 1]
        ahead, _ = _slope(query, y + step * eps, nodes[place], rows, ())
        y = y + step * (eps + ahead) / 2
        before = sigma[place - 1] * divergence
        eps, divergence = _slope(query, y, nodes[place], rows, probes)
        width = math.log(sigma[place] / sigma[place - 1])
        integral += width * (before + sigma[place] * divergence) / 2
    x = (alpha_bar[-1] ** 0.5 * y).flatten(1)
    size = x.shape[1]
    normal = -(x.square().sum(1) + size * math.log(2 * math.pi)) / 2
    return normal + size / 2 * math.log(alpha_bar[-1] / alpha_bar[0]) + integral


def _slope(query: Query, y: Tensor, at: int, rows: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The predicted noise at y, float64, and its divergence in y along the probes, float64 [B]."""
    scale, divergence = float(query.process.alpha_bar[at]) ** 0.5, y.new_zeros(len(y))
    if not probes:
        return query((scale * y).float(), at, rows).double(), divergence
    with torch.enable_grad():
        free = y.detach().requires_grad_()
        eps = query((scale * free).float(), at, rows)
        if not eps.requires_grad:
            raise ValueError("the likelihood attack needs a denoiser that can be differentiated by its input")
        for probe in probes:
            (product,) = torch.autograd.grad(eps, free, probe, retain_graph=True)
            divergence += (product * probe).flatten(1).sum(1)
    return eps.detach().double(), divergence
