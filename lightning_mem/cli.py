"""The command line: LightningCLI, with our verbs, our run folder, and errors in one line."""

import inspect
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_mem.data import LabelRule, MemorizationDataModule, classes_of
from lightning_mem.evaluation.verb import add_options, run_evaluate
from lightning_mem.modules import AbstractModule
from lightning_mem.records import digest
from lightning_mem.studies import study
from lightning_mem.trainer import MemorizationTrainer

FOLDER_VERBS: dict[str, Callable[..., Any]] = {
    "evaluate": run_evaluate,
    "study": study,
}
"""Verbs that need no network: their typed arguments are the options, their docstrings the help. One that wants to read
configurations of ``fit`` takes ``read_config``, which is no option: it gets :meth:`MemorizationCLI.read_config`."""

OPTIONS: dict[str, Callable[[LightningArgumentParser], None]] = {"evaluate": add_options}
"""Folder verbs whose arguments alone do not say their options; these get all that was parsed."""

GIVEN: set[str | int] = {"read_config"}
"""Arguments of folder verbs that the command line gives."""


class VerbParser(LightningArgumentParser):
    """Lightning's parser, with the folder verbs beside its subcommands."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning asks for this once, and adds the verbs of the Trainer to what it gets."""
        verbs = super().add_subcommands(*args, **kwargs)
        for name, function in FOLDER_VERBS.items():
            words = (inspect.getdoc(function) or "").partition("\nArgs:")[0]
            first = words.partition("\n")[0]
            parser = LightningArgumentParser(description=words)
            parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file in yaml.")
            if name in OPTIONS:
                OPTIONS[name](parser)
            else:
                parser.add_function_arguments(function, skip=GIVEN)
            verbs.add_subcommand(name, parser, help=first)
        return verbs


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


def _conditioning(
    labels: LabelRule, num_classes: int | None, num_members: int | None, source: Any, model: str
) -> int | None:
    """Labels that the data rule leads to, as far as the configuration says; a classifier asks its data later."""
    if model.endswith("SurrogateModule"):
        return None
    if labels == "true" and num_classes is None:
        path = getattr(source, "class_path", None) or (source or {}).get("class_path", "DigitsSource")
        known = {"DigitsSource": 10, "CIFAR10Source": 10, "CelebASource": 2}.get(str(path).rsplit(".", 1)[-1])
        if known is None:
            raise ValueError("data.labels true needs data.num_classes (the number of subfolders) for this source")
        return known
    return classes_of(labels, num_classes=num_classes, num_members=num_members or 0, source_classes=num_classes)


class MemorizationCLI(LightningCLI):
    """LightningCLI with the model by class_path and the one data module by plain keys.

    Where the command line begins with a verb, only this verb's options are put together; the others are known by name.
    """

    def __init__(self, model: type[LightningModule], data: type[LightningDataModule], **settings: Any) -> None:
        words = sys.argv[1:] if settings.get("args") is None else settings["args"]
        verbs = {*self.subcommands(), *FOLDER_VERBS}
        self._asked = words[0] if isinstance(words, list) and words and words[0] in verbs else None
        super().__init__(model, data, **settings)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Complete for the verb that was asked for, or for all where that is not clear."""
        if self._asked in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs, and ours on a trained run; the sets name arguments that are not options."""
        return {
            **LightningCLI.subcommands(),
            "predict": {"model", "datamodule"},
            "sample": {"model", "datamodule"},
            "attack": {"model", "datamodule"},
            "attribute": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sizes are said once, in the data."""
        parser.link_arguments("data.image_size", "model.init_args.image_size")
        parser.link_arguments("data.channels", "model.init_args.channels")
        parser.link_arguments(
            ("data.labels", "data.num_classes", "data.num_members", "data.source", "model.class_path"),
            "model.init_args.num_classes",
            compute_fn=_conditioning,
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning lets hyper-parameters of a checkpoint beat the command line; our checkpoints hold none."""

    def _set_seed(self) -> None:
        """Folder verbs have no seed of their own."""
        if self.subcommand not in FOLDER_VERBS:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Folder verbs get their own arguments only: no network, no Trainer."""
        if self.subcommand in FOLDER_VERBS:
            self.config_init = self.parser.instantiate_classes(self.config)
        else:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning looks a verb up on the Trainer; ours on folders are functions."""
        if subcommand not in FOLDER_VERBS:
            super()._run_subcommand(subcommand)
            return
        function = FOLDER_VERBS[subcommand]
        if subcommand in OPTIONS:
            function(**vars(self.config_init[subcommand]))
            return
        names = inspect.signature(function).parameters
        options = {name: value for name, value in self.config_init[subcommand].items() if name in names}
        function(**options, **{str(name): getattr(self, str(name)) for name in GIVEN & names.keys()})

    def read_config(self, options: Sequence[str], verb: str = "fit") -> dict[str, Any]:
        """What a verb would make of these options, as ``fit`` writes it into ``config.yaml``.

        Args:
            options: As on the command line, e.g. ``["--config", "run.yaml"]``; a file may also be its own text.
            verb: ``fit``, or another that acts on a model.

        Raises:
            ValueError: If the verb would refuse them; with its message.
        """
        parser = self._complete(verb)
        parser.exit_on_error = False
        try:
            found = parser.parse_args(list(options))
        except ArgumentError as error:
            raise ValueError(str(error)) from error
        finally:
            parser.exit_on_error = True
        return yaml.safe_load(parser.dump(found, skip_unset=False))

    def _complete(self, verb: str) -> LightningArgumentParser:
        """A verb's parser with all its options, put together once."""
        if verb not in self._subcommand_method_arguments:
            description = self._parser(verb).description
            found = super()._prepare_subcommand_parser(MemorizationTrainer, verb, description=description)
            self._subcommand_parsers[verb] = found
        return self._parser(verb)

    def after_instantiate_classes(self) -> None:
        """What decides the numbers: model, data and seed; not the folder, nor how long it trains."""
        if self.subcommand in FOLDER_VERBS:
            return
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
        parser_class=VerbParser,
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
