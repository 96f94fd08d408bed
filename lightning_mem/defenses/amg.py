"""AMG-style guidance: away from the nearest training image, where that one is much nearer than the others."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mem.defenses.certificates import Watch, unpadded
from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import evaluation_mode
from lightning_mem.randomness import generator
from lightning_mem.records import digest
from lightning_mem.types import to_float

Search = Literal["noised", "x0"]
"""What is searched: x_t among training images noised to the same t, or its estimate of x0 among the images."""

NEIGHBORS = 50
"""k of the adaptive distance."""

ALPHA = 0.5
"""Factor of its denominator."""

CHUNK = 4096
"""Training images compared at once."""


def adaptive_distance(x: Tensor, neighbors: Tensor) -> Tensor:
    r"""Carlini's :math:`d_1 / (\alpha \cdot \text{mean of } d_1 .. d_k)`, differentiable in x; [B].

    Args:
        x: [B, D].
        neighbors: [B, k, D], the nearest first; their order and identity are held constant.
    """
    distances = (x[:, None] - neighbors).square().sum(2).clamp(min=1e-24).sqrt()
    return distances[:, 0] / (ALPHA * distances.mean(1))


def check_bank(bank: Tensor, target: Target) -> None:
    """Refuse training images that are not those of a target, as far as their shape tells.

    Raises:
        ValueError: If the bank is not uint8 [N >= 2, C, H, W], or of another size than the target works on.
    """
    if bank.dtype != torch.uint8 or bank.ndim != 4 or len(bank) < 2:
        raise ValueError(f"bank must be uint8 [N >= 2, C, H, W], got {bank.dtype} {tuple(bank.shape)}")
    first = target.codec.encode(to_float(bank[:1]))
    if tuple(first.shape[1:]) != tuple(target.shape):
        raise ValueError(
            f"the training images become {tuple(first.shape[1:])} for the denoiser, which works on "
            f"{tuple(target.shape)}: give the images that it was trained on, at its size"
        )


class AMG:
    r"""A score term that raises the adaptive distance to the training images where it is below a trigger.

    .. math:: \hat\epsilon = \epsilon_\theta + 1[\ell < \text{trigger}]\; c_3 \sqrt{1 - \bar\alpha_t}\,
        \nabla_{x_t} \sigma_t, \qquad \sigma_t = -\ell, \quad c_3 = s\,(\text{thr}(t) - \ell), \quad
        \text{thr}(t) = 1.95 - 0.45\,e^{-0.025\,t}

    where l is the adaptive distance over 50 neighbours (fewer where the bank is smaller). This is the part of AMG that
    works without captions (its dissimilarity term). Above the trigger nothing is added, bit for bit. It needs the
    training images while it samples.

    Args:
        target: What is drawn from. Where ``search`` is ``x0`` its network is called once more a step, because a score
            term does not see the step's own output; AMG itself pays nothing for it (``network_evaluations`` counts).
        bank: uint8 [N >= 2, C, H, W], the training images.
        scale: s, finite and at least 0; 0 for none. In units of x_t in [-1, 1].
        trigger: In (0, 2); l is 2 where all neighbours are equally far.
        search: ``x0`` compares the estimate of x0 with the images, its eps held constant in the gradient; ``noised``
            compares x_t with training images noised to the same t by addressed noise, as the release for CIFAR-10 does.
        mirror: Whether mirror images count as training images too.
        seed: Of the noise.

    Raises:
        ValueError: If a number is out of range, the bank does not fit the target, or ``x0`` is asked for a conditional
            target (a score term does not know the condition).

    Source:
        AMG, arXiv:2404.00922: dissimilarity guidance and trigger; the schedule is that of its CIFAR-10 release.
    """

    name = "amg"

    def __init__(
        self,
        target: Target,
        bank: Tensor,
        scale: float = 1.0,
        *,
        trigger: float = 1.5,
        search: Search = "x0",
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and at least 0 (a negative one would draw copies), got {scale}")
        if not 0 < trigger < 2:
            raise ValueError(f"trigger must lie in (0, 2), the range of the adaptive distance; got {trigger}")
        if search not in ("noised", "x0"):
            raise ValueError(f"search must be noised or x0, got {search!r}")
        if search == "x0" and target.num_classes is not None:
            raise ValueError("search x0 asks the network for x0, but the target is conditional: use search noised")
        check_bank(bank, target)
        bank = torch.cat([bank, bank.flip(-1)]) if mirror else bank
        self.target, self.images = target, bank
        self.scale, self.trigger, self.search, self.seed = float(scale), float(trigger), search, seed
        self.k = min(NEIGHBORS, len(bank))
        self.evaluations = self.network_evaluations = 0
        self.watch = Watch()
        self._encoded: list[Tensor] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the protection, flat, for the settings of a SampleSet."""
        return {
            "protection": self.name,
            "protection_bank": digest(self.images),
            "protection_scale": self.scale,
            "protection_trigger": self.trigger,
            "protection_search": self.search,
            "protection_seed": self.seed,
        }

    def threshold(self, t: Tensor) -> Tensor:
        """thr(t), float64 [B], for t int64 [B]."""
        return 1.95 - 0.45 * (-0.025 * t.double()).exp()

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        """c_3 grad l on the rows below the trigger, 0 on the others; None where there are none."""
        if self.scale == 0:
            return None
        if len(t.unique()) != 1:
            raise ValueError(f"all rows of a call must have one timestep, got {t.unique().tolist()[:5]}")
        process, factor = self.target.process, 1.0
        place = x_t.float()
        if self.search == "x0":
            with torch.no_grad(), evaluation_mode(self.target.denoiser):
                output = self.target.denoiser(x_t, t, None).float()
            place = process.to_x0(output, place, t, self.target.denoiser.prediction)
            factor = 1 / math.sqrt(float(process.alpha_bar[t[0].cpu()]))
        own = len(addresses.unique())
        self.evaluations += own
        self.network_evaluations += own * (self.search == "x0")
        neighbors = self.nearest(place, int(t[0]))
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
            x = place.detach().clone().flatten(1).requires_grad_()
            distance = adaptive_distance(x, neighbors.clone())
            slope = torch.autograd.grad(distance.sum(), x)[0].reshape(x_t.shape)
        distance = distance.detach()
        acts = distance < self.trigger
        rows = unpadded(addresses.cpu())
        self.watch.see(*(part.cpu()[rows] for part in (t, addresses, distance, acts)))
        if not acts.any():
            return None
        strength = self.scale * (self.threshold(t).to(distance) - distance) * acts * factor
        return strength.reshape(-1, *[1] * (x_t.ndim - 1)) * slope

    def gate_rate(self, addresses: Tensor) -> Tensor:
        """Share of the steps at which the adaptive distance was below the trigger, float64 [N]; 0 where none was."""
        return self.watch.gate_rate(addresses)

    def nearest(self, x: Tensor, t: int) -> Tensor:
        """The k nearest rows of the bank of this timestep, the nearest first; [B, k, D] for x [B, C, H, W]."""
        flat = x.flatten(1)
        best, rows = flat[:, :0], flat[:, None][:, :0]
        for number, clean in enumerate(self._chunks()):
            bank = clean.to(flat)
            if self.search == "noised":
                eps = torch.randn(clean.shape, generator=generator(self.seed, "amg", t, number)).to(flat)
                alpha_bar = self.target.process.alpha_bar[t].item()
                bank = math.sqrt(alpha_bar) * bank + math.sqrt(1 - alpha_bar) * eps
            found = torch.cdist(flat, bank, compute_mode="donot_use_mm_for_euclid_dist")
            near, places = found.topk(min(self.k, len(bank)), largest=False)
            near, chosen = torch.cat([best, near], 1), torch.cat([rows, bank[places]], 1)
            best, order = near.topk(min(self.k, near.shape[1]), largest=False)
            rows = chosen.gather(1, order[:, :, None].expand(-1, -1, chosen.shape[2]))
        return rows

    def _chunks(self) -> list[Tensor]:
        """The bank in the denoiser's space, [n, D] at a time; encoded once."""
        if self._encoded is None:
            parts = self.images.split(CHUNK)
            self._encoded = [self.target.codec.encode(to_float(part)).flatten(1) for part in parts]
        return self._encoded
