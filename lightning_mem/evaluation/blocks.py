"""A draw in blocks: what is on disk is not drawn again, and whoever draws a block draws the same one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target, gate_rates, sample
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.types import SampleSet


class Blocks:
    """The addresses of a draw in blocks; what is on disk already is not drawn again."""

    def __init__(self, folder: Path, first: int, count: int, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.blocks = torch.arange(first, first + count).split(BLOCK)
        self.missing = [number for number in range(len(self.blocks)) if not self._is_done(number)]
        if len(self.missing) < len(self.blocks):
            rank_zero_info(f"{len(self.blocks) - len(self.missing)} of {len(self.blocks)} blocks are there: continuing")
        self.rank, self.world_size = 0, 1

    def file(self, number: int) -> Path:
        """Where a block is written."""
        return self.folder / f"{number:08d}.npz"

    def _is_done(self, number: int) -> bool:
        if not self.file(number).exists():
            return False
        found = SampleSet.load(self.file(number))
        if found.settings != self.settings:
            raise ValueError(
                f"{self.folder} holds blocks of another draw ({found.settings}), this one is {self.settings}: "
                "remove it or choose another --out"
            )
        return torch.equal(found.addresses, self.blocks[number])

    def own(self) -> list[int]:
        """Numbers of the missing blocks that fall to this process.

        Where there are fewer than processes, the others draw the first one too: Lightning refuses a process without
        work, and whoever draws a block writes the same one.
        """
        return self.missing[self.rank :: self.world_size] or self.missing[:1]

    def __len__(self) -> int:
        return len(self.own())

    def __iter__(self) -> Iterator[Tensor]:
        return (self.blocks[number] for number in self.own())

    def assemble(self) -> SampleSet:
        """All blocks as one set, in order of addresses."""
        parts = [SampleSet.load(self.file(number)) for number in range(len(self.blocks))]
        labels = [part.labels for part in parts if part.labels is not None]
        rates = [part.gate_rate for part in parts if part.gate_rate is not None]
        return SampleSet(
            torch.cat([part.images for part in parts]),
            torch.cat([part.addresses for part in parts]),
            torch.cat(labels) if labels else None,
            parts[0].weights,
            self.settings,
            torch.cat(rates) if len(rates) == len(parts) else None,
        )

    def remove(self) -> None:
        """The blocks are in the assembled file."""
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


def draw_block(
    target: Target, addresses: Tensor, settings: dict[str, Any], guidance: Sequence[ScoreTerm] = ()
) -> SampleSet:
    """The samples of these addresses, with the gate rates of protections that tell.

    Args:
        target: What is drawn from.
        addresses: int64 [B] on the CPU.
        settings: Flat: sample_seed, num_steps, sampler, eta, block; they become the set's.
        guidance: Score terms, added in turn.
    """
    seed = settings["sample_seed"]
    labels = None if target.num_classes is None else draw_labels(target.num_classes, addresses, seed)
    images = sample(
        target,
        addresses,
        seed=seed,
        num_steps=settings["num_steps"],
        sampler=settings["sampler"],
        eta=settings["eta"],
        guidance=guidance,
        condition=labels,
        block=settings["block"],
    )
    return SampleSet(images, addresses, labels, target.weights, settings, gate_rates(guidance, addresses))


def drawn_before(file: Path, first: int, count: int, settings: dict[str, Any]) -> SampleSet | None:
    """The finished draw in a file; null where there is none.

    Raises:
        ValueError: If the file holds another draw.
    """
    if not file.is_file():
        return None
    found = SampleSet.load(file)
    if found.settings != settings or not torch.equal(found.addresses, torch.arange(first, first + count)):
        raise ValueError(
            f"{file} holds another draw ({len(found)} samples, {found.settings}) than this one ({count} from "
            f"{first} on, {settings}): remove it or choose another --out"
        )
    return found
