"""Drawing many samples inside Lightning's predict loop: in blocks that are shared by processes and survive a stop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target, guidance_settings, sample
from lightning_mem.evaluation import draw_labels
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
        """Numbers of the missing blocks that fall to this process."""
        return self.missing[self.rank :: self.world_size]

    def __len__(self) -> int:
        return len(self.own())

    def __iter__(self) -> Iterator[Tensor]:
        return (self.blocks[number] for number in self.own())

    def assemble(self) -> SampleSet:
        """All blocks as one set, in order of addresses."""
        parts = [SampleSet.load(self.file(number)) for number in range(len(self.blocks))]
        labels = [part.labels for part in parts if part.labels is not None]
        return SampleSet(
            torch.cat([part.images for part in parts]),
            torch.cat([part.addresses for part in parts]),
            torch.cat(labels) if labels else None,
            parts[0].weights,
            self.settings,
        )

    def remove(self) -> None:
        """The blocks are in the assembled file."""
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


class Drawer(LightningModule):
    """Draws blocks of addresses inside Lightning's predict loop: its devices, processes, precision and bar.

    Args:
        target: What is drawn from.
        settings: Flat: sample_seed, num_steps, sampler, eta, block, target digest ...
        guidance: Score terms with ``settings``; their networks move with the target's.

    Its attribute ``settings`` is that of the SampleSets: the given ones and what identifies the guidance.
    """

    def __init__(self, target: Target, settings: dict[str, Any], guidance: Sequence[ScoreTerm] = ()) -> None:
        super().__init__()
        # registered, so that the strategy moves them
        self.network = getattr(target.denoiser, "module", None)
        networks = [getattr(term, "module", None) for term in guidance]
        self.terms = torch.nn.ModuleList(network for network in networks if network is not None)
        self.settings = {**settings, **guidance_settings(guidance)}
        self._target, self._guidance = target, tuple(guidance)

    def predict_step(self, addresses: Tensor) -> SampleSet:
        """The samples of these addresses."""
        self._target.device = self.device
        addresses, settings, target = addresses.cpu(), self.settings, self._target
        seed = settings["sample_seed"]
        labels = None if target.num_classes is None else draw_labels(target.num_classes, addresses, seed)
        images = sample(
            target,
            addresses,
            seed=seed,
            num_steps=settings["num_steps"],
            sampler=settings["sampler"],
            eta=settings["eta"],
            guidance=self._guidance,
            condition=labels,
            block=settings["block"],
        )
        return SampleSet(images, addresses, labels, target.weights, settings)


class BlockWriter(Callback):
    """Writes each block when it is drawn."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn which share is this process's."""
        self._blocks.rank, self._blocks.world_size = trainer.global_rank, trainer.world_size

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: SampleSet,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One file per block: a stop loses at most one."""
        outputs.save(self._blocks.file(int(batch[0] - self._blocks.blocks[0][0]) // BLOCK))
