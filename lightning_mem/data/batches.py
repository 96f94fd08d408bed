"""Which images the batch of step s holds: a function of (seed, s), whatever epoch, resume or number of processes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mem.randomness import generator
from lightning_mem.types import to_float

Batch = dict[str, Tensor]


class AddressedOrder:
    """An endless stream of shuffled passes, cut into batches of one size.

    Batch s holds places s*B .. (s+1)*B-1 of the stream; pass p is the permutation drawn at address
    ``("order", p)``. A batch may cross from one pass into the next, so none is short and no image is left out.

    Args:
        length: Rows of one pass.
        batch_size: Images of one global batch B.
        seed: Seed of the order.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def _rows_of_pass(self, number: int) -> Tensor:
        if number != self._pass:
            self._pass = number
            self._order = torch.randperm(self.length, generator=generator(self.seed, "order", number))
        return self._order

    def batch(self, step: int) -> Tensor:
        """Rows of the global batch of ``step`` (0 is the first), int64 [B]."""
        place, rows = step * self.batch_size, []
        missing = self.batch_size
        while missing:
            offset = place % self.length
            piece = self._rows_of_pass(place // self.length)[offset : offset + missing]
            rows.append(piece)
            place, missing = place + len(piece), missing - len(piece)
        return torch.cat(rows)


class _Rows(Dataset[Batch]):
    """Whole batches by a list of (row, flip) pairs; used by the workers of a streaming loader."""

    def __init__(self, images: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        self.images, self.labels, self.indices = images, labels, indices

    def __getitem__(self, key: tuple[Tensor, Tensor]) -> Batch:
        return gather(self.images, self.labels, self.indices, *key)


def gather(images: Tensor, labels: Tensor | None, indices: Tensor, rows: Tensor, flips: Tensor) -> Batch:
    """The batch of these rows: ``image`` float32 [-1, 1], ``index``, ``mirrored``, and ``label`` where there is one.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N] or null.
        indices: int64 [N] source indices.
        rows: int64 [B].
        flips: bool [B]; these rows are mirrored.
    """
    # rows and flips were drawn on the CPU; without flips no mirrored copy is made
    mirrored = bool(flips.any())
    rows, flips = rows.to(images.device), flips.to(images.device)
    image = to_float(images[rows])
    if mirrored:
        image = torch.where(flips[:, None, None, None], image.flip(-1), image)
    batch = {"image": image, "index": indices[rows], "mirrored": flips}
    if labels is not None:
        batch["label"] = labels[rows]
    return batch


class TrainBatches:
    """The training loader: this process's share of the global batch of each step.

    Args:
        images: uint8 [N, C, H, W], on the training device when they are to be indexed there.
        labels: int64 [N] or null.
        indices: int64 [N] source indices.
        occurrences: int64 [M]; row of the image at each place of a pass (members that repeat stand several times).
        batch_size: Global batch, over all processes.
        seed: Seed of order and flips.
        flip: Mirror each image with probability 1/2.
        length: Batches of one Lightning epoch.
        progress: Called when an epoch is (re)started; returns (batches done in all, batches done in this epoch).
        rank: This process.
        world_size: Number of processes.
        num_workers: Processes that read ahead; 0 reads in the training process.

    Raises:
        ValueError: If the global batch cannot be divided evenly.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor,
        occurrences: Tensor,
        *,
        batch_size: int,
        seed: int,
        flip: bool,
        length: int,
        progress: Callable[[], tuple[int, int]],
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size is the global batch and must divide evenly over {world_size} processes, "
                f"got {batch_size}: choose a multiple of {world_size}"
            )
        self._rows = _Rows(images, labels, indices)
        self._occurrences = occurrences
        self._order = AddressedOrder(len(occurrences), batch_size, seed)
        self._seed, self._flip, self._length, self._progress = seed, flip, length, progress
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._num_workers = num_workers

    def __len__(self) -> int:
        return self._length

    def key(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows and flips of this process's share of the batch of ``step``."""
        rows = self._occurrences[self._order.batch(step)]
        flips = torch.zeros(len(rows), dtype=torch.bool)
        if self._flip:
            flips = torch.rand(len(rows), generator=generator(self._seed, "flip", step)) < 0.5
        return rows[self._share], flips[self._share]

    def state_dict(self) -> dict[str, int]:
        """Empty: where the loader stands follows from the Trainer's progress. Lightning asks before it resumes."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Batch]:
        done, in_epoch = self._progress()
        steps = range(done, done + self._length - in_epoch)
        if self._num_workers == 0:
            return (self._rows[self.key(step)] for step in steps)
        loader = DataLoader(
            self._rows,
            sampler=_Keys(self, steps),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator(self._seed, "workers", done),  # else the loader draws from the global one
        )
        return iter(loader)


class _Keys:
    """Sampler over steps; a class so that the loader asks for one step at a time."""

    def __init__(self, batches: TrainBatches, steps: range) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._batches.key(step) for step in self._steps)


class EvaluationBlocks:
    """Blocks of one shape over held-out images and equally many members, dealt out to the processes.

    Every process gets the same number of blocks (collectives must meet); a block that is dealt twice is told
    apart by its rows. The last block is padded by repetition: ``row`` says which rows count once.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N] or null.
        indices: int64 [N] source indices.
        block: Rows of a block.
        rank: This process.
        world_size: Number of processes.
        device: Where the blocks go.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor,
        *,
        block: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._rows = _Rows(images, labels, indices)
        self._device = device
        blocks = torch.arange(-(-len(images) // block) * block).clamp(max=len(images) - 1).split(block)
        per_rank = -(-len(blocks) // world_size)
        self._own = [blocks[(rank + i * world_size) % len(blocks)] for i in range(per_rank)]

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._own:
            batch = self._rows[rows, torch.zeros(len(rows), dtype=torch.bool)]
            batch["row"] = rows
            yield {name: value.to(self._device) for name, value in batch.items()}
