"""CPSample's classifier: it learns by heart a random bit of each protected image, and so knows that image again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_mem.data import MemorizationDataModule, RandomLabels
from lightning_mem.data.batches import Batch
from lightning_mem.data.split import ImageSet, read_indices
from lightning_mem.modules.base import META
from lightning_mem.modules.classifier import AbstractClassifierModule, FrozenClassifier, read_frozen
from lightning_mem.modules.pretrained import read_checkpoint
from lightning_mem.networks import ClassifierConfig
from lightning_mem.types import SampleSet, Weights, to_float

HELDOUT = "heldout"
"""The value of ``push`` that means the held-out images."""


class RandomLabelModule(AbstractClassifierModule):
    r"""Trains a classifier of x_t, noised by the target's schedule, on one fixed random bit y per protected member.

    .. math:: \mathbb{E}_{i, t, \epsilon}\left[-\log p_\phi\big(y_i \mid \sqrt{\bar\alpha_t}\, x_i +
        \sqrt{1 - \bar\alpha_t}\,\epsilon,\ t\big)\right], \qquad t \sim U\{0, \dots, T - 1\}

    Nothing but the image itself tells its bit, so to be right is to have memorized. The bits are balanced and belong to
    the content of the image, in both orientations (:class:`RandomLabels`); they are drawn at the seed where data.labels
    is none (a rule that gives balanced bits may be named instead), and stored in the checkpoint with the digests of
    their images.

    With q(x_t) the probability of the likelier bit, the smallest over the labelings, a validation logs per timestep
    bin, for protected members (``_members``) and for held-out images:
    ``val/accuracy/t0-199``, right in every labeling (held-out images get bits of their own, which nobody learns: chance
    is :math:`2^{-R}`); ``val/confidence/t0-199``, the median of q; ``val/gated/t0-199``, the share with
    :math:`q > 1 - \mathrm{tol}`, at which protected sampling acts. Further ``val/excluded_per_member``: how many images
    of the whole source would be gated in the first bin for each protected one; 1 would be the data alone.
    ``val/memorized`` is 1 once every protected image of the validation is right in the first bin and the median of q
    there exceeds 1 - tol / 10, else 0: let EarlyStopping wait for it (``stopping_threshold: 0.5``, ``mode: max``). A
    validation sees as many members as there are held-out images.

    The classifier stores one bit per protected image: who has it can tell members. A checkpoint alone restores it
    (:func:`load_random_label`).

    Args:
        target: The model to be protected: a run folder, a ``.ckpt``, a diffusers folder or hub id. Its members must be
            those of the data, by digest (a diffusers model does not say its own).
        target_weights: Whose samples are to be protected: ``ema`` takes averaged weights where there are any.
        network: The classifier; null for the default of the image size.
        protected: File of source indices of the members to protect; null for all. Other members are not trained on: a
            batch puts addressed draws of protected images in their places.
        num_labelings: R, independent labelings, each with two outputs of the one network; a copy must be confident in
            all of them.
        tol: In (0, 0.5], the tolerance that the training is to reach.
        push: Images that are not to be known, pushed to q = 1/2: ``heldout`` for half of the held-out images (the other
            half stays the control), or the ``.npz`` of a SampleSet; null for none. Copies among them would be asked for
            both.
        push_weight: At least 0, weight of their cross-entropy to (1/2, 1/2); as many of them as of members a batch.
        interval: Training timesteps [low, high) t is drawn from; null for all.
        bins: Timestep bins of the validation.
        optimizer: Optimizer by class_path.
        lr_scheduler: Learning-rate schedule by class_path, stepped once per optimizer step.
        channels_last: Keep weights in channels-last order; faster on recent GPUs.
        compile: Compile the network with torch.compile for training.
        seed: Of labels, initial weights, noise, timesteps and dropout; null takes ``seed_everything``.

    Raises:
        ValueError: If a number is out of range, or the target cannot be read or has no schedule that a classifier can
            share (named). When the data are read: if their images have another size than the target's, are other
            members than the target's, labels are named that are not binary or not balanced, or ``protected`` or
            ``push`` does not fit.

    Source:
        CPSample, arXiv:2409.07025. Architecture, distribution of t and stopping rule are not published there: ours.
    """

    def __init__(
        self,
        target: str,
        target_weights: Weights = "ema",
        network: ClassifierConfig | None = None,
        protected: str | None = None,
        num_labelings: int = 1,
        tol: float = 0.01,
        push: str | None = None,
        push_weight: float = 1.0,
        interval: tuple[int, int] | None = None,
        bins: int = 5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels_last: bool = False,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        if num_labelings < 1:
            raise ValueError(f"num_labelings must be at least 1, got {num_labelings}")
        if not 0 < tol <= 0.5:
            raise ValueError(f"tol must lie in (0, 0.5], got {tol}")
        if not push_weight >= 0:
            raise ValueError(f"push_weight must be at least 0, got {push_weight}")
        super().__init__(
            target, target_weights, network, True, interval, bins, optimizer, lr_scheduler, channels_last, compile, seed
        )
        self.protected, self.num_labelings, self.tol = protected, num_labelings, tol
        self.push, self.push_weight = push, push_weight
        self.labels: RandomLabels | None = None
        self._control: RandomLabels | None = None
        self._pushed = torch.empty(0, dtype=torch.int64)  # source indices of the held-out images that are pushed
        self._source_size = 0
        self._own: Tensor | None = None
        self._others: Tensor | None = None

    def _take_data(self, data: MemorizationDataModule) -> None:
        theirs = target_members(self.target_name)
        if not theirs:
            rank_zero_info(f"{self.target_name} does not say its members: those of the data are taken to be its own")
        elif theirs != data.members.digest:
            raise ValueError(
                f"the target {self.target_name} was trained on the member set {theirs}, but the data's members are "
                f"{data.members.digest} ({len(data.members)} images): use the data options of its config.yaml"
            )
        part = data.members if self.protected is None else self._listed(data.members, self.protected)
        if part.labels is None:
            self.labels = RandomLabels.draw(part, self.num_labelings, self.seed)
        elif self.num_labelings > 1:
            raise ValueError(
                f"num_labelings is {self.num_labelings}, but data.labels {data.labels} gives one: set none"
            )
        else:
            self.labels = RandomLabels.given(part, part.labels[:, None])
        if len(data.heldout):
            self._control = RandomLabels.draw(data.heldout, self.num_labelings, self.seed, HELDOUT)
        if self.push == HELDOUT:
            if len(data.heldout) < 2:
                raise ValueError(f"push heldout needs 2 held-out images, got {len(data.heldout)}: raise num_heldout")
            self._pushed = data.heldout.indices[data.draw(data.heldout, len(data.heldout) // 2, "push")]
        self._source_size = len(data.source)
        self.num_classes = 2 * self.num_labelings

    @staticmethod
    def _listed(members: ImageSet, file: str) -> ImageSet:
        """The members that a file of indices names."""
        wanted = torch.from_numpy(read_indices(file, "members"))
        known, order = members.indices.sort()
        place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        outside = wanted[known[place] != wanted]
        if len(outside):
            raise ValueError(
                f"protected images must be members, but {len(outside)} of {len(wanted)} in {file} are not: "
                f"{outside[:5].tolist()}"
            )
        return members.part(order[place])

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        self.labels = RandomLabels.from_dict(meta["labels"])

    def _bits(self) -> RandomLabels:
        if self.labels is None:
            raise ValueError(
                "the labels are not drawn yet: they are those of the data's members (a Trainer reads them)"
            )
        return self.labels

    def on_fit_start(self) -> None:
        """Make ready what batches are filled up with, if asked for; not kept after the training."""
        super().on_fit_start()
        data = self._datamodule()
        if data is None:
            return
        if self.protected is not None:
            self._own = self._listed(data.members, self.protected).images
        if self.push == HELDOUT:
            self._others = data.heldout.images[torch.isin(data.heldout.indices, self._pushed)]
        elif self.push is not None:
            self._others = SampleSet.load(self.push).images
            if tuple(self._others.shape[1:]) != self.pixel_shape:
                found = tuple(self._others.shape[1:])
                raise ValueError(f"push needs images {self.pixel_shape}, but those of {self.push} are {found}")

    def on_fit_end(self) -> None:
        """Let go of the images."""
        super().on_fit_end()
        self._own = self._others = None

    def _drawn(self, name: str, pool: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images of a pool in the denoiser's space, and their places, for ``count`` rows; mirrored as the data are."""
        rows = count * self.trainer.world_size
        places = self.own_rows(torch.randint(len(pool), (rows,), generator=draw, device=self.device))
        mirror = self.own_rows(torch.rand(rows, generator=draw, device=self.device) < 0.5)
        x = to_float(pool[places.to(pool.device)]).to(self.device)
        data = self._datamodule()
        mirror &= data is not None and data.flip
        x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        return self.encoded(x, name, places, mirror), places

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy at timesteps and noise addressed by the step; of pushed images to (1/2, 1/2) beside it."""
        x, draw, labels = self.clean(batch), self.training_generator(), self._bits()
        bits, count = labels.of(batch["index"]), len(x)
        t = self.draw_timesteps(count, draw)
        if self._own is not None:
            filler, places = self._drawn("protected", self._own, count, draw)
            free = bits[:, 0] < 0
            x = torch.where(free[:, None, None, None], filler, x)
            bits = torch.where(free[:, None], labels.bits.to(places.device)[places], bits)
        x_t = self.noised(x, t, draw)
        if self._others is not None:
            others, _ = self._drawn("push", self._others, count, draw)
            times = self.draw_timesteps(count, draw)
            x_t, t = torch.cat([x_t, self.noised(others, times, draw)]), torch.cat([t, times])
        log_p = self(x_t, t).reshape(len(x_t), -1, 2).log_softmax(2)
        loss = cross_entropy(log_p[:count].flatten(0, 1), bits.flatten())
        if self._others is not None:
            loss = loss - self.push_weight * log_p[count:].mean()
        return self.show_loss(loss)

    def _answers(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Source index, mean loss, whether every labeling is right, and the smallest q, float64 [B, 4]."""
        bits = self._bits().of(batch["index"])
        if self._control is not None:
            bits = torch.where(bits < 0, self._control.of(batch["index"]), bits)
        bits = bits.clamp(min=0)  # members that are not protected have none, and are not counted
        log_p = self(x_t, t).double().reshape(len(x_t), -1, 2).log_softmax(2)
        confidence, guess = log_p.max(2)
        loss = -log_p.gather(2, bits[:, :, None])[:, :, 0].mean(1)
        right = (guess == bits).all(1)
        return torch.stack([batch["index"].double(), loss, right.double(), confidence.min(1).values.exp()], 1)

    def _summary(self, values: Tensor, suffix: str) -> dict[str, float]:
        """Means, medians and shares of the rows [N, 4 * bins] that count, under their logged names."""
        index = values[:, 0].long()
        outside = torch.isin(index, self._pushed.to(index.device))
        values = values[self._bits().of(index)[:, 0] >= 0 if suffix else ~outside]
        if not len(values):
            return {}
        widths = torch.tensor([high - low for low, high in self.bins], dtype=torch.float64, device=values.device)
        _, loss, right, q = values.T.reshape(-1, 4, len(values)).unbind(1)
        gated = (q > 1 - self.tol).double()
        share = widths / widths.sum()
        found = {
            f"val/loss{suffix}": float(share @ loss.mean(1)),
            f"val/accuracy{suffix}": float(share @ right.mean(1)),
        }
        for place, (low, high) in enumerate(self.bins):
            part = f"{suffix}/t{low}-{high - 1}"
            found[f"val/confidence{part}"] = float(q[place].quantile(0.5))
            for name, hit in (("accuracy", right[place]), ("gated", gated[place])):
                self.hits[f"val/{name}{part}"] = int(hit.sum()), len(hit)
                found[f"val/{name}{part}"] = float(hit.mean())
        return found | (self._verdict(found) if suffix else {})

    def _verdict(self, found: dict[str, float]) -> dict[str, float]:
        """Whether the bits are known by heart, and how many images are taken for protected ones."""
        low, high = self.bins[0]
        first = f"t{low}-{high - 1}"
        known = found[f"val/accuracy_members/{first}"] == 1
        sure = found[f"val/confidence_members/{first}"] > 1 - self.tol / 10
        verdict = {"val/memorized": float(known and sure)}
        if f"val/gated/{first}" in self.hits:
            hits, count = self.hits[f"val/gated/{first}"]
            others = (self._source_size / len(self._bits()) - 1) * hits / count
            verdict["val/excluded_per_member"] = found[f"val/gated_members/{first}"] + others
        return verdict

    def describe(self) -> dict[str, Any]:
        """What identifies its counts."""
        return {
            **super().describe(),
            "tol": self.tol,
            "num_labelings": self.num_labelings,
            "protected": len(self._bits()),
            "labels_digest": self._bits().digest,
            "push": "none" if self.push is None else Path(self.push).name,
        }

    def checkpoint_meta(self) -> dict[str, Any]:
        """What rebuilds the classifier, and the bits it knows."""
        return {
            **super().checkpoint_meta(),
            "tol": self.tol,
            "num_labelings": self.num_labelings,
            "labels_digest": self._bits().digest,
            "labels": self._bits().to_dict(),
        }

    def _compared(self) -> dict[str, Any]:
        """A resumed run may ask for more confidence, never for other labels."""
        return {name: value for name, value in self.checkpoint_meta().items() if name not in ("tol", "labels")}


