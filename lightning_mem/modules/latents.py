"""Latents of training images, each encoded once."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.datamodule import RESIDENT_BYTES
from lightning_mem.diffusion import Codec


class LatentCache:
    """What a codec makes of images, kept in memory by name up to a size; beyond it images are encoded at each use.

    Args:
        codec: Its result must depend on the image alone.
        capacity: Bytes.
    """

    def __init__(self, codec: Codec, capacity: int = RESIDENT_BYTES) -> None:
        self.codec, self.capacity = codec, capacity
        self._rows: dict[Hashable, Tensor] = {}
        self._bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentCache":
        # copies of a module share what costs time to make
        return self

    def __call__(self, images: Tensor, names: Iterable[Hashable]) -> Tensor:
        """Latents of images [B, C, H, W], on their device.

        Args:
            images: Pixels in [-1, 1].
            names: One per image; equal names mean equal images.
        """
        keys = list(names)
        missing = list(dict.fromkeys(key for key in keys if key not in self._rows))
        fresh: dict[Hashable, Tensor] = {}
        if missing:
            rows = torch.tensor([keys.index(key) for key in missing], device=images.device)
            latents = self.codec.encode(images[rows])
            fresh = dict(zip(missing, latents, strict=True))
            for key, latent in zip(missing, latents.cpu(), strict=True):
                if self._bytes + latent.nbytes <= self.capacity:
                    self._rows[key] = latent.clone()  # a view would keep the whole batch
                    self._bytes += latent.nbytes
        return torch.stack([fresh[key] if key in fresh else self._rows[key].to(images.device) for key in keys])

    def clear(self) -> None:
        """Let go of all of them."""
        self._rows.clear()
        self._bytes = 0
