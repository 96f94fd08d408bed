"""How the rows of one measurement are dealt out to processes, without the result noticing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_mem.data.datamodule import BLOCK

Gather = Callable[[Tensor], Tensor]
"""Collects [...] of every process as [world, ...]."""


@dataclass(frozen=True)
class Workers:
    """How the rows of one measurement are dealt out; by default this process does all.

    Args:
        rank: This process.
        world_size: Number of processes.
        gather: Collects one tensor of every process as [world, ...].
        pause: Called between blocks; may raise to stop at a clean point.
        device: Where features, neighbours and statistics are computed.
    """

    rank: int = 0
    world_size: int = 1
    gather: Gather = lambda rows: rows[None]
    pause: Callable[[], None] = lambda: None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def in_blocks(
        self, count: int, compute: Callable[[Tensor], Tensor], block: int = BLOCK, label: str | None = None
    ) -> Tensor:
        """Rows 0 .. count-1 computed in blocks of one shape, dealt out, and put together in order.

        The result does not depend on the number of processes: every process computes as many blocks as the others
        (collectives meet) and what was computed twice is dropped by its place.
        """
        blocks = torch.arange(-(-count // block) * block).clamp(max=count - 1).split(block)
        rounds = -(-len(blocks) // self.world_size)
        own = []
        # a bar where someone is looking and waits
        hidden = None if label is not None and self.rank == 0 and rounds > 1 else True
        for turn in tqdm(range(rounds), label, leave=False, delay=2, disable=hidden):
            self.pause()
            own.append(compute(blocks[(self.rank + turn * self.world_size) % len(blocks)]))
        found = self.gather(torch.stack(own))  # [world, rounds, block, ...]
        return found.transpose(0, 1).flatten(0, 2)[:count]

    def share(self, count: int, block: int = BLOCK) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """This process's blocks of rows 0 .. count-1 as one list, and what puts everybody's results together again.

        Alone, a process has all rows once, in order; among others, each has equally many whole blocks.
        """
        if self.world_size == 1:
            return torch.arange(count), lambda found: found
        blocks = torch.arange(-(-count // block) * block).clamp(max=count - 1).split(block)
        rounds = -(-len(blocks) // self.world_size)
        own = torch.cat([blocks[(self.rank + turn * self.world_size) % len(blocks)] for turn in range(rounds)])

        def together(found: Tensor) -> Tensor:
            parts = self.gather(found)  # [world, rounds * block, ...]
            return parts.unflatten(1, (rounds, block)).transpose(0, 1).flatten(0, 2)[:count]

        return own, together
