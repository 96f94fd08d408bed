"""The verbs on a trained run: samples, attacks, attributions, each with all processes and resuming."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console

from lightning_mem.attacks import AbstractAttack
from lightning_mem.attribution import AbstractExplanation
from lightning_mem.callbacks import Gallery, WandbTracking
from lightning_mem.callbacks.drawing import Blocks, BlockWriter, Drawer
from lightning_mem.callbacks.evaluation import workers_of
from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.defenses.certified import certify
from lightning_mem.diffusion import Sampler, ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Accepted, Reference, Scene
from lightning_mem.evaluation.blocks import drawn_before
from lightning_mem.evaluation.inputs import check_members
from lightning_mem.evaluation.rejection import rejection_into, rejection_settings
from lightning_mem.evaluation.scene import Act
from lightning_mem.modules import AbstractModule, load_target, read_checkpoint
from lightning_mem.modules.base import META
from lightning_mem.records import Record, digest, write_records
from lightning_mem.types import SampleSet, Weights


class TrainedRunTrainer(Trainer):
    """Lightning's Trainer that also samples from the run in its folder, attacks it, and explains its samples."""

    config_digest: str = ""
    callbacks: list[Callback]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.default_root_dir)

    def _find(self, ckpt_path: str | Path | None) -> str | None:
        """The file that ``ckpt_path`` means, checked; null stays null.

        Raises:
            ValueError: If there is no such file, or it is damaged.
        """
        if ckpt_path is None:
            return None
        path = self.folder / "checkpoints" / f"{ckpt_path}.ckpt" if ckpt_path in ("last", "best") else Path(ckpt_path)
        if not path.is_file():
            kept = sorted(str(p) for p in (self.folder / "checkpoints").glob("*.ckpt"))
            raise ValueError(f"--ckpt_path {ckpt_path}: there is no {path}; this run folder has {kept or 'none'}")
        read_checkpoint(path)
        return str(path)

    def _trained(self, model: LightningModule | None, ckpt_path: str | Path | None) -> str | None:
        """The checkpoint a verb works on: the one asked for, else the run's last; null for a pretrained model."""
        last = self.folder / "checkpoints" / "last.ckpt"
        if ckpt_path is None and last.is_file():
            rank_zero_info(f"taking {last}")
            ckpt_path = "last"
        if ckpt_path is None and not getattr(model, "pretrained", None):
            raise ValueError(
                f"there is no trained network: {last} does not exist. Train with `fit`, name the run with "
                "--trainer.default_root_dir, or a checkpoint with --ckpt_path"
            )
        return self._find(ckpt_path)

    @contextmanager
    def _without_averaging(self) -> Iterator[None]:
        """Averaging belongs to ``fit``: left over from one, it would swap its weights over those of the checkpoint."""
        callbacks = self.callbacks
        self.callbacks = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used")
                yield
        finally:
            self.callbacks = callbacks

    def sample(
        self,
        model: AbstractModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        num_samples: int = 512,
        first: int = 0,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int = 0,
        weights: Weights = "ema",
        guidance: AbstractAddition | None = None,
        max_tries: int = 100,
        out: str | None = None,
    ) -> SampleSet | None:
        """Draw a SampleSet from a trained run; shared by all processes, continues where it stopped.

        Beside protected samples, ``<samples>_certificates.csv`` says for each how often the protection acted, how sure
        the classifier is of the finished image, its distance to the nearest training image, and how many draws it took.

        Args:
            model: The trained module; its network comes from the checkpoint.
            datamodule: Not used; verbs share their configuration.
            ckpt_path: ``last``, ``best`` or a path; null takes the run's last.
            weights_only: Read checkpoints so that they cannot run code.
            num_samples: How many.
            first: Address of the first sample; sample 17 of a seed is the same image in any set.
            num_steps: Sampler steps.
            sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
            eta: DDIM's share of fresh noise, 0 to 1.
            sample_seed: Seed of the draw.
            weights: ``ema`` takes averaged weights where there are any, ``raw`` the optimizer's own.
            guidance: What is added to the score, or which samples may leave, by class_path:
                ``lightning_mem.attacks.SurrogateGuidance``, ``lightning_mem.defenses.CPSampleProtection``,
                ``lightning_mem.defenses.NearestRejection`` ...; null draws the target's own samples.
            max_tries: Draws of a sample until a rejection accepts it, at least 1; then the last one stays.
            out: Where to write (``.npz``, its manifest beside it); null for ``samples/`` in the run folder.

        Returns:
            The samples, on the first process.
        """
        if num_samples < 1 or first < 0:
            raise ValueError(f"num_samples must be at least 1 and first at least 0, got {num_samples} and {first}")
        path = self._trained(model, ckpt_path)
        target = load_target(path or str(getattr(model, "pretrained", None)), weights)
        where = path or str(getattr(model, "pretrained", None))
        options: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "eta": eta}
        settings = {**options, "block": BLOCK, "sample_seed": sample_seed, "target": target.digest}
        terms: Sequence[ScoreTerm] = ()
        judge = None
        if guidance is not None:
            terms = guidance.terms(target, where, torch.arange(first, first + num_samples))
            judge = guidance.judge(target, where)
        drawer = Drawer(target, settings, terms)
        said = drawer.settings | ({} if judge is None else rejection_settings(terms, judge, max_tries))
        name = f"{Path(path).stem if path else 'pretrained'}_{target.weights}_seed{sample_seed}_{first}-{num_samples}"
        name += "" if guidance is None else f"_guided-{digest(said)}"
        file = Path(out.removesuffix(".npz") + ".npz") if out else self.folder / "samples" / f"{name}.npz"
        if judge is None:
            samples = self._draw(drawer, file, first, num_samples)
            drawn = None if samples is None else Accepted.at_once(samples)
        else:
            self._meet(drawer)
            tried = self._drawn(drawer, file.with_name(f"{file.stem}_first.npz"), first, num_samples)
            drawn = rejection_into(
                file, tried, target, judge, seed=sample_seed, max_tries=max_tries, guidance=terms,
                workers=workers_of(self), on_the_first=self._on_the_first, **options,
            )  # fmt: skip
        if drawn is None or not self.is_global_zero:
            return None
        samples = drawn.samples
        rank_zero_info(f"{len(samples)} samples ({samples.weights}, digest {samples.digest}) in {file}")
        if judge is not None:
            lost = int((~drawn.accepted).sum())
            rank_zero_info(f"{drawn.cost:.3g} draws a sample; {lost} were not accepted after {max_tries}")
        certify(file, drawn, terms, judge, target, where)
        return samples

    predict = sample  # type: ignore[assignment]

    def _draw(self, drawer: Drawer, file: Path, first: int, count: int) -> SampleSet | None:
        """Draw into a file with all processes; the first one gets the samples."""
        blocks = Blocks(file.with_suffix(".blocks"), first, count, drawer.settings)
        writer = BlockWriter(blocks)
        with self._without_averaging():
            self.callbacks.append(writer)
            super().predict(drawer, dataloaders=blocks, return_predictions=False)
        self.strategy.barrier("samples")
        if not self.is_global_zero:
            return None
        samples = blocks.assemble()
        samples.save(file)
        blocks.remove()
        return samples

    def _meet(self, drawer: Drawer) -> None:
        """Start the processes, as Lightning does in its first loop: where all is drawn already, none would run."""
        if self.world_size > 1 and not torch.distributed.is_initialized():
            with self._without_averaging():
                super().predict(drawer, dataloaders=[], return_predictions=False)

    def _drawn(self, drawer: Drawer, file: Path, first: int, count: int) -> SampleSet:
        """A draw with all processes, read from its file where it is there; every process gets the samples."""
        there = drawn_before(file, first, count, drawer.settings)
        if there is None:
            self._draw(drawer, file, first, count)
            self.strategy.barrier("drawn")
            there = SampleSet.load(file)
        return there

    def attack(
        self,
        model: AbstractModule,
        attack: AbstractAttack,
        datamodule: MemorizationDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        weights: Weights = "ema",
        out: str | None = None,
    ) -> list[Record]:
        """Attack a trained run: a table, records in a folder of their own; continues where it stopped.

        Args:
            model: The trained module; its network comes from the checkpoint.
            attack: By class_path: ``lightning_mem.attacks.SIDE`` ...
            datamodule: Training images and held-out control; read only when the attack has drawn all it needs.
            ckpt_path: ``last``, ``best`` or a path; null takes the run's last.
            weights_only: Read checkpoints so that they cannot run code.
            weights: ``ema`` takes averaged weights where there are any, ``raw`` the optimizer's own.
            out: Folder of the results; null for ``attacks/<name>-<digest>`` in the run folder.

        Returns:
            The records, on every process.
        """

        def prepare(target: Target) -> str:
            attack.prepare(target, lambda: self._captions(datamodule))
            return attack.threat_model

        return self._act(attack, "attacks", prepare, model, datamodule, ckpt_path, weights, out)[1]

    def attribute(
        self,
        model: AbstractModule,
        attribution: AbstractExplanation,
        datamodule: MemorizationDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        weights: Weights = "ema",
        out: str | None = None,
    ) -> list[Record]:
        """Explain images by training images: a picture, a table, records in a folder of their own; resumes.

        W&B receives the pictures where the run logs there and its gallery uploads pairs: they show training images.

        Args:
            model: The trained module; its network comes from the checkpoint.
            attribution: By class_path: ``lightning_mem.attribution.Attributions`` ...
            datamodule: Training images and held-out control; read only when all samples are drawn.
            ckpt_path: ``last``, ``best`` or a path; null takes the run's last.
            weights_only: Read checkpoints so that they cannot run code.
            weights: ``ema`` takes averaged weights where there are any, ``raw`` the optimizer's own.
            out: Folder of the results; null for ``attributions/<name>-<digest>`` in the run folder.

        Returns:
            The records, on every process.
        """
        folder, records = self._act(
            attribution, "attributions", lambda target: "", model, datamodule, ckpt_path, weights, out
        )
        uploads = any(isinstance(call, Gallery) and call.upload == "pairs" for call in self.callbacks)
        if self.is_global_zero and uploads:
            for logger in self.loggers:
                if isinstance(logger, WandbTracking):
                    for file in sorted((folder / "images").glob("*.png")):
                        logger.log_image(f"attribution/{attribution.name}/{file.stem}", [str(file)])
        return records

    def _act(
        self,
        act: Act,
        kind: str,
        prepare: Callable[[Target], str],
        model: AbstractModule,
        datamodule: MemorizationDataModule,
        ckpt_path: str | None,
        weights: Weights,
        out: str | None,
    ) -> tuple[Path, list[Record]]:
        """Act on the scene of a trained run and write the records: the folder of the results, and the records.

        ``prepare`` is called before anything is drawn; what it returns is printed.
        """
        path = self._trained(model, ckpt_path) or str(getattr(model, "pretrained", None))
        target = load_target(path, weights)
        words = prepare(target)
        identity = act.identity(target, path, self.folder)
        folder = Path(out) if out else self.folder / kind / f"{act.name}-{identity}"
        rank_zero_info("\n".join(filter(None, (words, f"results go to {folder}"))))
        self._meet(Drawer(target, {}))
        step = int(read_checkpoint(path)[META]["step"]) if path.endswith(".ckpt") else 0

        def blocks(
            file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[ScoreTerm]
        ) -> SampleSet:
            return self._drawn(Drawer(target, settings, guidance), file, first, count)

        def read() -> Reference:
            self._on_the_first(datamodule.prepare_data)
            datamodule.setup()
            digests = {"members": datamodule.members.digest, "heldout": datamodule.heldout.digest}
            check_members(self.folder, digests)
            if not path.endswith(".ckpt"):  # no training wrote down which images these are
                self._on_the_first(lambda: datamodule.write_members(self.folder))
            return Reference.from_datamodule(datamodule)

        if not path.endswith(".ckpt") and (self.folder / "members.json").is_file():
            read()  # what is there already is about these images, or the folder is refused

        scene = Scene(
            target, self.folder, folder, blocks, read, workers_of(self), self._on_the_first, step, self.config_digest
        )
        records = act.run(scene)
        if self.is_global_zero:
            write_records(folder / "results.jsonl", records)  # last: they say that the rest is there
            console = Console()
            console.print(act.table(records))
            console.print(f"results.jsonl, samples/, tables/ and images/ in {folder}", soft_wrap=True, highlight=False)
        self.strategy.barrier("acted")
        return folder, records

    @staticmethod
    def _captions(datamodule: MemorizationDataModule) -> tuple[list[str], list[str]] | None:
        """Of members and held-out images, before the processes have met."""
        rank_zero_only(datamodule.prepare_data)()
        datamodule.setup()
        return datamodule.captions()

    def _on_the_first(self, work: Callable[[], None]) -> None:
        """Call on the first process; the others wait."""
        if self.is_global_zero:
            work()
        self.strategy.barrier("first")
