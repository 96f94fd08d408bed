"""SIDE's surrogate: a classifier of noised images that shares its target's schedule."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_calibration_error

from lightning_mem.data import MemorizationDataModule, classes_of
from lightning_mem.data.batches import Batch
from lightning_mem.diffusion import DiffusionProcess, EmpiricalClassifier
from lightning_mem.modules.base import META, AbstractModule
from lightning_mem.modules.denoiser import load_target, read_checkpoint
from lightning_mem.networks import ClassifierConfig, TimeClassifier, build_classifier
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.records import digest
from lightning_mem.types import Weights

CALIBRATION_BINS = 15

LabelForm = Literal["hard", "posterior"]
"""What x_t is to be called: the label of the image it came from, or the probability of every label given x_t."""


def timestep_bins(low: int, high: int, bins: int) -> list[tuple[int, int]]:
    """Half-open parts [low, high) of a timestep interval, as equal as integers allow.

    Args:
        low: First timestep.
        high: One past the last.
        bins: How many parts; no more than there are timesteps.
    """
    edges = [low + (high - low) * i // bins for i in range(bins + 1)]
    return list(pairwise(edges))


class SurrogateModule(AbstractModule):
    r"""Trains a classifier of x_t, noised by the *target's* schedule, on labelled (generated) images.

    .. math:: \mathbb{E}_{x_0, t, \epsilon}\left[-\log p_\phi\big(y \mid \sqrt{\bar\alpha_t}\, x_0 +
        \sqrt{1 - \bar\alpha_t}\,\epsilon,\ t\big)\right], \qquad t \sim U\{0, \dots, T - 1\}

    The target gives its schedule, image size and digest; its network is not kept. The number of classes is the data's,
    known when they are read. Logs ``train/loss``; on held-out images ``val/loss``, ``val/accuracy``, and per timestep
    bin ``val/accuracy/t0-199`` and ``val/calibration/t0-199`` (expected calibration error, 15 bins); on as many
    members, for what is learned by heart, ``val/loss_members``, ``val/accuracy_members/t0-199`` and so on. Every image
    is seen once a bin, at a timestep and noise of its own address: curves are comparable, and equal for any number of
    processes. A checkpoint alone restores the classifier (:func:`load_classifier`).

    Args:
        target: The model to be attacked: a run folder, a ``.ckpt``, a diffusers folder or hub id.
        target_weights: Whose samples the labels describe: ``ema`` takes averaged weights where there are any.
        network: The classifier; null for the default of the image size.
        time_dependent: False trains the standard classifier of the baseline instead, on clean images and without t;
            its bins are measured on noised images all the same.
        labels_as: ``hard`` asks for the label of x0, as in the paper's text. ``posterior`` asks for p(y | x_t) over the
            training images and their labels, by Bayes' rule: the same minimum, and the same gradient in expectation,
            without the noise of one label a draw (its figure 3 draws a soft vector). Costs a pass over the training
            images a step; needs time_dependent.
        interval: Training timesteps [low, high) t is drawn from; null for all.
        label_smoothing: In [0, 1): share of the label spread over all classes.
        bins: Timestep bins of the validation.
        optimizer: Optimizer by class_path.
        lr_scheduler: Learning-rate schedule by class_path, stepped once per optimizer step.
        channels_last: Keep weights in channels-last order; faster on recent GPUs.
        compile: Compile the network with torch.compile for training.
        seed: Of initial weights, noise, timesteps and dropout; null takes ``seed_everything``.

    Raises:
        ValueError: If a number is out of range, or the target cannot be read or has no schedule that a classifier can
            share (named). When the data are read: if they have no labels, fewer than two classes, another image size
            than the target, or were drawn from another target.

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1; the time-independent classifier: Carlini et al., arXiv:2301.13188.
    """

    def __init__(
        self,
        target: str,
        target_weights: Weights = "ema",
        network: ClassifierConfig | None = None,
        time_dependent: bool = True,
        labels_as: LabelForm = "hard",
        interval: tuple[int, int] | None = None,
        label_smoothing: float = 0.0,
        bins: int = 5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels_last: bool = False,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if labels_as == "posterior" and not time_dependent:
            raise ValueError("labels_as posterior is the posterior at a timestep: use hard with time_dependent false")
        parent = load_target(target, target_weights)
        self.process, self.shape, self.target_digest = parent.process, parent.shape, parent.digest
        steps = self.process.num_timesteps
        self.interval = (0, steps) if interval is None else (interval[0], interval[1])
        low, high = self.interval
        if not 0 <= low < high <= steps:
            raise ValueError(f"interval must satisfy 0 <= low < high <= {steps}, got [{low}, {high})")
        if not 1 <= bins <= high - low:
            raise ValueError(f"bins must lie in [1, {high - low}] (the timesteps of the interval), got {bins}")
        self.target_name = target
        self.network = (network or ClassifierConfig()).resolved(self.shape[-1])
        self.time_dependent = time_dependent
        self.labels_as: LabelForm = labels_as
        self.label_smoothing = label_smoothing
        self.bins = timestep_bins(low, high, bins)
        self._channels_last, self._compile = channels_last, compile
        self.num_classes = 0
        self.pseudo_labels: dict[str, Any] = {}
        self.classifier: TimeClassifier | None = None
        self.hits: dict[str, tuple[int, int]] = {}
        self._validation: list[tuple[Tensor, Tensor]] = []
        self._exact: tuple[EmpiricalClassifier, Tensor] | None = None

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
                "SurrogateModule takes its classes from a MemorizationDataModule: run it in a Trainer with one, or "
                "read a trained one with load_classifier"
            )
        self.num_classes, self.pseudo_labels = self._checked_data(data)
        self._build()

    def _build(self) -> None:
        channels, size, _ = self.shape
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(derive_seed(self.seed, "initial weights"))
            self.classifier = build_classifier(self.network, size, channels, self.num_classes, self.time_dependent)
        if self._channels_last:
            self.classifier.to(memory_format=torch.channels_last)

    def _checked_data(self, data: MemorizationDataModule) -> tuple[int, dict[str, Any]]:
        """Number of classes and origin of the labels."""
        found = (data.channels, data.image_size, data.image_size)
        if found != tuple(self.shape):
            raise ValueError(
                f"the target {self.target_name} works on (channels, height, width) {tuple(self.shape)}, but the data "
                f"give {found}: set data.channels {self.shape[0]} and data.image_size {self.shape[-1]}"
            )
        classes = classes_of(
            data.labels,
            num_classes=data.num_classes,
            num_members=len(data.members),
            source_classes=data.source.num_classes,
        )
        if classes is None:
            raise ValueError(
                "a classifier needs labels, but data.labels is none: choose true (of a labelled source, such as "
                "lightning_mem.attacks.PseudoLabels), random or binary"
            )
        if classes < 2:
            raise ValueError(f"a classifier needs at least two classes, but {data.source.name} has {classes}")
        origin = data.source.provenance()
        theirs = origin.get("target_digest", self.target_digest)
        if theirs != self.target_digest:
            raise ValueError(
                f"the images of {data.source.name} were drawn from the target {theirs}, but model.init_args.target "
                f"({self.target_name}, {self.target_digest}) is another: name one and the same target in both places"
            )
        return classes, origin

    def _network(self) -> TimeClassifier:
        if self.classifier is None:
            raise ValueError("the classifier is not built yet: its classes are the data's (a Trainer reads them)")
        return self.classifier

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits float32 [B, num_classes] of x_t [B, C, H, W] at training timesteps t int64 [B]."""
        return self._network()(x_t, t).float()

    def on_fit_start(self) -> None:
        """Compile the network and make the posterior ready, if asked for; neither is kept after the training."""
        if self._compile:
            self._network().compile()
        data = self._datamodule()
        if self.labels_as == "posterior" and data is not None and data.members.labels is not None:
            images, owners = data.bank()
            times = torch.ones(len(data.members), dtype=torch.int64)
            times[: data.duplicates.count] = data.duplicates.times
            rows = torch.arange(len(images)).repeat_interleave(times[owners])
            classes, labels = data.members.labels[owners][rows].unique(return_inverse=True)
            self._exact = EmpiricalClassifier(images[rows], labels, self.process), classes

    def on_fit_end(self) -> None:
        """Let go of the training images."""
        self._exact = None

    def _wanted(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What the loss asks for: labels int64 [B], or probabilities [B, num_classes]."""
        if self._exact is None:
            return labels
        exact, classes = self._exact
        wanted = torch.zeros(len(x_t), self.num_classes, device=x_t.device)
        with torch.no_grad():
            wanted[:, classes.to(x_t.device)] = exact(x_t, t).softmax(1).float()
        return wanted

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy at timesteps and noise addressed by the step."""
        x = batch["image"]
        rows = len(x) * self.trainer.world_size
        draw = self.training_generator()
        t = self.own_rows(torch.randint(*self.interval, (rows,), generator=draw, device=self.device))
        if self.time_dependent:
            eps = torch.randn((rows, *x.shape[1:]), generator=draw, device=self.device)
            x = self.process.add_noise(x, self.own_rows(eps), t)
        wanted = self._wanted(x, t, batch["label"])
        loss = cross_entropy(self(x, t), wanted, label_smoothing=self.label_smoothing)
        self.watch_loss(loss)
        if self.is_shown:
            self.log("train/loss", loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, hit and confidence of each row, once a bin at an addressed timestep and noise, and once as trained."""
        noise: list[list[Tensor]] = [[] for _ in self.bins]
        for index in batch["index"].tolist():
            draw = generator(0, "validation", index)
            for place, (low, high) in zip(noise, self.bins, strict=True):
                place.append(torch.randint(low, high, (1,), generator=draw))
                place.append(torch.randn(self.shape, generator=draw))
        x0, parts = batch["image"], []
        for place in noise:
            t, eps = torch.cat(place[::2]).to(self.device), torch.stack(place[1::2]).to(self.device)
            parts.append(self._answers(self.process.add_noise(x0, eps, t), t, batch["label"]))
        if not self.time_dependent:
            parts.append(self._answers(x0, torch.zeros_like(batch["label"]), batch["label"]))
        self._validation.append((batch["row"], torch.cat(parts, dim=1)))

    def _answers(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Loss without smoothing, whether the guess is right, and the guess's probability, float64 [B, 3]."""
        log_p = self(x_t, t).double().log_softmax(1)
        confidence, guess = log_p.max(1)
        return torch.stack([-log_p.gather(1, labels[:, None])[:, 0], (guess == labels).double(), confidence.exp()], 1)

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

    def _summary(self, values: Tensor, suffix: str) -> dict[str, float]:
        """Means of the rows [N, 3 * bins (+ 3 for the clean image)] under their logged names."""
        widths = torch.tensor([high - low for low, high in self.bins], dtype=torch.float64, device=values.device)
        loss, hit, confidence = (part.contiguous() for part in values.T.reshape(-1, 3, len(values)).unbind(1))
        share = widths / widths.sum()
        if not self.time_dependent:  # it was trained on the clean image, the last part, alone
            share = torch.zeros(len(loss), dtype=torch.float64, device=values.device)
            share[-1] = 1
        found = {
            f"val/loss{suffix}": float(share @ loss.mean(1)),
            f"val/accuracy{suffix}": float(share @ hit.mean(1)),
        }
        for place, (low, high) in enumerate(self.bins):
            name = f"{suffix}/t{low}-{high - 1}"
            self.hits[f"val/accuracy{name}"] = int(hit[place].sum()), len(values)
            found[f"val/accuracy{name}"] = float(hit[place].mean())
            # of the event "the guess is right" with the guess's probability: the usual error of many classes
            error = binary_calibration_error(confidence[place], hit[place].long(), CALIBRATION_BINS)
            found[f"val/calibration{name}"] = float(error)
        return found

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

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
            "pseudo_labels": self.pseudo_labels,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another network, target or labelling; without data the checkpoint decides the classes.

        Raises:
            ValueError: It names both sides.
        """
        super().on_load_checkpoint(checkpoint)
        meta = checkpoint[META]
        if self.classifier is None:
            self.num_classes, self.pseudo_labels = meta["num_classes"], meta["pseudo_labels"]
            self._build()
        for name, own in self.checkpoint_meta().items():
            if name != "process" and meta[name] != own:
                raise ValueError(
                    f"the checkpoint was trained with {name} {meta[name]}, but this run has {own}: use the options of "
                    "its own config.yaml, or another folder"
                )


@dataclass
class LoadedClassifier:
    """A trained classifier, frozen and in evaluation mode: a classifier for guidance.

    Args:
        module: The network.
        num_classes: Length of a row of logits.
        shape: (C, H, W) of what it sees.
        process: Schedule it was trained on, its target's.
        time_dependent: False where it ignores t.
        interval: Training timesteps [low, high) it has seen.
        digest: Identity: equal digests mean equal logits.
        target_digest: Of the target it was trained for.
        pseudo_labels: Where its labels came from, as the data source told it.
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
    pseudo_labels: dict[str, Any]
    weights: Weights
    step: int

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits float32 [B, num_classes] of x_t [B, C, H, W] at training timesteps t int64 [B]."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"the classifier works on images {self.shape}, got {tuple(x_t.shape[1:])}")
        return self.module(x_t, t).float()


def load_classifier(path: str | Path, weights: Weights = "ema", device: torch.device | str = "cpu") -> LoadedClassifier:
    """The classifier of a checkpoint or run folder; needs nothing else of the run.

    Args:
        path: ``*.ckpt`` (read with weights_only=True), or a run folder: its ``checkpoints/best.ckpt`` (lowest
            ``val/loss``) where there is one, else ``checkpoints/last.ckpt``. Which it was is printed.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
        device: Where to put the network.

    Raises:
        ValueError: If the checkpoint is not one of a SurrogateModule, or cannot be read.
    """
    path = Path(path)
    if path.suffix != ".ckpt":
        folder = path / "checkpoints"
        path = folder / "best.ckpt" if (folder / "best.ckpt").is_file() else folder / "last.ckpt"
        rank_zero_info(f"taking {path}")
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get(META, {})
    if meta.get("module") != SurrogateModule.__name__:
        raise ValueError(f"{path} is a checkpoint of {meta.get('module', 'something else')}, not of SurrogateModule")
    channels, size, _ = shape = tuple(meta["shape"])
    config = ClassifierConfig.from_dict(meta["network"] | {"extra": meta["network"]["extra"] | {"pretrained": False}})
    module = build_classifier(config, size, channels, meta["num_classes"], meta["time_dependent"])
    averaged = "current_model_state" in checkpoint
    state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
    module.load_state_dict({name.removeprefix("classifier."): value for name, value in state.items()})
    process = DiffusionProcess.from_config(meta["process"])
    identity = digest(process.digest, meta["time_dependent"], *[v for _, v in sorted(module.state_dict().items())])
    return LoadedClassifier(
        module=module.to(device).eval().requires_grad_(False),
        num_classes=meta["num_classes"],
        shape=shape,
        process=process,
        time_dependent=meta["time_dependent"],
        interval=tuple(meta["interval"]),
        digest=identity,
        target_digest=meta["target_digest"],
        pseudo_labels=meta["pseudo_labels"],
        weights="ema" if averaged and weights == "ema" else "raw",
        step=int(meta["step"]),
    )
