"""Two processes for attacks, played by threads that wait for each other wherever they gather or the first one works."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lightning_mem.evaluation import Scene, Workers

T = TypeVar("T")


def on_two(scene: Scene, work: Callable[[Scene], T]) -> list[T]:
    """What each of two processes gets in one scene."""
    barrier, sent = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2

    def play(rank: int) -> T:
        def gather(part: Tensor) -> Tensor:
            sent[rank] = part
            barrier.wait()
            found = torch.stack(list(sent))
            barrier.wait()  # nobody sends again before all have read
            return found

        def first(task: Callable[[], None]) -> None:
            if rank == 0:
                task()
            barrier.wait()

        return work(dataclasses.replace(scene, workers=Workers(rank, 2, gather), first=first, _read=[]))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(play, range(2)))
