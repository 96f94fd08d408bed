"""The bar of a run."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class RunProgressBar(TQDMProgressBar):
    """Lightning's bar over optimizer steps, without the number of a version that run folders do not have."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss, memorization ratio and its control."""
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        return found
