"""A small training set of patterns, nothing like each other, and samples of which a known share are copies."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_mem.evaluation import Workers
from lightning_mem.types import SampleSet

T = TypeVar("T")


def patterns(count: int, seed: int = 0, channels: int = 1) -> Tensor:
    """Random images: any two are equally far from each other."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 8, 8), generator=draw, dtype=torch.uint8)


def write_npz(path: str, images: Tensor) -> str:
    """As the field writes samples: no manifest."""
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    return path


def write_pngs(folder: str, images: Tensor) -> str:
    """As a GAN's script writes samples."""
    Path(folder).mkdir()
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(f"{folder}/{number:05d}.png")
    return folder


def side_by_side(world: int, work: Callable[[Workers], T]) -> list[T]:
    """What each of several workers gets, run in threads that wait for each other wherever they gather."""
    barrier, sent = threading.Barrier(world, timeout=30), [torch.empty(0)] * world

    def workers(rank: int) -> Workers:
        def gather(part: Tensor) -> Tensor:
            sent[rank] = part
            barrier.wait()
            found = torch.stack(list(sent))
            barrier.wait()  # nobody sends again before all have read
            return found

        return Workers(rank, world, gather)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(workers(rank)), range(world)))


@dataclass
class Planted:
    """60 samples: three copies of member 4 and two of member 7, one pixel a level off; the others are new."""

    members: Tensor
    heldout: Tensor
    samples: SampleSet

    @classmethod
    def draw(cls) -> "Planted":
        members, heldout, new = patterns(40), patterns(100, 1), patterns(60, 2)
        new[:5] = members[[4, 7, 4, 7, 4]]
        new[:5, 0, 0, 0] ^= 1
        return cls(members, heldout, SampleSet(new, torch.arange(60)))

    def write(self) -> list[str]:
        """Options that name the files."""
        write_npz("samples.npz", self.samples.images)
        write_npz("members.npz", self.members)
        write_npz("heldout.npz", self.heldout)
        return ["--samples", "samples.npz", "--members", "members.npz", "--heldout", "heldout.npz"]
