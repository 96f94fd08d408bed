"""The ledger of copied images during training."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_mem.evaluation import Measurement, Reference
from lightning_mem.evaluation.ledger import update_ledger
from lightning_mem.types import SampleSet


class Ledger(Callback):
    """Writes ``ledger.csv`` after each evaluation; an evaluation done again replaces its rows."""

    def on_evaluation(
        self, trainer: Trainer, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
    ) -> None:
        """Called by SampleEvaluation on the first process."""
        update_ledger(Path(trainer.default_root_dir) / "ledger.csv", samples, reference, measurement, step)
