"""What samples are compared with: the images a model was trained on, and images of the same kind it never saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mem.data import AbstractSource, MemorizationDataModule
from lightning_mem.randomness import generator
from lightning_mem.records import digest


def _no_file(index: int) -> str:
    return ""


def _no_captions() -> None:
    return None


def files_of(source: AbstractSource) -> Callable[[int], str]:
    """File of an image by its place in a source; empty where images are no files."""
    return lambda index: str(source.path_of(index) or "")


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with.

    Args:
        members: uint8 [M, C, H, W]: what was trained on (both orientations where training flips).
        heldout: uint8 [H, C, H, W]: same source, never trained on; may be empty.
        owners: int64 [M]: the image that each row of ``members`` shows (its place in the member list).
        indices: int64: place of each member in its source, for the ledger.
        mirror: Mirror images count as one image.
        members_digest: Of the member set.
        heldout_digest: Of the held-out set.
        seed: Of the addressed draws that cut the larger bank.
        file_of: File of a member by its place in the source, for the ledger; empty where images are no files.
        repeats: int64: how often each member stands in a pass of training; null for once.
        fresh: At most so many real images that are neither members nor held out, uint8 [N, C, H, W].
        labels: int64 [m] and [n] of members and held-out images, each image once; null where there are none.
        captions: Reads those of both, likewise; null where there are none.
    """

    members: Tensor
    heldout: Tensor
    owners: Tensor
    indices: Tensor
    mirror: bool = False
    members_digest: str = ""
    heldout_digest: str = ""
    seed: int = 0
    file_of: Callable[[int], str] = _no_file
    repeats: Tensor | None = None
    fresh: Callable[[int], Tensor] | None = None
    labels: tuple[Tensor, Tensor] | None = None
    captions: Callable[[], tuple[Sequence[str], Sequence[str]] | None] = _no_captions

    @classmethod
    def from_images(
        cls, members: Tensor, heldout: Tensor | None = None, file_of: Callable[[int], str] = _no_file
    ) -> "Reference":
        """A reference from two stacks of uint8 images [N, C, H, W].

        Args:
            members: What the model was trained on.
            heldout: Images of the same kind that it never saw; without them there is no control.
            file_of: File of a member by its row, where they are files.
        """
        held = heldout if heldout is not None else members[:0]
        rows = torch.arange(len(members))
        found = cls(members, held, rows, rows, file_of=file_of)
        return replace(found, members_digest=digest(members), heldout_digest=digest(held))

    @classmethod
    def from_datamodule(cls, data: MemorizationDataModule) -> "Reference":
        """The reference of a run."""
        bank, owners = data.bank()
        return cls(
            members=bank,
            heldout=data.heldout_bank(),
            owners=owners,
            indices=data.members.indices,
            mirror=data.flip,
            members_digest=data.members.digest,
            heldout_digest=data.heldout.digest,
            seed=data.seed,
            file_of=files_of(data.source),
            repeats=data.repeats,
            fresh=lambda count: data.fresh(count).images,
            labels=_labels_of(data),
            captions=data.captions,
        )

    def cut(self, bank: Tensor, name: str, at_most: int | None = None) -> Tensor:
        """Rows of ``bank`` in an addressed draw that makes both banks equally large, ascending.

        Args:
            bank: Members or held-out images.
            name: Address of the draw.
            at_most: An upper bound besides.
        """
        size = min(len(self.members), len(self.heldout)) if len(self.heldout) else len(bank)
        size = size if at_most is None else min(size, at_most)
        if size >= len(bank):
            return torch.arange(len(bank))
        return torch.randperm(len(bank), generator=generator(self.seed, "bank", name))[:size].sort().values


def _labels_of(data: MemorizationDataModule) -> tuple[Tensor, Tensor] | None:
    own, other = data.members.labels, data.heldout.labels
    return None if own is None or other is None else (own, other)
