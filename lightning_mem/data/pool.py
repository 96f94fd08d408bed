"""A pool: some images of a source as a source of their own, so that seeded half splits of it can be drawn."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lightning_mem.data.sources import AbstractSource
from lightning_mem.randomness import generator


class PoolSource(AbstractSource):
    """An addressed draw of images of another source. Indices count in the pool, not in that source.

    With ``num_members`` and ``num_heldout`` half of the pool each, ``data.seed`` draws a half to train on, and all the
    others are held out: so LiRA's target and shadow models are trained.

    Args:
        source: What the pool is drawn from.
        count: Images of the pool, at least 2.
        seed: Of the draw; not ``data.seed``, which draws the halves.

    Raises:
        ValueError: If count is below 2, or the source has fewer images.
    """

    def __init__(self, source: AbstractSource, count: int, seed: int = 0) -> None:
        if count < 2:
            raise ValueError(f"a pool needs at least 2 images, got count {count}")
        self.source, self.count, self.seed = source, count, seed

    @property
    def name(self) -> str:
        """The source's, with the number of images and the seed."""
        return f"{self.source.name}, pool of {self.count} (seed {self.seed})"

    @property
    def num_classes(self) -> int | None:
        """The source's."""
        return self.source.num_classes

    def prepare(self) -> None:
        """Prepare the source."""
        self.source.prepare()

    def open(self) -> None:
        """Open the source."""
        self.source.open()

    @cached_property
    def places(self) -> np.ndarray:
        """Of the pool's images in the source, int64 [count], ascending."""
        total = len(self.source)
        if self.count > total:
            raise ValueError(f"a pool of {self.count} was asked for, but {self.source.name} has {total} images")
        drawn = torch.randperm(total, generator=generator(self.seed, "pool"))[: self.count]
        return drawn.sort().values.numpy()

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :class:`AbstractSource`."""
        return self.source.read(int(self.places[self._checked(index)]), image_size, channels)

    def whole(self, indices: np.ndarray) -> tuple[AbstractSource, np.ndarray]:
        """What the pool was drawn from; see :class:`AbstractSource`."""
        return self.source.whole(self.places[indices])

    def labels(self) -> np.ndarray | None:
        """True labels of the pool's images."""
        found = self.source.labels()
        return None if found is None else found[self.places]

    def captions(self) -> list[str] | None:
        """Captions of the pool's images."""
        found = self.source.captions()
        return None if found is None else [found[place] for place in self.places.tolist()]

    def path_of(self, index: int) -> Path | None:
        """The source's."""
        return self.source.path_of(int(self.places[self._checked(index)]))
