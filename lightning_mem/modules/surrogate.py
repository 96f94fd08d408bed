"""SIDE's surrogate: a classifier of noised images that shares its target's schedule."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_calibration_error

from lightning_mem.data import MemorizationDataModule, classes_of
from lightning_mem.data.batches import Batch
from lightning_mem.diffusion import EmpiricalClassifier
from lightning_mem.modules.classifier import AbstractClassifierModule, FrozenClassifier, read_frozen
from lightning_mem.networks import ClassifierConfig
from lightning_mem.types import Weights

CALIBRATION_BINS = 15

LabelForm = Literal["hard", "posterior"]
"""What x_t is to be called: the label of the image it came from, or the probability of every label given x_t."""


class SurrogateModule(AbstractClassifierModule):
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
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if labels_as == "posterior" and not time_dependent:
            raise ValueError("labels_as posterior is the posterior at a timestep: use hard with time_dependent false")
        super().__init__(
            target, target_weights, network, time_dependent, interval, bins, optimizer, lr_scheduler, channels_last,
            compile, seed,
        )  # fmt: skip
        if labels_as == "posterior" and self._latents is not None:
            raise ValueError(f"labels_as posterior is closed-form over pixels, and {target} works on latents: use hard")
        self.labels_as: LabelForm = labels_as
        self.label_smoothing = label_smoothing
        self.pseudo_labels: dict[str, Any] = {}
        self._exact: tuple[EmpiricalClassifier, Tensor] | None = None

    def _take_data(self, data: MemorizationDataModule) -> None:
        """Number of classes and origin of the labels."""
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
        self.num_classes, self.pseudo_labels = classes, origin

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        self.pseudo_labels = meta["pseudo_labels"]

    def on_fit_start(self) -> None:
        """Compile the network and make the posterior ready, if asked for; neither is kept after the training."""
        super().on_fit_start()
        data = self._datamodule()
        if self.labels_as == "posterior" and data is not None and data.members.labels is not None:
            images, owners = data.bank()
            times = data.repeats
            rows = torch.arange(len(images)).repeat_interleave(times[owners])
            classes, labels = data.members.labels[owners][rows].unique(return_inverse=True)
            self._exact = EmpiricalClassifier(images[rows], labels, self.process), classes

    def on_fit_end(self) -> None:
        """Let go of the training images."""
        super().on_fit_end()
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
        x, draw = self.clean(batch), self.training_generator()
        t = self.draw_timesteps(len(x), draw)
        if self.time_dependent:
            x = self.noised(x, t, draw)
        wanted = self._wanted(x, t, batch["label"])
        return self.show_loss(cross_entropy(self(x, t), wanted, label_smoothing=self.label_smoothing))

    def _answers(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Loss without smoothing, whether the guess is right, and the guess's probability, float64 [B, 3]."""
        labels = batch["label"]
        log_p = self(x_t, t).double().log_softmax(1)
        confidence, guess = log_p.max(1)
        return torch.stack([-log_p.gather(1, labels[:, None])[:, 0], (guess == labels).double(), confidence.exp()], 1)

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

    def checkpoint_meta(self) -> dict[str, Any]:
        """What rebuilds the classifier, and where its labels came from."""
        return {**super().checkpoint_meta(), "pseudo_labels": self.pseudo_labels}


@dataclass
class LoadedClassifier(FrozenClassifier):
    """A trained surrogate, frozen and in evaluation mode: a classifier for guidance.

    Args:
        pseudo_labels: Where its labels came from, as the data source told it.
    """

    pseudo_labels: dict[str, Any]


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
    fields, meta = read_frozen(path, SurrogateModule, weights, device)
    return LoadedClassifier(**fields, pseudo_labels=meta["pseudo_labels"])
