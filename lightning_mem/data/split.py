"""Which images are members, which are held out, and the file that says so."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_mem.data.sources import AbstractSource
from lightning_mem.randomness import generator
from lightning_mem.records import atomic_write, digest


@dataclass(frozen=True)
class ImageSet:
    """Some images of a source, in the order they were drawn.

    Args:
        images: uint8 [N, C, H, W].
        indices: int64 [N] places in the source.
        digests: Content digest of each image.
        labels: int64 [N], or null.
    """

    images: Tensor
    indices: Tensor
    digests: tuple[str, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: Tensor) -> "ImageSet":
        """These rows of it, int64 [n]."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageSet(
            self.images[rows], self.indices[rows], tuple(self.digests[row] for row in rows.tolist()), labels
        )

    @property
    def digest(self) -> str:
        """Of the contents, whatever their order."""
        return digest(sorted(self.digests))


def image_digest(image: np.ndarray) -> str:
    """Content digest of one uint8 image [C, H, W]: 16 hex digits of SHA-256 over shape and pixels."""
    return sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def read_images(source: AbstractSource, indices: np.ndarray, image_size: int, channels: int) -> Tensor:
    """Images of these indices as uint8 [N, C, H, W], with a progress bar on long work."""
    images = torch.empty(len(indices), channels, image_size, image_size, dtype=torch.uint8)
    array = images.numpy()

    def read(place: int) -> None:
        array[place] = source.read(int(indices[place]), image_size, channels)

    with ThreadPoolExecutor() as pool:
        places = pool.map(read, range(len(indices)))
        for _ in tqdm(places, f"reading {source.name}", len(indices), disable=len(indices) < 5000, leave=False):
            pass
    return images


def read_indices(path: str | Path, key: str) -> np.ndarray:
    """Indices of a file: JSON list, a run's ``members.json`` (its ``key`` part), ``.npy``, or one number a line.

    Raises:
        ValueError: If the file is missing, holds no integers, or one twice (named).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"the file of indices {path} does not exist")
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            found = np.asarray(content[key]["indices"] if isinstance(content, dict) else content)
        else:
            found = np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no list of indices ({error}); legal: .json, .npy, or one a line") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or len(found) == 0:
        raise ValueError(f"{path} must hold a flat, non-empty list of integers, got {found.dtype} {found.shape}")
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{path} names the indices {values[counts > 1][:5].tolist()} more than once")
    return found.astype(np.int64)


def _check_range(indices: np.ndarray, total: int, what: str) -> None:
    wrong = indices[(indices < 0) | (indices >= total)]
    if len(wrong):
        raise ValueError(f"{what} must lie in [0, {total}), got {wrong[:5].tolist()}")


def draw_split(
    source: AbstractSource,
    *,
    num_members: int | None,
    num_heldout: int,
    members: str | None,
    heldout: str | None,
    image_size: int,
    channels: int,
    mirror: bool,
    seed: int,
) -> tuple[ImageSet, ImageSet, int]:
    """Draw members and held-out images, disjoint by index and by content.

    The order of the source is one addressed permutation; members are its first ``num_members`` entries, so a
    smaller set is contained in a larger one of the same seed. Held-out images follow; one that equals a member
    pixel for pixel (or, with ``mirror``, mirrored) is passed over, because it would count as a copy.

    Args:
        source: Opened.
        num_members: Null for all that are not held out.
        num_heldout: How many to hold out.
        members: File of indices, or null to draw.
        heldout: File of indices, or null to draw.
        image_size: Side in pixels.
        channels: 1 or 3.
        mirror: Training flips images.
        seed: Seed of the draw.

    Returns:
        Members, held-out images, and how many candidates were passed over.

    Raises:
        ValueError: If there are too few images, or the two sets overlap (the indices are named).
    """
    total = len(source)
    order = torch.randperm(total, generator=generator(seed, "split")).numpy()
    if members is not None:
        member_indices = read_indices(members, "members")
    else:
        free = np.setdiff1d(order, read_indices(heldout, "heldout"), assume_unique=True) if heldout else order
        count = len(free) - (0 if heldout else num_heldout) if num_members is None else num_members
        if count < 1 or count + (0 if heldout else num_heldout) > len(free):
            raise ValueError(
                f"{count} members and {num_heldout} held-out images were asked for, but {source.name} has {total}: "
                "lower num_members or num_heldout"
            )
        keep = np.isin(order, free)
        member_indices = order[keep][:count]
    _check_range(member_indices, total, "members")
    own = read_images(source, member_indices, image_size, channels)
    digests = tuple(image_digest(image) for image in own.numpy())
    taken = set(digests)
    if mirror:
        taken |= {image_digest(image) for image in own.flip(-1).numpy()}
    member_set = ImageSet(own, torch.from_numpy(member_indices), digests)

    if heldout is not None:
        chosen = read_indices(heldout, "heldout")
        _check_range(chosen, total, "heldout")
        overlap = np.intersect1d(chosen, member_indices)
        if len(overlap):
            raise ValueError(f"the indices {overlap[:5].tolist()} are both members and held out; make them disjoint")
        held = read_images(source, chosen, image_size, channels)
        held_digests = tuple(image_digest(image) for image in held.numpy())
        copies = [int(i) for i, d in zip(chosen, held_digests, strict=True) if d in taken]
        if copies:
            raise ValueError(f"the held-out images {copies[:5]} equal a member pixel for pixel; leave them out")
        return member_set, ImageSet(held, torch.from_numpy(chosen), held_digests), 0

    rest = order[~np.isin(order, member_indices)]
    kept: list[int] = []
    kept_images: list[Tensor] = []
    kept_digests: list[str] = []
    passed_over, place = 0, 0
    while len(kept) < num_heldout:
        candidates = rest[place : place + num_heldout - len(kept)]
        if len(candidates) == 0:
            raise ValueError(
                f"{num_heldout} held-out images were asked for, but beside {len(member_indices)} members {source.name} "
                f"has only {len(kept)} that differ from every member: lower num_heldout"
            )
        place += len(candidates)
        for index, image in zip(candidates, read_images(source, candidates, image_size, channels), strict=True):
            found = image_digest(image.numpy())
            if found in taken:
                passed_over += 1
                continue
            kept.append(int(index))
            kept_images.append(image)
            kept_digests.append(found)
    images = torch.stack(kept_images) if kept else torch.empty(0, channels, image_size, image_size, dtype=torch.uint8)
    return member_set, ImageSet(images, torch.tensor(kept, dtype=torch.int64), tuple(kept_digests)), passed_over


def write_members(
    path: Path, members: ImageSet, heldout: ImageSet, settings: dict[str, Any], removed: ImageSet | None = None
) -> None:
    """Write ``members.json``: indices and content digests of both sets, and of members that were taken out."""
    content = {
        "settings": settings,
        **{
            name: {"digest": part.digest, "indices": part.indices.tolist(), "digests": list(part.digests)}
            for name, part in (("members", members), ("heldout", heldout), ("removed", removed))
            if part is not None
        },
    }
    with atomic_write(path) as file:
        json.dump(content, file)
