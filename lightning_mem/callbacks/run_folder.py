"""The run folder: what may start there, what is left behind at any stop, and a resume that equals no stop at all."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mem.callbacks.tracking import MetricsCSV
from lightning_mem.data import MemorizationDataModule
from lightning_mem.evaluation.ledger import drop_ledger_rows
from lightning_mem.records import atomic_write, drop_records


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a full disk leaves the previous one intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Replace ``path`` in one move.

        Raises:
            OSError: As the file system reports it; it names the checkpoint that is still there.
        """
        try:
            with atomic_write(path, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            kept = f"the previous {path} is intact" if Path(path).exists() else "no checkpoint was there before"
            raise OSError(f"the checkpoint {path} could not be written ({error}); {kept}") from error


class ResumableFitLoop(_FitLoop):
    """Lightning's fit loop, except that an evaluation cut off after the last step is made up for on resume."""

    @property
    def done(self) -> bool:
        """As Lightning's, but not while a restored run still owes an evaluation."""
        if self.restarting and self.epoch_loop.val_loop.batch_progress.total.ready == PENDING["ready"]:
            owed = self.epoch_loop.val_loop.batch_progress.total
            if owed.started == PENDING["started"] and owed.processed == PENDING["processed"]:
                return False
        return super().done


# How Lightning's evaluation loop looks when it was cut off in its first batch: it starts over on resume.
PENDING = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _count(value: int) -> dict[str, int]:
    return {"ready": value, "started": value, "processed": value, "completed": value}


def canonical_progress(state: dict[str, Any], pending_validation: bool) -> None:
    """Rewrite the saved progress of a fit loop to the one form Lightning resumes from without a slip.

    A checkpoint may be written after a batch, after a validation, inside one, or at the end of training, and
    Lightning's counters differ in each case (an epoch that ``max_steps`` cut short even counts as complete). All of
    them mean the same: so many batches are done, so many in this epoch, and a validation is owed or not.

    Args:
        state: ``checkpoint["loops"]["fit_loop"]``, changed in place.
        pending_validation: The validation after the last batch was due and did not finish.
    """
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    started = epochs["total"]["ready"]
    mid_epoch = not batches["is_last_batch"] and batches["current"]["processed"] > 0
    batches["total"] = _count(batches["total"]["processed"])
    batches["current"] = _count(batches["current"]["processed"] if mid_epoch else 0)
    batches["is_last_batch"] = False
    for part in ("total", "current"):
        epochs[part] = _count(started)
        if mid_epoch:
            epochs[part] |= {"processed": started - 1, "completed": started - 1}
    validation = state["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        validation[part] = dict(PENDING) if pending_validation else _count(0)
    validation["is_last_batch"] = False


class RunFolder(Callback):
    """Keeps the run folder: ``members.json``, ``checkpoints/last.ckpt`` and exact resumption.

    The Trainer of this package puts it first, before any averaging callback: at the end of training it must save
    before the averaged weights are copied over the raw ones. SIGTERM and Ctrl-C let the step finish, save, and leave;
    a second Ctrl-C aborts at once.
    """

    def __init__(self) -> None:
        self._pending_validation = False
        self._interrupt: Any = None
        self.received_signal: int | None = None

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Whether the checkpoint owes the validation of its step."""
        return {"pending_validation": self._pending_validation}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring progress into canonical form and cut the run's files back to the checkpoint's step."""
        if trainer.state.fn != "fit":
            return
        own = checkpoint.get("callbacks", {}).get(self.state_key, {})
        pending = bool(own.get("pending_validation", False))
        canonical_progress(checkpoint["loops"]["fit_loop"], pending)
        if trainer.is_global_zero:
            step = checkpoint["global_step"]
            folder = Path(trainer.default_root_dir)
            measured_until = step - 1 if pending else step
            drop_records(folder / "results.jsonl", measured_until)
            drop_ledger_rows(folder / "ledger.csv", measured_until)
            (folder / "summary.json").unlink(missing_ok=True)
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.drop_after(step, keep_validation=not pending)

    # --- setup and teardown ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only ``fit`` continues ``metrics.csv``."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.active = stage == "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C: it should end the step, not tear it."""
        if threading.current_thread() is threading.main_thread():
            self._interrupt = signal.signal(signal.SIGINT, lambda number, frame: self._stop_softly(trainer, frame))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
            self._interrupt = None

    def _stop_softly(self, trainer: Trainer, frame: FrameType | None) -> None:
        if self.received_signal is not None:
            raise KeyboardInterrupt
        self.received_signal = signal.SIGINT
        rank_zero_info("\nCtrl-C: finishing this step, then saving. Press again to abort at once.")
        # Lightning's own flag: every loop looks at it at the points where nothing is half done
        trainer._signal_connector.received_sigterm = True

    # --- during training ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``members.json``."""
        data = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero and isinstance(data, MemorizationDataModule):
            data.write_members(Path(trainer.default_root_dir))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lightning counts a resumed iteration twice in the step its loggers go by; it is the optimizer's again."""
        self._pending_validation = False
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every logged row carries the number of optimizer steps done, the same for all loggers."""
        if trainer._logger_connector.should_update_logs:
            pl_module.log("step", float(trainer.global_step), on_step=True, on_epoch=False)
        fetcher = trainer.fit_loop._data_fetcher
        self._pending_validation = fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for training rows."""
        step = trainer.global_step if trainer.state.fn == "fit" else getattr(pl_module, "restored_step", 0)
        pl_module.log("step", float(step), on_step=False, on_epoch=True, rank_zero_only=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each validation; averaged weights are swapped out again by now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._pending_validation = False
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the true last step."""
        self._pending_validation = False
        self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the loops stopped at a clean point; otherwise say what is there."""
        if trainer.state.fn != "fit":
            return
        last = self.last_path(trainer)
        if isinstance(exception, SIGTERMException):
            exception.signal = self.received_signal or signal.SIGTERM  # type: ignore[attr-defined]
            if trainer.validating:  # the averaged weights are in the module: a checkpoint would exchange the two
                for callback in trainer.callbacks:
                    if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                        callback._swap_models(pl_module)
            self._save_last(trainer)
            rank_zero_info(f"stopped after step {trainer.global_step}; --ckpt_path last continues ({last})")
        elif last.exists():
            rank_zero_info(f"stopped by {type(exception).__name__}; the last good checkpoint is {last}")

    @staticmethod
    def last_path(trainer: Trainer) -> Path:
        """Where ``last.ckpt`` is."""
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    def _save_last(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.last_path(trainer))


def holds_a_run(folder: str | os.PathLike[str]) -> str | None:
    """What says that a folder holds a run, finished or not; null when it may be used."""
    folder = Path(folder)
    if (folder / "summary.json").exists():
        return "a finished run (summary.json)"
    for name in ("checkpoints/last.ckpt", "metrics.csv", "results.jsonl"):
        if (folder / name).exists():
            return f"an unfinished run ({name})"
    return None
