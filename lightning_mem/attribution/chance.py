"""The baseline that knows nothing: scores by chance."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.randomness import generator
from lightning_mem.records import digest


class RandomScores(AbstractAttribution):
    """Standard normal scores: what a method has to beat.

    Args:
        seed: Of the draw; query q has its own address.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Of the seed; see :class:`AbstractAttribution`."""
        return digest(self.name, self.seed)

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """See :class:`AbstractAttribution`."""
        count = len(scene.reference().indices)
        rows = [
            torch.randn(count, generator=generator(self.seed, "random scores", queries.kind, address))
            for address in queries.addresses.tolist()
        ]
        return torch.stack(rows).double()
