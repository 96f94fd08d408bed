"""What a membership attack asks: the noise that the served denoiser predicts, protected where it is."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_mem.attacks.conditions import Asked, on_device
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.sampling import evaluation_mode, network_of
from lightning_mem.diffusion.target import Condition
from lightning_mem.evaluation import Workers
from lightning_mem.types import to_float


class Query:
    r"""The noise prediction of a denoiser, of each row under its own condition, with the terms of its protection.

    .. math:: \hat\epsilon(x_t, t) = \epsilon_\theta(x_t, t, c) - \sqrt{1 - \bar\alpha_t}\,\sum_j s_j(x_t, t)

    Args:
        target: The model.
        terms: Score terms; none for the plain denoiser.
        device: Where it is asked.
        condition: c by row; null for none, which a model on prompts takes for the empty one.

    Raises:
        ValueError: If the target is conditioned on classes, and there is no condition.
    """

    def __init__(
        self,
        target: Target,
        terms: Sequence[ScoreTerm] = (),
        device: torch.device | str = "cpu",
        condition: Asked | None = None,
    ) -> None:
        if target.num_classes is not None and condition is None:
            raise ValueError(
                f"the target is conditioned on {target.num_classes} classes: it is asked about an image under a label, "
                "and there is none"
            )
        self.target, self.process, self.terms, self.device = target, target.process, terms, device
        self.condition = condition
        for call in (target.denoiser, *terms):
            network = network_of(call)
            if network is not None:
                network.to(device)

    def given(self, rows: Tensor) -> Condition:
        """The condition of rows int64 [B], where they are asked; null for none."""
        return None if self.condition is None else on_device(self.condition(rows), self.device)

    def __call__(self, x_t: Tensor, at: int, rows: Tensor, given: Condition = None) -> Tensor:
        """Predicted noise float32 [B, C, H, W].

        Args:
            x_t: [B, C, H, W] in the denoiser's space.
            at: Training timestep.
            rows: int64 [B], addresses of the rows, for condition and score terms.
            given: Condition instead of that of the rows.
        """
        t = torch.full((len(x_t),), at, dtype=torch.int64, device=x_t.device)
        given = self.given(rows) if given is None else given
        output, prediction = self.target.denoiser(x_t, t, given), self.target.denoiser.prediction
        for term in self.terms:
            score = term(x_t, t, rows)
            if score is not None:
                output = self.process.add_score(output, score.float(), x_t, t, prediction)
        return self.process.to_eps(output.float(), x_t, t, prediction)

    def ddim(self, x: Tensor, start: int, end: int, rows: Tensor) -> Tensor:
        r"""One deterministic DDIM step between timesteps, in either direction; nothing is clipped.

        .. math:: x_s = \sqrt{\bar\alpha_s}\,\frac{x_t - \sqrt{1 - \bar\alpha_t}\,\hat\epsilon}{\sqrt{\bar\alpha_t}}
            + \sqrt{1 - \bar\alpha_s}\,\hat\epsilon, \qquad \hat\epsilon = \hat\epsilon(x_t, t)

        Args:
            x: x_t.
            start: t.
            end: s.
            rows: See the call.
        """
        eps = self(x, start, rows)
        here, there = (float(self.process.alpha_bar[t]) for t in (start, end))
        x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
        return there**0.5 * x0 + (1 - there) ** 0.5 * eps


Measure = Callable[[Query, Tensor, Tensor], Tensor]
"""(query, x0 [B, C, H, W] in the denoiser's space, rows int64 [B]) -> float64 [B, ...]."""


@torch.no_grad()
def ask_images(
    target: Target,
    images: Tensor,
    arms: Mapping[str, Sequence[ScoreTerm]],
    measure: Measure,
    workers: Workers,
    label: str,
    condition: Asked | None = None,
    block: int = BLOCK,
) -> dict[str, Tensor]:
    """What a measure finds for every image by arm, [N, ...], in blocks of one shape that processes share.

    Args:
        target: The model.
        images: uint8 [N, C, H, W].
        arms: Score terms by the arm's name; none for the plain denoiser.
        measure: Asked for one block and arm.
        workers: How blocks are dealt out.
        label: Of the progress bar.
        condition: What each image is asked under; null for nothing.
        block: Images of a network call.
    """
    queries = [Query(target, terms, workers.device, condition) for terms in arms.values()]

    def compute(rows: Tensor) -> Tensor:
        x0 = target.codec.encode(to_float(images[rows]).to(workers.device))
        return torch.stack([measure(query, x0, rows) for query in queries], 1)

    with evaluation_mode(target.denoiser):
        found = workers.in_blocks(len(images), compute, block, label).cpu()
    return {arm: found[:, place] for place, arm in enumerate(arms)}
