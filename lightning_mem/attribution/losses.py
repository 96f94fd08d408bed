"""What a model makes of a query: its loss over all timesteps, at noise that every model sees alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import evaluation_mode, network_of
from lightning_mem.evaluation import Workers
from lightning_mem.randomness import generator
from lightning_mem.types import to_float


def even_timesteps(count: int, num_timesteps: int) -> list[int]:
    """The middles of ``count`` equal parts of the schedule: ``(2 j + 1) T / 2 n``.

    Raises:
        ValueError: If count is not in 1 .. num_timesteps.
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"the number of timesteps must lie in 1 .. {num_timesteps}, got {count}")
    return [(2 * j + 1) * num_timesteps // (2 * count) for j in range(count)]


@torch.no_grad()
def denoising_losses(
    target: Target,
    images: Tensor,
    timesteps: Sequence[int],
    *,
    labels: Tensor | None = None,
    num_draws: int = 1,
    seed: int = 0,
    name: str = "",
    workers: Workers | None = None,
) -> Tensor:
    r"""Mean squared error of what a denoiser is trained to predict, of every image.

    .. math:: L(x) = \operatorname{mean}_{t, \epsilon} \frac{1}{D} \lVert y(x, \epsilon, t) - f(x_t, t) \rVert^2

    The noise depends on seed, name, image row, timestep and draw only: models that are compared see the same.

    Args:
        target: The model.
        images: uint8 [Q, C, H, W], pixels.
        timesteps: Training timesteps that are averaged over.
        labels: int64 [Q]; a class-conditional target needs them.
        num_draws: Noise draws at each.
        seed: Of the noise.
        name: Address of these images' noise.
        workers: How blocks are dealt out.

    Returns:
        float64 [Q].

    Raises:
        ValueError: If a label is missing, or a loss is not finite.
    """
    if target.num_classes is not None and labels is None:
        raise ValueError(f"the target has {target.num_classes} classes: give the label of every query")
    workers, process = workers or Workers(), target.process
    network = network_of(target.denoiser)
    if network is not None:
        network.to(workers.device)

    def compute(rows: Tensor) -> Tensor:
        x0 = target.codec.encode(to_float(images[rows]).to(workers.device))
        condition = None if labels is None or target.num_classes is None else labels[rows].to(workers.device)
        total = torch.zeros(len(rows), dtype=torch.float64, device=workers.device)
        for at in timesteps:
            t = torch.full((len(rows),), at, dtype=torch.int64, device=workers.device)
            for number in range(num_draws):
                draws = [generator(seed, "query loss", name, int(row), at, number) for row in rows]
                eps = torch.stack([torch.randn(target.shape, generator=draw) for draw in draws]).to(workers.device)
                error = target.denoiser(process.add_noise(x0, eps, t), t, condition).float()
                error = error - process.training_target(x0, eps, t)
                total += error.double().square().flatten(1).mean(1)
        return total / (len(timesteps) * num_draws)

    with evaluation_mode(target.denoiser):
        losses = workers.in_blocks(len(images), compute, label=f"losses of {name}").cpu()
    if not torch.isfinite(losses).all():
        raise ValueError(f"{int((~torch.isfinite(losses)).sum())} of {losses.numel()} losses are not finite")
    return losses
