"""Drawing many samples inside Lightning's predict loop: in blocks that are shared by processes and survive a stop."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target, guidance_settings
from lightning_mem.evaluation.blocks import Blocks, draw_block
from lightning_mem.types import SampleSet


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
        return draw_block(self._target, addresses.cpu(), self.settings, self._guidance)


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
