"""Two lists as one source: images that a model was trained on, and images that it was not."""

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lightning_mem.data.csv_source import CSVSource
from lightning_mem.data.folder import FolderSource
from lightning_mem.data.sources import AbstractSource, ArraySource
from lightning_mem.data.split import ImageSet, image_digest, read_images
from lightning_mem.randomness import generator

SHIFT = 0.01
"""Below this p value the sizes of members and held-out images are said to differ."""

SHOWN = 5
"""Images that a message names at most."""


def source_of(path: str) -> AbstractSource:
    """The source that a path means: a folder of images, an ``.npz`` or ``.npy`` file, or a ``.csv``.

    Raises:
        ValueError: If it is none of these.
    """
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir():
        return FolderSource(path)
    if suffix == ".csv":
        return CSVSource(path)
    if suffix in (".npz", ".npy"):
        return ArraySource(path)
    raise ValueError(f"a list of images is a folder, an .npz or .npy file or a .csv, and {path!r} is none of these")


class ListedSource(AbstractSource):
    """Members and held-out images as the user lists them: the split of the data module is exactly these two lists.

    Nothing is drawn: members are the first list, held-out images the second, all of them where ``data.num_members`` and
    ``data.num_heldout`` are null, else an addressed draw of so many of each. An image that is in both is an error. True
    labels and captions are there where both lists have them; members in subfolders number the labels, and held-out
    images are in subfolders of the same names.

    Args:
        members: Images that the model was trained on: a folder (:class:`FolderSource`), an ``.npz`` or ``.npy`` file
            (:class:`ArraySource`), or a ``.csv`` with the column ``file`` and optionally ``caption`` and ``label``
            (:class:`CSVSource`).
        heldout: Images of the same kind that it never saw, likewise.

    Raises:
        ValueError: If a path is none of these.
    """

    def __init__(self, members: str, heldout: str) -> None:
        self.members, self.heldout = members, heldout

    @property
    def name(self) -> str:
        """Names of both lists."""
        return f"{self.parts[0].name} against {self.parts[1].name}"

    @cached_property
    def parts(self) -> tuple[AbstractSource, AbstractSource]:
        """Both lists as sources; made when first asked for, because the paths need not be there before."""
        return source_of(self.members), source_of(self.heldout)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where members and held-out images stand in this source, int64: the first list, then the second."""
        counts = [len(part) for part in self.parts]
        return np.arange(counts[0]), np.arange(counts[0], sum(counts))

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def _within(self, index: int) -> tuple[AbstractSource, int]:
        """The list that an image stands in, and its place there."""
        own, other = self.parts
        place = self._checked(index)
        return (own, place) if place < len(own) else (other, place - len(own))

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`."""
        part, place = self._within(index)
        return part.read(place, image_size, channels)

    def path_of(self, index: int) -> Path | None:
        """Of the list that the image stands in."""
        part, place = self._within(index)
        return part.path_of(place)

    def size(self, index: int) -> tuple[int, int] | None:
        """Of the list that the image stands in."""
        part, place = self._within(index)
        return part.size(place)

    def where(self, index: int) -> str:
        """Of the list that the image stands in."""
        part, place = self._within(index)
        return part.where(place)

    @property
    def num_classes(self) -> int | None:
        """Of both lists together; None without labels."""
        labels = self.labels()
        if labels is None:
            return None
        return max(int(labels.max()) + 1, *(part.num_classes or 0 for part in self.parts))

    def labels(self) -> np.ndarray | None:
        """True labels, int64 [N]; None unless both lists have them.

        Raises:
            ValueError: If one list has subfolders and the other numbers, or held-out images are in a subfolder that
                the members have not.
        """
        found = [part.labels() for part in self.parts]
        if found[0] is None or found[1] is None:
            return None
        names = [part.classes if isinstance(part, FolderSource) else None for part in self.parts]
        if (names[0] is None) != (names[1] is None):
            raise ValueError(
                f"the labels of {self.name} are subfolders in one list and numbers in the other: nobody knows which is "
                "which; write both as .csv with a column label"
            )
        if names[0] is not None and names[1] is not None:
            foreign = [name for name in names[1] if name not in names[0]]
            if foreign:
                raise ValueError(
                    f"the held-out images of {self.heldout} are in the subfolders {', '.join(foreign[:SHOWN])}, which "
                    f"{self.members} has not ({', '.join(names[0][:SHOWN])}): a subfolder is a class of the model"
                )
            found[1] = np.array([names[0].index(name) for name in names[1]], dtype=np.int64)[found[1]]
        return np.concatenate([found[0], found[1]])

    def captions(self) -> list[str] | None:
        """Captions of both lists; None when neither has them.

        Raises:
            ValueError: If one list has captions and the other has none, or one is missing (file and row).
        """
        found = [part.captions() for part in self.parts]
        if found[0] is None and found[1] is None:
            return None
        if found[0] is None or found[1] is None:
            without, with_ = (self.members, self.heldout) if found[0] is None else (self.heldout, self.members)
            raise ValueError(
                f"{with_} has captions and {without} has none: to be told apart, both are asked under their captions "
                "(a .csv with the columns file and caption), or both without (condition: empty)"
            )
        return [*found[0], *found[1]]

    def describe(self) -> str:
        """One line: both lists."""
        return f"members {self.parts[0].describe()}; held out {self.parts[1].describe()}"


