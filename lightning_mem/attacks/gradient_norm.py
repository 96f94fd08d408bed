"""The gradient-norm attack: a trained network has little left to learn from its members."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.asked import AskedMembership
from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.query import Measure, Query
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion.gradients import Gradient, per_example_gradients
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.randomness import generator


class GradientNorm(AskedMembership):
    r"""Tells members from held-out images by the norm of the loss's gradient in the network's parameters.

    .. math:: g_t(x) = \Big\lVert \nabla_\theta \frac{1}{D K}\sum_{k=1}^{K} \big\lVert \epsilon_k -
        \hat\epsilon_\theta(\sqrt{\bar\alpha_t}\,x + \sqrt{1 - \bar\alpha_t}\,\epsilon_k,\ t) \big\rVert^2
        \Big\rVert_2

    over K draws, at the noise of the loss attack. Gradients of a block's images are taken together, each its own.
    Records and attackers: :class:`AbstractMembership`.

    Args:
        num_draws: K, at least 1.
        images_at_once: Images whose gradients are held at a time, each as large as the network; at least 1.
        timesteps: Training timesteps of the fixed attacker, increasing; null: 100.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``; null for none.
        noise_seed: Of noise and split; null takes ``seed_everything``.
        condition: Of text-to-image models; see :class:`AbstractMembership`.
        block: Images of a network call; see :class:`AbstractMembership`.

    Raises:
        ValueError: If a number is out of range, or the target has no network (a closed form).

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other.

    Source:
        Nasr et al., arXiv:1812.00910 (gradient norm, white box); for diffusion models as one of GSA's features: Pang
        et al., arXiv:2308.06405. Here as a score by itself, without their classifier.
    """

    name = "gradient_norm"
    title = "Gradient norm"
    threat_model = (
        "The gradient-norm attack has the weights of the denoiser and back-propagates through it: no protection at "
        "sampling time is in its way. The calibrated attacker knows the membership of half the images."
    )
    default_timesteps = (100,)

    def __init__(
        self,
        num_draws: int = 1,
        images_at_once: int = 16,
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(None, "", timesteps, candidates, curve, noise_seed, condition, block)
        for word, value in (("num_draws", num_draws), ("images_at_once", images_at_once)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, got {value}")
        self.num_draws, self.images_at_once = num_draws, images_at_once

    @property
    def about(self) -> dict[str, Any]:
        """Draws of noise."""
        return {"num_draws": self.num_draws}

    def evaluations(self, t: int) -> int:
        """One a draw, each with its way back."""
        return self.num_draws

    def measure(self, name: str) -> Measure:
        """The norms; see :class:`AskedMembership`."""

        def norms(query: Query, x0: Tensor, rows: Tensor) -> Tensor:
            return torch.stack([self.norms(query, x0, rows, at, name) for at in self.times], 1)

        return norms

    def norms(self, query: Query, x0: Tensor, rows: Tensor, at: int, name: str) -> Tensor:
        """Norm of every image's own gradient at one timestep, float64 [B]."""
        network = network_of(query.target.denoiser)
        if network is None or not any(True for _ in network.parameters()):
            raise ValueError("the gradient-norm attack needs a target with a network: a closed form has no parameters")
        alpha_bar = float(query.process.alpha_bar[at])
        draws = [
            [generator(self.seed, "loss", name, int(row), at, number) for number in range(self.num_draws)]
            for row in rows
        ]
        shape = query.target.shape
        eps = torch.stack([torch.stack([torch.randn(shape, generator=draw) for draw in own]) for own in draws])

        given = query.given(rows)
        parts = given if isinstance(given, Mapping) else {} if given is None else {"": given}

        def loss(clean: Tensor, noise: Tensor, *own: Tensor) -> Tensor:
            """Mean squared error over draws and values; clean [C, H, W], noise [K, C, H, W]; own: its condition."""
            x_t = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
            repeated = {word: part.expand(len(noise), *part.shape) for word, part in zip(parts, own, strict=True)}
            condition = repeated if isinstance(given, Mapping) else repeated.get("")
            return (query(x_t, at, torch.zeros(len(noise), dtype=torch.int64), condition) - noise).square().mean()

        def norm(gradient: Gradient) -> Tensor:
            return torch.stack([part.double().square().sum() for part in gradient.values()]).sum().sqrt()

        return per_example_gradients(
            network, loss, x0, eps.to(x0.device), *parts.values(), chunk_size=self.images_at_once, then=norm
        )
