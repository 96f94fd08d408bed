"""CPSample's labels: as many random bits of one kind as of the other, each fixed to the content of its image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.split import ImageSet, image_digest
from lightning_mem.randomness import derive_seed
from lightning_mem.records import digest


def image_keys(images: Tensor) -> list[str]:
    """One name for an image and its mirror image: the smaller of their content digests.

    Args:
        images: uint8 [N, C, H, W].
    """
    pairs = zip(images.numpy(), images.flip(-1).numpy(), strict=True)
    return [min(image_digest(image), image_digest(mirror)) for image, mirror in pairs]


def balanced_bits(keys: Sequence[str], seed: int, *address: int | str) -> Tensor:
    r"""Random bits, int64 [N], of which half are 1: bit 1 for the half of the keys with the larger addressed numbers.

    The number of a key depends on the key, the seed and the address alone, so no order, shuffling, sharding or process
    changes a bit, and a further key changes the bit of at most one other. (The rule ``binary`` of data.labels draws
    each bit alone: its halves differ by about :math:`\sqrt{n}`, but no bit depends on another image.)

    Args:
        keys: One per image; equal keys get equal bits and count once. Of an odd number the larger half is 0.
        seed: Of the draw.
        address: What it is for.
    """
    ranked = sorted(set(keys), key=lambda key: (derive_seed(seed, "balanced bit", *address, key), key))
    ones = set(ranked[len(ranked) - len(ranked) // 2 :])
    return torch.tensor([int(key in ones) for key in keys], dtype=torch.int64)


@dataclass(frozen=True)
class RandomLabels:
    """The bits of some images, of one or of several independent labelings.

    Args:
        indices: int64 [P], places in the source.
        digests: Content digest of each image.
        keys: One name for each image and its mirror image: :func:`image_keys`.
        bits: int64 [P, R], of R labelings.

    Raises:
        ValueError: If a label is no bit, a labeling is not balanced (over the different images, up to one), or two
            images of one key differ in a bit.
    """

    indices: Tensor
    digests: tuple[str, ...]
    keys: tuple[str, ...]
    bits: Tensor

    def __post_init__(self) -> None:
        if self.bits.ndim != 2 or not len(self.indices) == len(self.digests) == len(self.keys) == len(self.bits) > 0:
            raise ValueError(f"bits must be [images, labelings], got {tuple(self.bits.shape)} for {len(self)} images")
        if not ((self.bits == 0) | (self.bits == 1)).all():
            raise ValueError(f"random labels are binary, 0 or 1, got {self.bits.unique().tolist()[:5]}")
        first = {key: row for row, key in reversed(list(enumerate(self.keys)))}
        unlike = (self.bits != self.bits[[first[key] for key in self.keys]]).any(1).nonzero().flatten()
        if len(unlike):
            row = int(unlike[0])
            pair = [int(self.indices[first[self.keys[row]]]), int(self.indices[row])]
            raise ValueError(f"the images {pair} are equal or mirror images, but their labels differ: give them one")
        counts = self.bits[list(first.values())].sum(0)
        wrong = ((2 * counts - len(first)).abs() > 1).nonzero().flatten()
        if len(wrong):
            raise ValueError(
                f"random labels must be balanced up to one, but {int(counts[wrong[0]])} of {len(first)} different "
                "images have the label 1: set data.labels none, and balanced ones are drawn"
            )

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_labelings(self) -> int:
        """R."""
        return self.bits.shape[1]

    @property
    def digest(self) -> str:
        """Of images and bits, whatever their order."""
        order = self.indices.argsort()
        return digest(self.indices[order], [self.digests[row] for row in order.tolist()], self.bits[order])

    @classmethod
    def draw(cls, part: ImageSet, num_labelings: int, seed: int, name: str = "members") -> "RandomLabels":
        """Balanced bits for these images, of labelings that know nothing of each other."""
        keys = image_keys(part.images)
        columns = [balanced_bits(keys, seed, name, number) for number in range(num_labelings)]
        return cls(part.indices, part.digests, tuple(keys), torch.stack(columns, 1))

    @classmethod
    def given(cls, part: ImageSet, bits: Tensor) -> "RandomLabels":
        """Bits int64 [P, R] that somebody chose for these images."""
        return cls(part.indices, part.digests, tuple(image_keys(part.images)), bits)

    def of(self, indices: Tensor) -> Tensor:
        """Bits of these source indices, int64 [B, R] where the indices are; -1 for images that have none."""
        known, order = self.indices.to(indices.device).sort()
        place = torch.searchsorted(known, indices).clamp(max=len(known) - 1)
        bits = self.bits.to(indices.device)[order[place]]
        return torch.where((known[place] == indices)[:, None], bits, -1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for checkpoints."""
        return {
            "indices": self.indices,
            "digests": list(self.digests),
            "keys": list(self.keys),
            "bits": self.bits.to(torch.uint8),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RandomLabels":
        """The labels that :meth:`to_dict` wrote."""
        bits = values["bits"].to(torch.int64)
        return cls(values["indices"], tuple(values["digests"]), tuple(values["keys"]), bits)
