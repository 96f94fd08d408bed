"""Lightning's exponential moving average of the weights, updated in one fused call instead of one per parameter."""

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(EMAWeightAveraging):
    r"""Exponential moving average of the weights, :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta`.

    Lightning's ``EMAWeightAveraging`` (swapped in for validations, saved as the checkpoint's ``state_dict``), which
    hands torch the update of single parameters; for small networks that is most of its cost.

    Args:
        decay: d in [0, 1); 0.999 averages over about the last 1,000 steps.
        update_every_n_steps: Optimizer steps between updates.
        update_starting_at_step: First step that counts; null for the first.
        use_buffers: Average buffers too.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        use_buffers: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        super().__init__(
            use_buffers=use_buffers,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
        )
        self._decay = decay
        self._kwargs = {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
        self._pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the parameters of an earlier run; a network that waits for its data is built first."""
        self._pairs = None
        with warnings.catch_warnings():  # nothing here shards layers
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")
            super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's update, without walking through both modules at each step to find their parameters."""
        average, step = self._average_model, trainer.global_step
        if average is None or step <= self._latest_update_step or not self.should_update(step_idx=step - 1):
            return
        if self._pairs is None:
            average.update_parameters(pl_module)  # the first copies, and what is restored is found in place
            if not any(True for _ in pl_module.buffers()):
                self._pairs = (list(average.module.parameters()), list(pl_module.parameters()))
        else:
            with torch.no_grad():
                torch._foreach_lerp_(*self._pairs, 1 - self._decay)
                average.n_averaged += 1
        self._latest_update_step = step
