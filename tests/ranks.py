"""What the suite's one group of three processes (gloo, CPU) does, all in one start: importing alone takes seconds.

    python -m torch.distributed.run --standalone --nproc_per_node 3 tests/ranks.py FOLDER COMMANDS

First every metric and the sharded search on groups of 3 and of 2 (rank 0 writes ``ranks3.json``, ``ranks2.json``), then
the first two processes run the command lines in the JSON file COMMANDS as a pair, as a user's ``--trainer.devices 2``;
rank 0 then reads a trained surrogate, in a process that never saw its training (``answers.json``).
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_mem.metrics import (
    Authenticity,
    EideticMemorization,
    FrechetDistance,
    MemorizationRatio,
    MemorizationScores,
    NormalizedL2,
    PixelsExtractor,
    PrecisionRecallDensityCoverage,
    SamplePhases,
    Shard,
    duplicate_groups,
    sharded_neighbors,
)

SHARES = {1: [1.0], 2: [0.8, 0.2], 3: [0.5, 0.1, 0.4]}
"""Parts of the work, as unequal as they come."""


def images(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, 6, 6), dtype=np.uint8))


def bank_and_samples() -> tuple[torch.Tensor, torch.Tensor]:
    """A bank with duplicates, and samples of which every third is a copy."""
    bank, samples = images(61, 0), images(47, 1)
    bank[7], bank[40] = bank[3], bank[3]
    samples[::3] = bank[np.random.default_rng(2).integers(0, 20, len(samples[::3]))]
    return bank, samples


def parts(count: int, world: int) -> list[slice]:
    ends = [round(count * sum(SHARES[world][:rank])) for rank in range(world)] + [count]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def metrics(bank: torch.Tensor) -> dict[str, Any]:
    pixels = PixelsExtractor()
    bands = {"close": (0.0, 0.1), "near": (0.1, 0.35)}
    return {
        "ratio": MemorizationRatio(bank),
        "normalized_l2": NormalizedL2(bank, k=5),
        "frechet": FrechetDistance(pixels(bank), pixels),
        "scores": MemorizationScores(bank, bands, measure="rms_l2"),
        "eidetic": EideticMemorization(bank, 0.1),
        "phases": SamplePhases(bank, 0.1, 0.3),
        "prdc": PrecisionRecallDensityCoverage(pixels(bank), pixels, k=3),
        "authenticity": Authenticity(bank),
    }


def plain(value: Any) -> Any:
    """Tensors as numbers, at full precision."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def searches(bank: torch.Tensor) -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, torch.Tensor | None]]:
    """Images and floats, few neighbours and all, with and without groups."""
    kinds = {"uint8": lambda rows: rows, "float32": lambda rows: rows.float() / 255}
    groups = duplicate_groups(bank)
    sizes = ((1, None), (4, groups), (59, groups), (61, None))
    return {
        f"{kind} {k} {'rows' if grouped is None else 'groups'}": (cast, k, grouped)
        for kind, cast in kinds.items()
        for k, grouped in sizes
    }


def measured(world: int, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Every metric on this process's part of the samples, in batches of 5; values are of all parts together."""
    bank, samples = bank_and_samples()
    own = samples[parts(len(samples), world)[rank]]
    found = {}
    for name, metric in metrics(bank).items():
        metric.process_group = group
        for batch in own.split(5):
            metric.update(batch)
        found[name] = {"value": plain(metric.compute())}
        if hasattr(metric, "interval"):
            found[name]["interval"] = plain(metric.interval())
    return found


def searched(world: int, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The sharded search: images and floats, with and without groups, and what is refused."""
    bank, samples = bank_and_samples()
    rows = parts(len(bank), world)[rank]
    found: dict[str, Any] = {}
    for name, (cast, k, groups) in searches(bank).items():
        shard = Shard(cast(bank)[rows], rows.start, len(bank))
        answer = sharded_neighbors(cast(samples), shard, k, groups=groups, process_group=group)
        found[name] = plain(list(answer))
    try:  # a row is missing: all processes say so, none waits for ever
        sharded_neighbors(samples, Shard(bank[rows][1:], rows.start + 1, len(bank)), 1, process_group=group)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def answers(folder: Path) -> dict[str, Any]:
    """What the surrogate that one process trained says of two noises, and where it says it comes from."""
    from lightning_mem.modules import load_classifier

    classifier = load_classifier(folder / "surrogate1" / "checkpoints" / "last.ckpt")
    x_t = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    logits = classifier(x_t, torch.tensor([3, 700]))
    return {"logits": plain(logits), "digest": classifier.digest, "target": classifier.target_digest}


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def main(folder: Path, commands: list[list[str]]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    for world, group in ((3, None), (2, pair)):
        if rank < world:
            found = {"metrics": measured(world, rank, group), "search": searched(world, rank, group)}
            (folder / f"ranks{world}_{rank}.json").write_text(json.dumps(found))
    port = [free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    if rank < 2:
        # a store of their own: the launcher's still holds the addresses of the first group under the same keys
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port[0])}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        from lightning_mem.cli import run

        for command in commands:
            run(command)
        if rank == 0:
            (folder / "answers.json").write_text(json.dumps(answers(folder)))
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