def listed_split(
    source: ListedSource,
    *,
    num_members: int | None,
    num_heldout: int | None,
    image_size: int,
    channels: int,
    mirror: bool,
    seed: int,
) -> tuple[ImageSet, ImageSet]:
    """Members and held-out images of two lists, disjoint by content. Warns where their sizes are not of one kind.

    Args:
        source: Opened.
        num_members: How many of the first list, in an addressed draw; null for all.
        num_heldout: Of the second, likewise.
        image_size: Side in pixels.
        channels: 1 or 3.
        mirror: Training flips images.
        seed: Seed of the draw.

    Raises:
        ValueError: If a list is shorter than what was asked for, or a held-out image equals a member pixel for pixel
            (with ``mirror``, or mirrored): it says how many, and which.
    """
    chosen = []
    for places, count, word in zip(source.places(), (num_members, num_heldout), ("members", "heldout"), strict=True):
        if count is not None and count > len(places):
            raise ValueError(
                f"num_{word} is {count}, but the list {getattr(source, word)} has {len(places)} images: lower it, or "
                "set it to null for all of them"
            )
        drawn = torch.randperm(len(places), generator=generator(seed, "split", word))[:count].sort().values
        chosen.append(places[drawn.numpy()])
    images = [read_images(source, places, image_size, channels) for places in chosen]
    digests = [tuple(image_digest(image) for image in part.numpy()) for part in images]
    seen = dict(zip(digests[0], chosen[0].tolist(), strict=True))
    if mirror:
        turned = [image_digest(image) for image in images[0].flip(-1).numpy()]
        seen = dict(zip(turned, chosen[0].tolist(), strict=True)) | seen
    held = zip(chosen[1].tolist(), digests[1], strict=True)
    both = [(place, seen[digest]) for place, digest in held if digest in seen]
    if both:
        shown = ", ".join(f"{source.where(place)} equals {source.where(own)}" for place, own in both[:SHOWN])
        raise ValueError(
            f"{len(both)} of {len(chosen[1])} held-out images equal a member pixel for pixel at {image_size} x "
            f"{image_size} ({shown}{', ...' if len(both) > SHOWN else ''}): an image is one or the other, take them "
            "out of one list"
        )
    _warn_of_sizes(source, chosen)
    members, heldout = (
        ImageSet(part, torch.from_numpy(places), own) for part, places, own in zip(images, chosen, digests, strict=True)
    )
    return members, heldout


def _warn_of_sizes(source: ListedSource, chosen: Sequence[np.ndarray]) -> None:
    """Warn where the images, before they were made square, had other sizes on one side than on the other."""
    sides = [np.array([source.size(int(index)) for index in places]) for places in chosen]
    if min(map(len, sides)) == 0:
        return
    from scipy.stats import ks_2samp  # takes a while to import; most runs do not need it

    # short and long side; asymptotic, because sizes are tied, where it errs on the quiet side
    p = min(ks_2samp(sides[0][:, axis], sides[1][:, axis], method="asymp").pvalue for axis in (0, 1)) * 2
    if p < SHIFT:
        own, other = (" x ".join(f"{round(float(x))}" for x in np.median(side, 0)) for side in sides)
        warnings.warn(
            f"members and held-out images have different sizes (medians {own} and {other} pixels, two-sample test "
            f"p = {p:.3g}): one side is resized more than the other, and an attack may tell that instead of "
            "membership; take both from one collection",
            stacklevel=3,
        )
