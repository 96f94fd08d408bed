"""What classifiers of noised images share: the target's schedule, a validation per timestep bin, their checkpoint."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.batches import Batch
from lightning_mem.diffusion import DiffusionProcess, PixelCodec
from lightning_mem.modules.base import META, AbstractModule
from lightning_mem.modules.latents import LatentCache
from lightning_mem.modules.pretrained import load_target, read_checkpoint
from lightning_mem.networks import ClassifierConfig, TimeClassifier, build_classifier
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.records import digest
from lightning_mem.types import Weights


def timestep_bins(low: int, high: int, bins: int) -> list[tuple[int, int]]:
    """Half-open parts [low, high) of a timestep interval, as equal as integers allow.

    Args:
        low: First timestep.
        high: One past the last.
        bins: How many parts; no more than there are timesteps.
    """
    edges = [low + (high - low) * i // bins for i in range(bins + 1)]
    return list(pairwise(edges))


class AbstractClassifierModule(AbstractModule):
    """Base of classifiers of x_t, noised by the *target's* schedule.

    The target gives its schedule, image size and digest; its network is not kept. The length of a row of logits is
    known when the data are read. Where the target works on latents, so does its classifier: images are encoded, each
    once. At a validation every image is seen once a timestep bin, at a timestep and noise of
    its own address: curves are comparable, and equal for any number of processes.

    Args:
        target: A run folder, a ``.ckpt``, a diffusers folder or hub id.
        target_weights: ``ema`` takes averaged weights where there are any; part of the target's identity.
        network: The classifier; null for the default of the image size.
        time_dependent: False for one that sees clean images and no t.
        interval: Training timesteps [low, high) t is drawn from; null for all.
        bins: Timestep bins of the validation.
        optimizer: Optimizer by class_path.
        lr_scheduler: Learning-rate schedule by class_path, stepped once per optimizer step.
        channels_last: Keep weights in channels-last order; faster on recent GPUs.
        compile: Compile the network with torch.compile for training.
        seed: Of initial weights, noise, timesteps and dropout; null takes ``seed_everything``.

    Raises:
        ValueError: If a number is out of range, or the target cannot be read or has no schedule that a classifier can
            share (named).
    """

    def __init__(
        self,
        target: str,
        target_weights: Weights,
        network: ClassifierConfig | None,
        time_dependent: bool,
        interval: tuple[int, int] | None,
        bins: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        channels_last: bool,
        compile: bool,
        seed: int | None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        parent = load_target(target, target_weights)
        self.process, self.shape, self.target_digest = parent.process, parent.shape, parent.digest
        self.pixel_shape = parent.codec.pixel_shape(parent.shape)
        self._latents = None if isinstance(parent.codec, PixelCodec) else LatentCache(parent.codec)
        self.interval = self.process.checked_interval(interval)
        low, high = self.interval
        if not 1 <= bins <= high - low:
            raise ValueError(f"bins must lie in [1, {high - low}] (the timesteps of the interval), got {bins}")
        self.target_name = target
        self.network = (network or ClassifierConfig()).resolved(self.shape[-1])
        self.time_dependent = time_dependent
        self.bins = timestep_bins(low, high, bins)
        self._channels_last, self._compile = channels_last, compile
        self.num_classes = 0
        self.classifier: TimeClassifier | None = None
        self.hits: dict[str, tuple[int, int]] = {}
        self._validation: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def _take_data(self, data: MemorizationDataModule) -> None:
        """Set ``num_classes`` and what else the data decide; refuse those that do not fit."""

    @abstractmethod
    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        """Set the same by a checkpoint, where there are no data."""

    @abstractmethod
    def _answers(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """What is measured of each row of a validation batch at one timestep, float64 [B, K]."""

    @abstractmethod
    def _summary(self, values: Tensor, suffix: str) -> dict[str, float]:
        """Numbers of rows [N, K * bins] under their logged names; adds counted ones to ``hits``."""

    def describe(self) -> dict[str, Any]:
        """What identifies this classifier's counts, flat, for the definition of records."""
        return {
            "num_classes": self.num_classes,
            "time_dependent": self.time_dependent,
            "target_digest": self.target_digest,
        }

    def configure_model(self) -> None:
        """Build the network for the classes of the data, its weights drawn at an address; done once.

        Raises:
            ValueError: If the data do not fit: it says what was found and what to do.
        """
        if self.classifier is not None:
            return
        data = self._datamodule()
        if data is None:
            raise ValueError(
                f"{type(self).__name__} takes its classes from a MemorizationDataModule: run it in a Trainer with one, "
                "or read a trained one from its checkpoint"
            )
        found = (data.channels, data.image_size, data.image_size)
        if found != self.pixel_shape:
            raise ValueError(
                f"the target {self.target_name} makes images (channels, height, width) {self.pixel_shape}, but the "
                f"data give {found}: set data.channels {self.pixel_shape[0]} and data.image_size {self.pixel_shape[-1]}"
            )
        self._take_data(data)
        self._build()

    def _build(self) -> None:
        channels, size, _ = self.shape
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(derive_seed(self.seed, "initial weights"))
            self.classifier = build_classifier(self.network, size, channels, self.num_classes, self.time_dependent)
        if self._channels_last:
            self.classifier.to(memory_format=torch.channels_last)

    def _network(self) -> TimeClassifier:
        if self.classifier is None:
            raise ValueError("the classifier is not built yet: its classes are the data's (a Trainer reads them)")
        return self.classifier

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits float32 [B, num_classes] of x_t [B, C, H, W] at training timesteps t int64 [B]."""
        return self._network()(x_t, t).float()

    def on_fit_start(self) -> None:
        """Compile the network, if asked for."""
        if self._compile:
            self._network().compile()

    def draw_timesteps(self, count: int, draw: torch.Generator) -> Tensor:
        """This process's training timesteps of a global batch, int64 [count on this process]."""
        rows = count * self.trainer.world_size
        return self.own_rows(torch.randint(*self.interval, (rows,), generator=draw, device=self.device))

    def noised(self, x0: Tensor, t: Tensor, draw: torch.Generator) -> Tensor:
        """x_t of this process's rows, its noise drawn for the global batch."""
        rows = len(x0) * self.trainer.world_size
        eps = torch.randn((rows, *x0.shape[1:]), generator=draw, device=self.device)
        return self.process.add_noise(x0, self.own_rows(eps), t)

    def show_loss(self, loss: Tensor) -> Tensor:
        """Watch and log the loss of a step."""
        self.watch_loss(loss)
        if self.is_shown:
            self.log("train/loss", loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """What there is to say of each row, once a bin at an addressed timestep and noise, and once as trained."""
        noise: list[list[Tensor]] = [[] for _ in self.bins]
        for index in batch["index"].tolist():
            draw = generator(0, "validation", index)
            for place, (low, high) in zip(noise, self.bins, strict=True):
                place.append(torch.randint(low, high, (1,), generator=draw))
                place.append(torch.randn(self.shape, generator=draw))
        x0, parts = self.clean(batch), []
        for place in noise:
            t, eps = torch.cat(place[::2]).to(self.device), torch.stack(place[1::2]).to(self.device)
            parts.append(self._answers(self.process.add_noise(x0, eps, t), t, batch))
        if not self.time_dependent:
            parts.append(self._answers(x0, torch.zeros_like(batch["index"]), batch))
        self._validation.append((batch["row"], torch.cat(parts, dim=1)))

    def on_validation_epoch_end(self) -> None:
        """Log over held-out images, and over as many members beside them."""
        data = self._datamodule()
        if data is None:
            return
        found = self.gather_rows(self._validation)
        split = len(data.heldout)
        self.hits = {}
        for suffix, part in (
            ("", [values for row, values in found.items() if row < split]),
            ("_members", [values for row, values in found.items() if row >= split]),
        ):
            if part:
                for name, value in self._summary(torch.stack(part), suffix).items():
                    self.log(name, value, prog_bar=name in ("val/loss", "val/accuracy"), rank_zero_only=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self.on_validation_epoch_end()

    def checkpoint_meta(self) -> dict[str, Any]:
        """What rebuilds the classifier, and what it belongs to."""
        return {
            "network": self.network.to_dict(),
            "process": {k: v for k, v in self.process.config.items() if isinstance(v, str | int | float | bool)},
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "time_dependent": self.time_dependent,
            "interval": list(self.interval),
            "target_digest": self.target_digest,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another network, target or labelling; without data the checkpoint decides the classes.

        Raises:
            ValueError: It names both sides.
        """
        super().on_load_checkpoint(checkpoint)
        meta = checkpoint[META]
        if self.classifier is None:
            self.num_classes = meta["num_classes"]
            self._take_meta(meta)
            self._build()
        for name, own in self._compared().items():
            if name != "process" and meta[name] != own:
                raise ValueError(
                    f"the checkpoint was trained with {name} {meta[name]}, but this run has {own}: use the options of "
                    "its own config.yaml, or another folder"
                )

    def _compared(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        return self.checkpoint_meta()


@dataclass
class FrozenClassifier:
    """A trained classifier, frozen and in evaluation mode.

    Args:
        module: The network.
        num_classes: Length of a row of logits.
        shape: (C, H, W) of what it sees.
        process: Schedule it was trained on, its target's.
        time_dependent: False where it ignores t.
        interval: Training timesteps [low, high) it has seen.
        digest: Identity: equal digests mean equal logits.
        target_digest: Of the target it was trained for.
        weights: Which weights these are, ``raw`` or ``ema``.
        step: Optimizer steps of its training.
    """

    module: nn.Module
    num_classes: int
    shape: tuple[int, int, int]
    process: DiffusionProcess
    time_dependent: bool
    interval: tuple[int, int]
    digest: str
    target_digest: str
    weights: Weights
    step: int

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits float32 [B, num_classes] of x_t [B, C, H, W] at training timesteps t int64 [B]."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"the classifier works on images {self.shape}, got {tuple(x_t.shape[1:])}")
        return self.module(x_t, t).float()


def read_frozen(
    path: Path, module_class: type[AbstractClassifierModule], weights: Weights, device: torch.device | str
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The fields of a :class:`FrozenClassifier` from a checkpoint, and our part of the checkpoint.

    Args:
        path: ``*.ckpt``, read with weights_only=True.
        module_class: Whose checkpoint it must be.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
        device: Where to put the network.

    Raises:
        ValueError: If it is a checkpoint of another module, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    meta, name = checkpoint.get(META, {}), module_class.__name__
    if meta.get("module") != name:
        raise ValueError(f"{path} is a checkpoint of {meta.get('module', 'something else')}, not of {name}")
    channels, size, _ = shape = tuple(meta["shape"])
    config = ClassifierConfig.from_dict(meta["network"] | {"extra": meta["network"]["extra"] | {"pretrained": False}})
    module = build_classifier(config, size, channels, meta["num_classes"], meta["time_dependent"])
    averaged = "current_model_state" in checkpoint
    state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
    module.load_state_dict({name.removeprefix("classifier."): value for name, value in state.items()})
    process = DiffusionProcess.from_config(meta["process"])
    fields = {
        "module": module.to(device).eval().requires_grad_(False),
        "num_classes": meta["num_classes"],
        "shape": shape,
        "process": process,
        "time_dependent": meta["time_dependent"],
        "interval": tuple(meta["interval"]),
        "digest": digest(process.digest, meta["time_dependent"], *[v for _, v in sorted(module.state_dict().items())]),
        "target_digest": meta["target_digest"],
        "weights": "ema" if averaged and weights == "ema" else "raw",
        "step": int(meta["step"]),
    }
    return fields, meta
