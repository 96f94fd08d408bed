"""The one DataModule that all LightningModules share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mem.data.batches import EvaluationBlocks, TrainBatches
from lightning_mem.data.deduplicate import DuplicateGroup, Rule, check_rule, duplicate_groups, write_duplicates
from lightning_mem.data.labels import LabelRule, assign_labels, classes_of
from lightning_mem.data.listed import ListedSource, listed_split
from lightning_mem.data.sources import AbstractSource, DigitsSource
from lightning_mem.data.split import ImageSet, draw_split, image_digest, read_images, write_members
from lightning_mem.randomness import generator

BLOCK = 64
"""Rows of a network call while measuring: part of every definition, so that batch_size never changes a number."""

RESIDENT_BYTES = 2 << 30
"""Members up to this size are kept on the training device and indexed there."""


@dataclass(frozen=True)
class Duplicates:
    """Repeat some members in every pass, to study what repetition does.

    Args:
        count: How many members are repeated (the first of the drawn order).
        times: How often each of them stands in a pass; the others stand once. With a list, the first ``count`` members
            stand as often as its first number says, the next ``count`` as the second says, and so on.
    """

    count: int = 0
    times: int | list[int] = 1

    def __post_init__(self) -> None:
        if self.count < 0 or not self.levels or min(self.levels) < 1:
            raise ValueError(f"duplicates need count >= 0 and times >= 1, got {self.count} and {self.times}")

    @property
    def levels(self) -> list[int]:
        """``times`` as a list."""
        return [self.times] if isinstance(self.times, int) else list(self.times)

    @property
    def total(self) -> int:
        """How many members are named."""
        return self.count * len(self.levels)


class MemorizationDataModule(LightningDataModule):
    """Members to train on, held-out images of the same source for the control, and their labels.

    A batch is a dict: ``image`` float32 [B, C, H, W] in [-1, 1], ``index`` int64 [B] (place in the source),
    ``mirrored`` bool [B], and ``label`` int64 [B] when labels are on. The batch of step s depends on (seed, s) alone.

    Args:
        source: Where images come from; by default scikit-learn's handwritten digits.
        num_members: How many images are trained on; null for all that are not held out.
        num_heldout: How many images of the same source are never trained on; they are the control. null, for all, is
            for a source that lists them itself (:class:`ListedSource`).
        image_size: Side in pixels; other sizes are resized (short side) and centre-cropped. null takes 8 for digits
            and is an error for other sources.
        channels: 1 (grey) or 3 (RGB).
        seed: Decides members, held-out images, labels and the order of batches.
        split_seed: Decides members, held-out images and labels instead, so that one set is trained on in several
            orders; null for ``seed``.
        batch_size: Images per optimizer step over *all* processes, so that a recipe does not change with the number
            of GPUs; each process gets an equal share.
        num_workers: Reader processes for sets too large for the training device.
        flip: Mirror each image with probability 1/2; the memorization bank then holds both orientations.
        duplicates: Repeat some members.
        labels: ``none``; ``true`` labels of the source; ``random`` out of ``num_classes``; ``unique`` per member;
            ``binary`` (random bits). Fixed per image, whatever the order or the other members.
        num_classes: Number of labels of the rule ``random``; elsewhere it may be left out.
        members: File of source indices (a run's ``members.json``, a JSON list, ``.npy`` or one a line); excludes
            num_members.
        heldout: File of source indices to hold out; excludes num_heldout.
        steps_per_epoch: Batches of one Lightning epoch (progress bar, epoch hooks); null is one pass over the members.
        deduplicate: Take out members that show again what another one shows: ``exact`` (pixel for pixel), or how far
            apart they may be, in (0, 1) (RMS-L2 on [0, 1]; of 1,024 digits 0.08 takes out 6, and 0.1 takes out 52).
            They are taken out of the members that would have been trained on without it, so there are fewer, and the
            held-out images are the same; mirror images count with ``flip``; of each group the lowest source index
            stays, once, whatever ``duplicates`` says. The groups are written into ``duplicates.json``.

    Raises:
        ValueError: If a number is out of range, an option contradicts another, or there are too few images.
    """

    def __init__(
        self,
        source: AbstractSource | None = None,
        num_members: int | None = None,
        num_heldout: int | None = 512,
        image_size: int | None = None,
        channels: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        flip: bool = False,
        duplicates: Duplicates | None = None,
        labels: LabelRule = "none",
        num_classes: int | None = None,
        members: str | None = None,
        heldout: str | None = None,
        steps_per_epoch: int | None = None,
        deduplicate: Rule | None = None,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source if source is not None else DigitsSource()
        for name, value, least in (
            ("num_members", num_members, 1),
            ("num_heldout", num_heldout, 0),
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("steps_per_epoch", steps_per_epoch, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if members is not None and num_members is not None:
            raise ValueError(
                f"give num_members or members, not both; got {num_members} and {members!r} (--data.num_members null)"
            )
        if isinstance(self.source, ListedSource):
            if members is not None or heldout is not None:
                raise ValueError(
                    "members and heldout are files of indices, but the source lists both sides itself: leave them "
                    f"null, got {members!r} and {heldout!r}"
                )
        elif num_heldout is None:
            raise ValueError(
                f"num_heldout null takes all held-out images of a ListedSource; a {type(self.source).__name__} lists "
                "none: say how many to hold out"
            )
        if deduplicate is not None:
            check_rule(deduplicate)
            if labels == "unique":
                raise ValueError(
                    "labels: unique makes as many classes as members are drawn, and deduplicate takes some out: train "
                    "with data.members, the members.json of a run with deduplicate"
                )
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if image_size is None:
            if not isinstance(self.source, DigitsSource):
                raise ValueError(f"data.image_size must be given for {type(self.source).__name__}")
            image_size = 8
        self.num_members, self.num_heldout = num_members, num_heldout
        self.image_size, self.channels, self.seed = image_size, channels, seed
        self.split_seed = seed if split_seed is None else split_seed
        self.batch_size, self.num_workers, self.flip = batch_size, num_workers, flip
        self.duplicates = duplicates if duplicates is not None else Duplicates()
        self.labels, self.num_classes = labels, num_classes
        self.members_file, self.heldout_file = members, heldout
        self.steps_per_epoch = steps_per_epoch
        self.deduplicate = deduplicate
        self.duplicate_groups: list[DuplicateGroup] = []
        self._removed: ImageSet | None = None
        self._sets: tuple[ImageSet, ImageSet] | None = None

    def prepare_data(self) -> None:
        """Download what can be downloaded, on one process."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Draw and read both sets; called by the Trainer, or by hand."""
        if self._sets is not None:
            return
        self.source.open()
        members, heldout = self._split()
        if self.duplicates.total > len(members):
            named = " x ".join(str(part) for part in (self.duplicates.count, len(self.duplicates.levels)) if part != 1)
            raise ValueError(f"duplicates.count is {named or 1}, but there are {len(members)} members")
        if self.deduplicate is not None:
            members = self._deduplicated(members, self.deduplicate)
        classes_of(
            self.labels,
            num_classes=self.num_classes,
            num_members=len(members),
            source_classes=self.source.num_classes,
        )
        self._sets = (self._labelled(members, len(members)), self._labelled(heldout, len(members)))

    def _split(self) -> tuple[ImageSet, ImageSet]:
        """Both sets: as the source lists them, or drawn from it."""
        options: dict[str, Any] = {
            "num_members": self.num_members, "image_size": self.image_size, "channels": self.channels,
            "mirror": self.flip, "seed": self.split_seed,
        }  # fmt: skip
        if isinstance(self.source, ListedSource):
            return listed_split(self.source, num_heldout=self.num_heldout, **options)
        members, heldout, passed_over = draw_split(
            self.source, num_heldout=self.num_heldout or 0, members=self.members_file, heldout=self.heldout_file,
            **options,
        )  # fmt: skip
        if passed_over:
            rank_zero_info(f"{passed_over} images equal a member pixel for pixel and cannot be held out: passed over")
        return members, heldout

    def _deduplicated(self, members: ImageSet, rule: Rule) -> ImageSet:
        """The members without those that another one stands for."""
        self.duplicate_groups = duplicate_groups(members, rule, self.flip)
        gone = torch.tensor([index for group in self.duplicate_groups for index in group.removed], dtype=torch.int64)
        stays = ~torch.isin(members.indices, gone)
        self._removed = members.part((~stays).nonzero().flatten())
        rank_zero_info(
            f"deduplicate {rule}: {len(gone)} of {len(members)} members taken out, in {len(self.duplicate_groups)} "
            f"groups, the largest of {max((len(g.removed) + 1 for g in self.duplicate_groups), default=1)}"
        )
        return members.part(stays.nonzero().flatten())

    def _labelled(self, part: ImageSet, num_members: int, source: AbstractSource | None = None) -> ImageSet:
        """With labels; the indices count in ``source``, where it is not the data module's own."""
        if self.labels == "unique":  # a held-out image has no label of its own: it borrows one
            return replace(part, labels=torch.arange(len(part)) % num_members)
        labels = assign_labels(
            self.labels,
            indices=part.indices.numpy(),
            num_classes=self.num_classes,
            true_labels=(self.source if source is None else source).labels() if self.labels == "true" else None,
            seed=self.split_seed,
        )
        return replace(part, labels=None if labels is None else torch.from_numpy(labels))

    @property
    def members(self) -> ImageSet:
        """The images that are trained on."""
        return self._both()[0]

    @property
    def heldout(self) -> ImageSet:
        """Images of the same source that are never trained on; may be empty."""
        return self._both()[1]

    @property
    def removed(self) -> ImageSet | None:
        """Members that ``deduplicate`` took out: neither trained on nor unseen; null without it."""
        self._both()
        return self._removed

    def captions(self) -> tuple[list[str], list[str]] | None:
        """What every member and every held-out image is captioned; null where the source has no captions.

        Raises:
            ValueError: If one is missing; it names file and row.
        """
        found = self.source.captions()
        if found is None:
            return None
        members, heldout = ([found[index] for index in part.indices.tolist()] for part in self._both())
        return members, heldout

    def _both(self) -> tuple[ImageSet, ImageSet]:
        if self._sets is None:
            raise ValueError("the data are not read yet: call setup() (a Trainer does)")
        return self._sets

    def bank(self) -> tuple[Tensor, Tensor]:
        """What a sample may be a copy of: uint8 [M, C, H, W] and the member each row shows, int64 [M].

        With flips the bank holds both orientations; row r shows member ``owners[r]``.
        """
        images = self.members.images
        owners = torch.arange(len(images))
        if self.flip:
            return torch.cat([images, images.flip(-1)]), torch.cat([owners, owners])
        return images, owners

    def heldout_bank(self) -> Tensor:
        """The control's bank: held-out images, both orientations where training flips."""
        images = self.heldout.images
        return torch.cat([images, images.flip(-1)]) if self.flip else images

    def fresh(self, count: int) -> ImageSet:
        """Images of the source that are neither members, taken out of them, nor held out, in an addressed draw.

        The source of a pool is what the pool was drawn from; indices count there.

        What equals a member or a held-out image pixel for pixel (in either orientation, with ``flip``) is passed over,
        so there may be fewer than ``count``.

        Args:
            count: At most so many.
        """
        known = [part for part in (self.members, self.heldout, self.removed) if part is not None]
        taken = torch.cat([part.indices for part in known])
        source, places = self.source.whole(taken.numpy())
        rest = torch.randperm(len(source), generator=generator(self.seed, "fresh"))
        rest = rest[~torch.isin(rest, torch.from_numpy(places))][:count]
        images = read_images(source, rest.numpy(), self.image_size, self.channels)
        digests = tuple(image_digest(image) for image in images.numpy())
        seen = {digest for part in known for digest in part.digests}
        if self.flip:
            seen |= {image_digest(image) for part in known for image in part.images.flip(-1).numpy()}
        new = torch.tensor([row for row, digest in enumerate(digests) if digest not in seen], dtype=torch.int64)
        return self._labelled(ImageSet(images, rest, digests).part(new), len(self.members), source)

    def draw(self, part: ImageSet, count: int, name: str) -> Tensor:
        """Rows of an addressed draw without replacement, ascending; all of them where ``count`` is not smaller."""
        if count >= len(part):
            return torch.arange(len(part))
        return torch.randperm(len(part), generator=generator(self.seed, "cut", name))[:count].sort().values

    def settings(self) -> dict[str, Any]:
        """What decides the two sets, for ``members.json`` and records."""
        return {
            "source": self.source.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "flip": self.flip,
            "seed": self.seed,
            **({} if self.split_seed == self.seed else {"split_seed": self.split_seed}),
            "labels": self.labels,
            "duplicates": {"count": self.duplicates.count, "times": self.duplicates.times},
            **({} if self.deduplicate is None else {"deduplicate": self.deduplicate}),
        }

    def write_members(self, folder: Path) -> None:
        """Write ``members.json`` into a run folder, and ``duplicates.json`` where duplicates are taken out."""
        write_members(folder / "members.json", self.members, self.heldout, self.settings(), self.removed)
        if self.deduplicate is not None:
            write_duplicates(folder / "duplicates.json", self.duplicate_groups, self.settings())

    def _place(self) -> tuple[torch.device, int, int]:
        if self.trainer is None:
            return torch.device("cpu"), 0, 1
        return self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size

    def _progress(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.completed, progress.current.completed

    @property
    def occurrences(self) -> Tensor:
        """The member at each place of a pass, int64 [M]: some stand several times, unless duplicates are taken out."""
        count, levels = self.duplicates.count, self.duplicates.levels if self.deduplicate is None else []
        repeated = [
            torch.arange(place * count, (place + 1) * count).repeat(times - 1) for place, times in enumerate(levels)
        ]
        return torch.cat([torch.arange(len(self.members)), *repeated])

    @property
    def repeats(self) -> Tensor:
        """How often each member stands in a pass, int64 [N]."""
        return self.occurrences.bincount(minlength=len(self.members))

    def train_dataloader(self) -> TrainBatches:
        """Batches addressed by step; members live on the training device when they are small enough."""
        device, rank, world_size = self._place()
        members = self.members
        occurrences = self.occurrences
        resident = members.images.nbytes <= RESIDENT_BYTES
        home = device if resident else torch.device("cpu")
        return TrainBatches(
            members.images.to(home),
            None if members.labels is None else members.labels.to(home),
            members.indices.to(home),
            occurrences,
            batch_size=self.batch_size,
            seed=self.seed,
            flip=self.flip,
            length=self.steps_per_epoch or -(-len(occurrences) // self.batch_size),
            progress=self._progress,
            rank=rank,
            world_size=world_size,
            num_workers=0 if resident else self.num_workers,
        )

    def val_dataloader(self) -> EvaluationBlocks:
        """Held-out images, then equally many members, in blocks whose shape never depends on batch_size."""
        device, rank, world_size = self._place()
        rows = self.draw(self.members, max(len(self.heldout), 1) if len(self.heldout) else BLOCK, "validation")
        parts = (self.heldout, self.members)
        labels = None
        if self.members.labels is not None:
            labels = torch.cat([p.labels for p in parts if p.labels is not None])
            labels = labels[torch.cat([torch.arange(len(self.heldout)), len(self.heldout) + rows])]
        return EvaluationBlocks(
            torch.cat([self.heldout.images, self.members.images[rows]]),
            labels,
            torch.cat([self.heldout.indices, self.members.indices[rows]]),
            block=BLOCK,
            rank=rank,
            world_size=world_size,
            device=device,
        )

    def test_dataloader(self) -> EvaluationBlocks:
        """As for validation."""
        return self.val_dataloader()
