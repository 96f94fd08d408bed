"""Pictures: the samples of an evaluation, and each beside its nearest training image."""

import math
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_mem.evaluation import Measurement, Reference
from lightning_mem.evaluation.pictures import closest_pairs, draw_pairs, draw_samples_sheet, pixels
from lightning_mem.types import SampleSet

Upload = Literal["none", "samples", "pairs"]


class Gallery(Callback):
    """Draws samples, and the closest pairs beside their nearest training image, after each evaluation.

    Files: ``images/samples_step000250.png`` and ``images/pairs_step000250.png``. Training images are private: W&B gets
    the samples; the pairs only with ``upload: pairs``.

    Args:
        pairs: How many pairs to draw, the closest first.
        upload: What W&B receives: ``none``, ``samples``, or ``pairs`` (samples, and a table with the training image,
            its index, distance and ratio).
    """

    def __init__(self, pairs: int = 32, upload: Upload = "samples") -> None:
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {pairs}")
        self.pairs, self.upload = pairs, upload

    def on_evaluation(
        self, trainer: Trainer, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
    ) -> None:
        """Called by SampleEvaluation on the first process."""
        folder = Path(trainer.default_root_dir) / "images"
        share = measurement.memorized.double().mean().item()
        sheet, pairs = folder / f"samples_step{step:06d}.png", folder / f"pairs_step{step:06d}.png"
        draw_samples_sheet(samples, f"samples at step {step} ({samples.weights})", sheet)
        places = closest_pairs(measurement, self.pairs)
        title = (
            f"step {step}: sample | nearest training image: #index, RMS-L2 (ratio to the second nearest); "
            f"red: copies ({share:.1%} of {len(samples)})"
        )
        draw_pairs(samples, reference, measurement, places, title, pairs)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and self.upload != "none":
                logger.log_image("gallery/samples", [str(sheet)], step=step)
                if self.upload == "pairs":
                    self._log_table(logger, samples, reference, measurement, places, step)

    def _log_table(
        self,
        logger: WandbLogger,
        samples: SampleSet,
        reference: Reference,
        measurement: Measurement,
        places: Tensor,
        step: int,
    ) -> None:
        import wandb

        scale = math.sqrt(samples.images[0].numel())
        rows = []
        for place in places.tolist():
            row = measurement.nearest[place]
            first, second = measurement.distances[place, :2].tolist()
            rows.append(
                [
                    int(samples.addresses[place]),
                    int(reference.indices[reference.owners[row]]),
                    wandb.Image(pixels(samples.images[place])),
                    wandb.Image(pixels(reference.members[row])),
                    first / scale,
                    first / second,
                ]
            )
        columns = ["sample", "index", "image", "nearest member", "distance", "ratio"]
        logger.log_table("gallery/pairs", columns=columns, data=rows, step=step)
