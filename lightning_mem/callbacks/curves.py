"""The curve of a run, drawn while it trains."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_mem.evaluation import Measurement, Reference
from lightning_mem.evaluation.curves import draw_curves
from lightning_mem.records import read_records
from lightning_mem.types import SampleSet


class Curves(Callback):
    """Draws ``images/curves.png`` after each evaluation, from the records."""

    def on_evaluation(
        self, trainer: Trainer, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
    ) -> None:
        """Called by SampleEvaluation on the first process."""
        folder = Path(trainer.default_root_dir)
        records = [r for r in read_records(folder / "results.jsonl") if r.weights == samples.weights]
        draw_curves({folder.name: records}, folder / "images" / "curves.png", str(folder))
