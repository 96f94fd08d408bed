"""The command line: LightningCLI, with our verbs, our run folder, and errors in one line."""

import os
import sys
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_mem.data import LabelRule, MemorizationDataModule, classes_of
from lightning_mem.modules import AbstractModule
from lightning_mem.records import digest
from lightning_mem.trainer import MemorizationTrainer


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder when ``fit`` starts, and sends the configuration to W&B once."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only ``fit`` claims the folder; a resumed run may have changed max_steps."""
        self.overwrite = True
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first process."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, skip_link_targets=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def _conditioning(labels: LabelRule, num_classes: int | None, num_members: int | None, source: Any) -> int | None:
    """Labels that the data rule leads to, as far as the configuration says."""
    if labels == "true" and num_classes is None:
        path = getattr(source, "class_path", None) or (source or {}).get("class_path", "DigitsSource")
        known = {"DigitsSource": 10, "CIFAR10Source": 10, "CelebASource": 2}.get(str(path).rsplit(".", 1)[-1])
        if known is None:
            raise ValueError("data.labels true needs data.num_classes (the number of subfolders) for this source")
        return known
    return classes_of(labels, num_classes=num_classes, num_members=num_members or 0, source_classes=num_classes)


class MemorizationCLI(LightningCLI):
    """LightningCLI with the model by class_path and the one data module by plain keys."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs, and ours on a trained run; the sets name arguments that are not options."""
        return {
            **LightningCLI.subcommands(),
            "predict": {"model", "datamodule"},
            "sample": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sizes are said once, in the data."""
        parser.link_arguments("data.image_size", "model.init_args.image_size")
        parser.link_arguments("data.channels", "model.init_args.channels")
        parser.link_arguments(
            ("data.labels", "data.num_classes", "data.num_members", "data.source"),
            "model.init_args.num_classes",
            compute_fn=_conditioning,
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning lets hyper-parameters of a checkpoint beat the command line; our checkpoints hold none."""

    def after_instantiate_classes(self) -> None:
        """What decides the numbers: model, data and seed; not the folder, nor how long it trains."""
        config = yaml.safe_load(self._parser(self.subcommand).dump(self.config[str(self.subcommand)]))
        self.trainer.config_digest = digest(*[config.get(key) for key in ("model", "data", "seed_everything")])


def run(args: ArgsType = None) -> MemorizationCLI:
    """Parse and run; errors propagate. For tests and notebooks."""
    return MemorizationCLI(
        AbstractModule,
        MemorizationDataModule,
        save_config_callback=SaveRunConfig,
        trainer_class=MemorizationTrainer,
        trainer_defaults={
            "enable_autolog_hparams": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "check_val_every_n_epoch": None,
            "val_check_interval": 1000,
            "max_steps": 10000,
        },
        seed_everything_default=0,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """The console script: a user's mistake is one line on the screen, not a traceback.

    Args:
        args: Command line; null takes the process's own.
    """
    try:
        run(args)
    except SIGTERMException as stop:
        sys.exit(128 + int(getattr(stop, "signal", 15)))
    except (ValueError, OSError, RuntimeError, ArithmeticError, MisconfigurationException) as error:
        if os.environ.get("LIGHTNING_MEM_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(LIGHTNING_MEM_TRACEBACK=1 shows where)")
