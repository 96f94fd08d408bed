"""Gradients of training images and queries: of one number that a network gives for an image, over its timesteps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_mem.data.split import image_digest
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.diffusion.gradients import per_example_gradients
from lightning_mem.diffusion.sampling import evaluation_mode, network_of
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

OutputName = Literal["loss", "squared_norm"]
"""Names of :data:`OUTPUTS`."""

Output = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, DiffusionProcess], Tensor]
"""(network output, x_t, x0, eps [B, C, H, W], t int64 [B], process) -> [B]."""


def loss_output(out: Tensor, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
    r"""Mean squared error of what the network is asked for, :math:`\frac{1}{d}|\epsilon_\theta - \epsilon|^2`, [B]."""
    return (out - process.training_target(x0, eps, t)).square().flatten(1).mean(1)


def norm_output(out: Tensor, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
    r"""Mean square of the predicted noise, :math:`\frac{1}{d}|\epsilon_\theta|^2`, [B]; D-TRAK's output."""
    return process.to_eps(out, x_t, t).square().flatten(1).mean(1)


OUTPUTS: Mapping[OutputName, Output] = {"loss": loss_output, "squared_norm": norm_output}
"""What is differentiated, by name."""


def spaced_timesteps(count: int, num_timesteps: int) -> list[int]:
    """Training timesteps in the middle of ``count`` equal parts of [0, T): uniformly spaced, both ends left alike.

    Raises:
        ValueError: If there are not so many different ones.
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"num_timesteps must lie in [1, {num_timesteps}], the target's own, got {count}")
    return [(2 * number + 1) * num_timesteps // (2 * count) for number in range(count)]


@dataclass(frozen=True)
class ImageGradients:
    r"""The gradient of an image, averaged over timesteps and draws of noise.

    .. math:: g(x) = \frac{1}{K} \sum_{k} u\Big(\frac{1}{R} \sum_{r} \nabla_\theta
        F\big(\theta;\ \sqrt{\bar\alpha_{t_k}}\,x + \sqrt{1 - \bar\alpha_{t_k}}\,\epsilon_{k r},\ t_k\big)\Big)

    where u is the identity or, with ``unit``, division by the L2 norm. The noise depends on seed, timestep and draw
    alone: all images see the same, so that what differs between two gradients is the images, and equal images get
    equal gradients (of 62 copies of 64 digits D-TRAK named the source first of 1.00 with one noise for all, of 0.56
    with noise of its own for every image). White box: the network is differentiated in all its parameters, in
    evaluation mode.

    Args:
        target: The model. A class-conditional one is asked under the image's own label, one on prompts under the
            empty prompt.
        output: F; see :data:`OUTPUTS`.
        num_timesteps: K, at least 1.
        num_draws: R, at least 1.
        unit: Divide the gradient of each timestep by its norm.
        shared_noise: One noise for all images; else each its own, which depends on the image's content besides.
        seed: Of the noise.
        calls_at_once: Noised images that are differentiated together; bounds the memory.
        device: Where to compute.

    Raises:
        ValueError: If a number is out of range, or the target has no network (a closed form).
    """

    target: Target
    output: Output = loss_output
    num_timesteps: int = 10
    num_draws: int = 1
    unit: bool = False
    shared_noise: bool = True
    seed: int = 0
    calls_at_once: int = 128
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in ("num_draws", "calls_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        spaced_timesteps(self.num_timesteps, self.target.process.num_timesteps)
        self.network.to(self.device)

    @property
    def network(self) -> torch.nn.Module:
        """What is differentiated."""
        network = network_of(self.target.denoiser)
        if network is None or not any(True for _ in network.parameters()):
            raise ValueError("gradients need a target with a network: a closed form has no parameters")
        return network

    @property
    def num_weights(self) -> int:
        """Length of a gradient."""
        return sum(part.numel() for part in self.network.parameters())

    @property
    def per_image(self) -> int:
        """Gradients of the network that one image takes."""
        return self.num_timesteps * self.num_draws

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, mirror: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """Gradients [B, P] in the network's precision.

        Args:
            images: uint8 [B, C, H, W], pixels.
            labels: int64 [B], for a class-conditional target.
            mirror: Mean of the gradients of the image and its mirror image: a training that flips saw both.
            out: [B, P], memory for the answer; null for new.

        Raises:
            ValueError: If a class-conditional target gets no labels.
        """
        labels = self.needed(labels)
        found = self._of(images, labels, out)
        return found.add_(self._of(images.flip(-1), labels)).div_(2) if mirror else found

    def memory(self, count: int) -> Tensor:
        """Room for the gradients of so many images, to be used again and again."""
        return torch.empty(count, self.num_weights, dtype=next(self.network.parameters()).dtype, device=self.device)

    def needed(self, labels: Tensor | None) -> Tensor | None:
        """The labels where the target is conditioned on classes, else null.

        Raises:
            ValueError: If it needs labels and there are none.
        """
        if self.target.num_classes is not None and labels is None:
            raise ValueError(
                f"the target is conditioned on {self.target.num_classes} classes: its gradients need the images' "
                "labels (data.labels of the run; labels of the queries)"
            )
        return labels if self.target.num_classes is not None else None

    @torch.no_grad()
    def _of(self, images: Tensor, labels: Tensor | None, out: Tensor | None = None) -> Tensor:
        times = spaced_timesteps(self.num_timesteps, self.target.process.num_timesteps)
        dtype = next(self.network.parameters()).dtype
        x0 = self.target.codec.encode(to_float(images).to(self.device)).to(dtype)
        keys = [""] if self.shared_noise else [image_digest(image) for image in images.cpu().numpy()]
        own = () if labels is None else (labels.to(self.device),)
        # what is averaged inside one backward pass; a unit gradient is one timestep's
        size = 1 if self.unit else min(self.num_timesteps, max(1, self.calls_at_once // self.num_draws))
        parts = [times[start : start + size] for start in range(0, len(times), size)]
        with evaluation_mode(self.target.denoiser):
            total = self._share(x0, keys, own, parts[0], out)
            for some in parts[1:]:
                total += self._share(x0, keys, own, some)
        return total

    def _share(
        self, x0: Tensor, keys: list[str], own: tuple[Tensor, ...], times: list[int], out: Tensor | None = None
    ) -> Tensor:
        """What some timesteps add to the mean over all."""
        eps = torch.stack([self._noise(key, times) for key in keys]).to(x0)
        eps = eps.expand(len(x0), *eps.shape[1:])
        at = torch.tensor(times, device=self.device).repeat_interleave(self.num_draws)
        chunk = max(1, self.calls_at_once // len(at))
        found = per_example_gradients(self.network, self._value(at), x0, eps, *own, chunk_size=chunk, out=out)
        if self.unit:
            found /= found.norm(dim=1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        return found if len(times) == self.num_timesteps else found.mul_(len(times) / self.num_timesteps)

    def _noise(self, key: str, times: list[int]) -> Tensor:
        """Draws of one image (of all, where the key is empty), [timesteps * R, C, H, W]."""
        draws = [generator(self.seed, "attribution", key, t, draw) for t in times for draw in range(self.num_draws)]
        return torch.stack([torch.randn(self.target.shape, generator=draw) for draw in draws])

    def _value(self, at: Tensor) -> Callable[..., Tensor]:
        """F of one image, averaged over these timesteps and draws."""
        process, denoiser = self.target.process, self.target.denoiser

        def value(clean: Tensor, noise: Tensor, *label: Tensor) -> Tensor:
            x0 = clean.expand_as(noise)
            x_t = process.add_noise(x0, noise, at)
            out = denoiser(x_t, at, *(own.expand(len(at)) for own in label))
            return self.output(out, x_t, x0, noise, at, process).mean()

        return value
