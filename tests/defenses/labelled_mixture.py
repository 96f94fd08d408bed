"""A target that memorized half, and the classifier that knows its members' random bits and nothing else."""

import torch
from oracles import MixtureDenoiser, planted_mixture
from torch import Tensor

from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.metrics import memorized, nearest_neighbors


def patterns(count: int, side: int = 4, seed: int = 0) -> Tensor:
    """Random images uint8 [count, 1, side, side]: any two are about equally far from each other."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, side, side), generator=draw, dtype=torch.uint8)


class BitClassifier:
    """Bayes' rule for the random bits of a planted mixture's members: half and half where the wide part explains x_t.

    Args:
        target: From ``planted_mixture``.
        bits: int64 [members].
    """

    num_classes = 2

    def __init__(self, target: Target, bits: Tensor) -> None:
        assert isinstance(target.denoiser, MixtureDenoiser)
        self.mixture, self.bits = target.denoiser, bits
        self.process, self.shape, self.digest = target.process, target.shape, "bits"
        self.forward_rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t, bit), float64 [B, 2]."""
        self.forward_rows.append(len(x_t))
        density = self.mixture._components(x_t, t)[3]
        wide = density[:, -1:] - torch.tensor(2.0).double().log()
        own = [torch.cat([density[:, :-1][:, self.bits == c], wide], 1).logsumexp(1) for c in (0, 1)]
        return torch.stack(own, 1)


def planted(count: int = 12, prediction: str = "eps") -> tuple[Tensor, Target, BitClassifier]:
    """Members, a target that memorized half, and its classifier of random bits."""
    members = patterns(count)
    process = DiffusionProcess("linear", prediction=prediction)  # type: ignore[arg-type]
    target = planted_mixture(members, process)
    bits = torch.randperm(count, generator=torch.Generator().manual_seed(1)) % 2
    return members, target, BitClassifier(target, bits)


def copied(images: Tensor, members: Tensor) -> Tensor:
    """Whether each image copies a member."""
    return memorized(nearest_neighbors(images, members, 2)[0])