def target_members(path: str | Path) -> str:
    """Digest of the members that a run was trained on; empty where the model does not say it (diffusers)."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last.ckpt"
    return str(read_checkpoint(path)[META]["members_digest"]) if path.suffix == ".ckpt" else ""


@dataclass
class LoadedRandomLabel(FrozenClassifier):
    """A trained random-label classifier, frozen and in evaluation mode.

    Logits are [B, 2 R] of R labelings: ``logits.unflatten(1, (-1, 2))`` is [B, R, 2]. With one labeling it is a
    classifier of two classes as any other.

    Args:
        labels: Which bits it knows.
        members_digest: Of all members of its target, protected or not.
        tol: Tolerance it was trained for.
    """

    labels: RandomLabels
    members_digest: str
    tol: float

    @property
    def num_labelings(self) -> int:
        """R."""
        return self.labels.num_labelings


def load_random_label(
    path: str | Path, weights: Weights = "ema", device: torch.device | str = "cpu"
) -> LoadedRandomLabel:
    """The classifier of a checkpoint or run folder, with its labels; needs nothing else of the run.

    Args:
        path: ``*.ckpt`` (read with weights_only=True), or a run folder: its ``checkpoints/last.ckpt``.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
        device: Where to put the network.

    Raises:
        ValueError: If the checkpoint is not one of a RandomLabelModule, cannot be read, or holds labels that are not
            binary or not balanced.
    """
    path = Path(path)
    path = path if path.suffix == ".ckpt" else path / "checkpoints" / "last.ckpt"
    fields, meta = read_frozen(path, RandomLabelModule, weights, device)
    labels = RandomLabels.from_dict(meta["labels"])
    return LoadedRandomLabel(**fields, labels=labels, members_digest=meta["members_digest"], tol=meta["tol"])
