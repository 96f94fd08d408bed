"""Draw one set of samples, feed it to every metric, during training."""

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation import (
    Measure,
    Measurement,
    MetricName,
    Reference,
    Rules,
    Workers,
    cache_folder,
    draw_samples,
)
from lightning_mem.records import write_records
from lightning_mem.types import SampleSet, Weights


class Listener(Protocol):
    """A callback that wants to see the samples of an evaluation (gallery, ledger)."""

    def on_evaluation(
        self, trainer: Trainer, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
    ) -> None:
        """Called on the first process after the records were written."""


def workers_of(trainer: Trainer) -> Workers:
    """How a Trainer deals out the rows of a measurement; a stop signal ends it between blocks."""

    def gather(rows: Tensor) -> Tensor:
        found = trainer.strategy.all_gather(rows)
        return found if trainer.world_size > 1 else found[None]

    def pause() -> None:
        stop = bool(trainer.received_sigterm)
        if trainer.world_size > 1:
            flags = trainer.strategy.all_gather(torch.tensor(stop, device=trainer.strategy.root_device))
            stop = bool(flags.any())
        if stop:
            raise SIGTERMException

    return Workers(trainer.global_rank, trainer.world_size, gather, pause, trainer.strategy.root_device)


class SampleEvaluation(Callback):
    """Measures memorization, its held-out control and Fréchet distances at Lightning's validations.

    Works in any LightningModule that has ``target()``. Runs before the first validation batch, when an averaging
    callback has its weights swapped in, so the numbers do not depend on the order of the callbacks. Draws every time
    from the same starting noise (a paired curve) and never from a generator that training uses. Cost:
    ``num_samples * num_steps`` network evaluations a time, shared by all processes; printed at the start of ``fit``.

    Args:
        num_samples: Samples of one evaluation.
        num_samples_test: Samples under ``test``; null takes ``num_samples``.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        seed: Of the starting noise and of labels.
        threshold: Of the memorization ratio, in (0, 1); the literature uses 1/3.
        extractors: Feature spaces of Fréchet distance and the like: ``pixels``, ``inception`` (the original FID
            network), ``inception-64``, ``timm/<model>``, or ``sscd``.
        extractor_weights: Local weight file per extractor name; without it weights come from their own address.
        metrics: Families of numbers to measure, see the README; null takes a cheap set of them. The ratio always is.
        delta: RMS-L2 on [0, 1] up to which a training image counts as extracted, in (0, 1); the literature uses 0.15.
        cache_dir: Folder where features of reference images are kept; ``auto`` takes the environment's
            LIGHTNING_MEM_CACHE, else ``~/.cache/lightning_mem``; null keeps none.
        log_spaced: Evaluate at this many log-spaced validations (and the last) instead of every one.
        raw: Also measure the raw weights where there are averaged ones, under ``raw/``; doubles the cost.
        reference: Images to compare with when the run has no MemorizationDataModule (Python only).
    """

    def __init__(
        self,
        num_samples: int = 512,
        num_samples_test: int | None = None,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        threshold: float = 1 / 3,
        extractors: list[str] | None = None,
        extractor_weights: dict[str, str] | None = None,
        metrics: list[MetricName] | None = None,
        delta: float = 0.15,
        cache_dir: str | None = "auto",
        log_spaced: int | None = None,
        raw: bool = False,
        reference: Any = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_steps", num_steps), ("log_spaced", log_spaced)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_samples, self.num_samples_test = num_samples, num_samples_test
        self.num_steps, self.sampler, self.eta = num_steps, sampler, eta
        self.seed, self.rules, self.raw = seed, Rules(threshold, delta), raw
        self.extractors = ["pixels"] if extractors is None else extractors
        self.extractor_weights = extractor_weights
        self.metrics, self.cache_dir = metrics, cache_dir
        self.log_spaced = log_spaced
        self.reference: Reference | None = reference
        self._measure: Measure | None = None
        self._seconds = 0.0
        self._drawing, self._measuring = 0.0, 0.0
        self._train_start = 0.0
        self._values: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build extractors now: a missing weight file should stop the run before it trains."""
        if stage == "predict":  # drawing samples only
            return
        if not hasattr(pl_module, "target"):
            raise ValueError(f"SampleEvaluation needs a module with target(), {type(pl_module).__name__} has none")
        if self._measure is None:
            reference = self._reference(trainer)
            if len(reference.heldout) == 0:
                self._refuse_monitors_of_the_control(trainer)
                rank_zero_warn("no held-out images: the memorization ratio has no control in this run")
            self._measure = Measure(
                reference,
                self.extractors,
                self.extractor_weights,
                self.rules.threshold,
                workers_of(trainer),
                self.metrics,
                self.rules.delta,
                cache_folder(self.cache_dir),
            )

    @staticmethod
    def _refuse_monitors_of_the_control(trainer: Trainer) -> None:
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.endswith("heldout"):
                raise ValueError(
                    f"{type(callback).__name__} monitors {monitor}, which does not exist without held-out images: set "
                    "data.num_heldout, or monitor another key (frechet/<extractor>/train, val/loss_members)"
                )

    def _reference(self, trainer: Trainer) -> Reference:
        data = getattr(trainer, "datamodule", None)
        if self.reference is not None:
            return self.reference
        if isinstance(data, MemorizationDataModule):
            return Reference.from_datamodule(data)
        raise ValueError(
            "SampleEvaluation needs images to compare with: a MemorizationDataModule, or "
            "reference=Reference.from_images(members, heldout)"
        )

    def state_dict(self) -> dict[str, Any]:
        """The last values: a resumed run's callbacks monitor them until the next evaluation."""
        return {"values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last values."""
        self._values = dict(state_dict["values"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what one evaluation costs."""
        known = {name: torch.tensor(value) for name, value in self._values.items()}
        trainer.callback_metrics.update({k: v for k, v in known.items() if k not in trainer.callback_metrics})
        self._train_start, self._seconds = time.monotonic(), 0.0
        self._drawing, self._measuring = 0.0, 0.0
        every = trainer.val_check_batch
        calls = self.num_samples * self.num_steps * (2 if self.sampler == "heun" else 1)
        calls *= 2 if self.raw and self._averaging(trainer) is not None else 1
        message = (
            f"one evaluation: {self.num_samples} samples x {self.num_steps} {self.sampler} steps = {calls:,} network "
            f"evaluations in {calls // BLOCK:,} calls of {BLOCK}"
        )
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, MemorizationDataModule) and every and every != float("inf") and self.log_spaced is None:
            # forward and backward of one training image cost about three evaluations
            training = 3 * data.batch_size * int(every)
            message += f", about {calls / (calls + training):.0%} of the network's work at every {every} steps"
        rank_zero_info(message)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this validation is measured."""
        if trainer.sanity_checking:
            return False
        if self.log_spaced is None or trainer.state.fn != "fit":
            return True
        every, last = trainer.val_check_batch, trainer.max_steps
        if not every or every == float("inf") or last < 1:
            raise ValueError("log_spaced needs trainer.max_steps and an integer trainer.val_check_interval")
        number, count = trainer.global_step // int(every), max(last // int(every), 1)
        chosen = {round(math.exp(x)) for x in torch.linspace(0, math.log(count), self.log_spaced).tolist()}
        return number in chosen or number == count

    @staticmethod
    def _averaging(trainer: Trainer) -> WeightAveraging | None:
        found = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
        return found[0] if found else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure before the first batch: every callback's swap has happened by now."""
        if batch_idx == 0 and dataloader_idx == 0 and self.is_due(trainer):
            self._evaluate(trainer, pl_module, self.num_samples)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation, with the full number of samples."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._evaluate(trainer, pl_module, self.num_samples_test or self.num_samples)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> None:
        start = time.monotonic()
        fitting = trainer.state.fn == "fit"
        step = trainer.global_step if fitting else getattr(pl_module, "restored_step", 0)
        averaging = self._averaging(trainer) if fitting else None
        weights: Weights = "ema" if averaging is not None else getattr(pl_module, "restored_weights", "raw")
        values = self._draw_and_measure(trainer, pl_module, num_samples, step, weights, "")
        if self.raw and averaging is not None:
            averaging._swap_models(pl_module)
            try:
                values |= self._draw_and_measure(trainer, pl_module, num_samples, step, "raw", "raw/")
            finally:
                averaging._swap_models(pl_module)
        seconds = time.monotonic() - start
        self._seconds += seconds
        self._values = dict(values)
        values["time/evaluation_seconds"] = seconds
        values["time/metrics_share"] = self._measuring / max(self._drawing, 1e-9)
        if fitting:
            values["time/evaluation_share"] = self._seconds / max(time.monotonic() - self._train_start, 1e-9)
        for name, value in values.items():
            shown = name in ("memorization/ratio", "memorization/ratio_heldout")
            # every process holds the same number: nothing to reduce
            pl_module.log(name, value, on_step=False, on_epoch=True, prog_bar=shown, rank_zero_only=False)

    def _draw_and_measure(
        self, trainer: Trainer, pl_module: Any, num_samples: int, step: int, weights: Weights, prefix: str
    ) -> dict[str, float]:
        if self._measure is None:
            raise ValueError("SampleEvaluation was not set up: run it in a Trainer")
        target: Target = pl_module.target()
        target.weights = weights
        start = time.monotonic()
        with trainer.precision_plugin.forward_context():
            samples = draw_samples(
                target,
                num_samples,
                seed=self.seed,
                num_steps=self.num_steps,
                sampler=self.sampler,
                eta=self.eta,
                workers=self._measure.workers,
            )
        self._drawing += time.monotonic() - start
        folder = Path(trainer.default_root_dir)
        measurement = self._measure(
            samples,
            step=step,
            prefix=prefix,
            config_digest=getattr(trainer, "config_digest", ""),
            run=folder.name,
            seed=self.seed,
        )
        self._measuring += measurement.seconds
        if trainer.is_global_zero:
            write_records(folder / "results.jsonl", measurement.records)
            samples.save(folder / "samples" / f"{prefix.replace('/', '_')}last.npz")
            for callback in trainer.callbacks:
                if not prefix and hasattr(callback, "on_evaluation"):
                    callback.on_evaluation(trainer, samples, self._measure.reference, measurement, step)
        return measurement.values()
