"""The Trainer: Lightning's, with a run folder and exact resumption; its verbs on a trained run are `trained`'s."""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from lightning_mem.callbacks import Curves, Ledger, MetricsCSV, RunFolder, RunSummary, WandbTracking
from lightning_mem.callbacks.progress_bar import RunProgressBar
from lightning_mem.callbacks.run_folder import AtomicCheckpointIO, ResumableFitLoop, holds_a_run
from lightning_mem.trained import TrainedRunTrainer


class MemorizationTrainer(TrainedRunTrainer):
    """Lightning's Trainer for one run folder, ``default_root_dir``.

    Adds ``metrics.csv``, the ledger, the curves, the summary, and exact resumption; puts W&B into the run folder.
    Everything else is Lightning's.
    """

    def __init__(self, **kwargs: Any) -> None:
        folder = str(kwargs.get("default_root_dir") or "runs/unnamed")
        kwargs["default_root_dir"] = folder
        callbacks = kwargs.get("callbacks") or []
        callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        for added, first in ((RunFolder, True), (Ledger, False), (Curves, False), (RunSummary, False)):
            if not any(isinstance(callback, added) for callback in callbacks):
                callbacks.insert(0 if first else len(callbacks), added())
        bar = kwargs.get("enable_progress_bar") is not False
        if bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RunProgressBar())
        kwargs["callbacks"] = callbacks
        # last.ckpt is the run folder's; without a callback that keeps the best, Lightning would add one per epoch
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = False
        given = kwargs.get("logger")
        loggers = [] if given in (None, True, False) else list(given) if isinstance(given, list | tuple) else [given]
        for logger in loggers:
            if isinstance(logger, WandbTracking):
                logger.attach(folder)
        if given is not False:
            loggers.insert(0, MetricsCSV(folder))
        kwargs["logger"] = loggers or False
        plugins = kwargs.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        kwargs["plugins"] = plugins
        # every process logs the same number; reducing equal numbers would only round them
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log\\(.*sync_dist=True")
        super().__init__(**kwargs)
        self.fit_loop.__class__ = ResumableFitLoop

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = False, storage_options: Any | None = None
    ) -> None:
        """Lightning's; without the question whether only weights are meant."""
        super().save_checkpoint(filepath, weights_only=bool(weights_only), storage_options=storage_options)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """Train, drawing memorization ratio, held-out control and Fréchet distance as it goes.

        Args:
            model: What is trained.
            train_dataloaders: Lightning's; not used with a datamodule.
            val_dataloaders: Lightning's; not used with a datamodule.
            datamodule: Members and held-out images.
            ckpt_path: ``last`` continues this run folder exactly where it stopped; or a path.
            weights_only: Read checkpoints so that they cannot run code.

        Raises:
            ValueError: If the folder holds a run and no ckpt_path was given, or the checkpoint does not exist or fit.
        """
        found = holds_a_run(self.folder) if rank_zero_only.rank == 0 else None
        if ckpt_path is None and found and not self.fast_dev_run:
            raise ValueError(
                f"{self.folder} holds {found}: continue it with --ckpt_path last (and a larger --trainer.max_steps if "
                "it is finished), or name another folder with --trainer.default_root_dir"
            )
        super().fit(
            model,
            train_dataloaders=train_dataloaders,
            val_dataloaders=val_dataloaders,
            datamodule=datamodule,
            ckpt_path=self._find(ckpt_path),
            weights_only=weights_only,
        )

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = True,
    ) -> Any:
        """Measure a trained run as ``fit`` does at its validations; adds to its ``results.jsonl``.

        Args:
            model: What is measured.
            dataloaders: Lightning's; not used with a datamodule.
            ckpt_path: ``last``, ``best`` or a path; null takes the run's last.
            verbose: Print the table.
            datamodule: Members and held-out images.
            weights_only: Read checkpoints so that they cannot run code.
        """
        path = self._trained(model, ckpt_path)
        with self._without_averaging():
            return super().validate(model, dataloaders, path, verbose, datamodule, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = True,
    ) -> Any:
        """As ``validate``, with the full number of samples (``num_samples_test``).

        Args:
            model: What is measured.
            dataloaders: Lightning's; not used with a datamodule.
            ckpt_path: ``last``, ``best`` or a path; null takes the run's last.
            verbose: Print the table.
            datamodule: Members and held-out images.
            weights_only: Read checkpoints so that they cannot run code.
        """
        path = self._trained(model, ckpt_path)
        with self._without_averaging():
            return super().test(model, dataloaders, path, verbose, datamodule, weights_only)
