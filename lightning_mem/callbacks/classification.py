"""Accuracies of a classifier as records, each with its interval."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lightning_mem.data import MemorizationDataModule
from lightning_mem.evaluation.numbers import WILSON
from lightning_mem.metrics import wilson_interval
from lightning_mem.modules import AbstractClassifierModule
from lightning_mem.records import Record, write_records
from lightning_mem.types import Weights


class ClassifierRecords(Callback):
    """Writes what a classifier counted at a validation into ``results.jsonl``: accuracy per timestep bin.

    Of a RandomLabelModule also the share that its gate acts on.

    Of the averaged weights where there are any. Costs nothing: the validation counted already.

    Raises:
        ValueError: If the module is no classifier.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that counts nothing."""
        if not isinstance(pl_module, AbstractClassifierModule):
            raise ValueError(
                f"ClassifierRecords needs a SurrogateModule or RandomLabelModule, got a {type(pl_module).__name__}"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On the first process, one record per timestep bin and part of the data."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if not isinstance(data, MemorizationDataModule) or not isinstance(pl_module, AbstractClassifierModule):
            return
        fitting = trainer.state.fn == "fit"
        averaged = fitting and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        weights: Weights = "ema" if averaged else pl_module.restored_weights
        step = trainer.global_step if fitting else pl_module.restored_step
        records = []
        for name, (hits, count) in pl_module.hits.items():
            low, high = wilson_interval(hits, count)
            definition = {
                "images": "members" if "_members" in name else "heldout",
                "source": data.source.name,
                **pl_module.describe(),
                "interval_method": WILSON,
            }
            records.append(
                Record(
                    name, hits / count, n=count, step=step, low=low, high=high, weights=weights,
                    definition=definition, data_digest=data.members.digest,
                    config_digest=getattr(trainer, "config_digest", ""), run=Path(trainer.default_root_dir).name,
                )
            )  # fmt: skip
        write_records(Path(trainer.default_root_dir) / "results.jsonl", records)

    on_test_end = on_validation_end
