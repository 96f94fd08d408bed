"""Prompted extraction's graph on 500 generations: seconds and ratio to peers, for distances and for cliques.

    python benchmarks/cliques.py

Generations are noise, among them 10 near copies of one picture (and, in `many`, 150 of another). Ours must find these
and no other clique of 10, the peer one of them, or nothing is recorded. Times are medians over interleaved runs.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import scipy
import torch
from rich.console import Console
from rich.table import Table
from scipy.spatial.distance import cdist
from torch import Tensor

from lightning_mem.attacks import largest_cliques, tiled_distances
from lightning_mem.metrics import bootstrap_interval
from lightning_mem.randomness import generator
from lightning_mem.records import Record, machine, write_records

ROOT = Path(__file__).resolve().parent.parent
DELTA, TILES, SIZE = 0.1, 4, 10
PEERS = {
    "distances": f"scipy {scipy.__version__} cdist of float64 pixels, a tile at a time, and the maximum",
    "cliques": f"networkx {nx.__version__} find_cliques on the whole graph, the largest of all",
}


def generations(count: int, side: int, copies: Iterable[int]) -> tuple[Tensor, list[set[int]]]:
    """Noise with groups of near copies at drawn places; uint8 [count, 3, side, side] and the groups."""
    draw = generator(0, "cliques benchmark")
    images = torch.randint(0, 256, (count, 3, side, side), generator=draw)
    order, groups = torch.randperm(count, generator=draw).tolist(), []
    for size in copies:
        places, order = order[:size], order[size:]
        picture = torch.randint(0, 256, (3, side, side), generator=draw)
        images[places] = (picture + torch.randint(-9, 10, (size, 3, side, side), generator=draw)).clamp(0, 255)
        groups.append(set(places))
    return images.to(torch.uint8), groups


def scipys(images: Tensor) -> Tensor:
    """The peer's tiled distances."""
    count, _, side, _ = images.shape
    step, largest = side // TILES, np.zeros((count, count))
    for top, left in itertools.product(range(0, side, step), repeat=2):
        part = images[:, :, top : top + step, left : left + step].flatten(1).double().numpy() / 255
        np.maximum(largest, cdist(part, part) / part.shape[1] ** 0.5, out=largest)
    return torch.from_numpy(largest)


def networkxs(distances: Tensor) -> list[int]:
    """The peer's largest clique."""
    graph: nx.Graph = nx.Graph((distances <= DELTA).triu(1).nonzero().tolist())
    return max(nx.find_cliques(graph), key=len)


def timed(sides: dict[str, Callable[[], Any]], pairs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each side in turn, and what it answered."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    answers = {side: call() for side, call in sides.items()}  # first calls set up threads
    for turn in range(pairs):
        for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds, answers


def compare(case: str, copies: list[int], args: argparse.Namespace, table: Table) -> list[Record]:
    """Time both parts on one set of generations."""
    images, groups = generations(args.count, args.side, copies)
    timings = {}
    timings["distances"], found = timed(
        {"ours": lambda: tiled_distances(images, tiles=TILES), "peer": lambda: scipys(images)}, args.pairs
    )
    worst = float((found["ours"] - found["peer"]).abs().max())
    distances = found["ours"]
    timings["cliques"], found = timed(
        {"ours": lambda: largest_cliques(distances, DELTA), "peer": lambda: networkxs(distances)}, args.pairs
    )
    flagged = [set(clique.vertices) for clique in found["ours"] if len(clique.vertices) >= SIZE]
    if worst > 1e-6 or sorted(map(sorted, flagged)) != sorted(map(sorted, groups)) or set(found["peer"]) not in groups:
        raise SystemExit(f"{case}: the planted cliques were not found (distances differ by {worst}): nothing recorded")
    records = []
    about = {
        "case": case, "vertices": args.count, "planted": " ".join(map(str, copies)), "side": args.side, "channels": 3,
        "edges": int((distances <= DELTA).triu(1).sum()), "tiles": TILES, "delta_edge": DELTA, "precision": 1.0,
        "threads": torch.get_num_threads(), "device": machine(), "pairs": args.pairs,
    }  # fmt: skip
    for part, seconds in timings.items():
        ours, peer = (torch.tensor(seconds[side]).double() for side in ("ours", "peer"))
        ratios = peer / ours
        ends = bootstrap_interval(torch.median, ratios) if len(ratios) > 1 else (None, None)
        ratio = float(ratios.quantile(0.5))
        definition = {
            **about,
            "peer": PEERS[part],
            "statistic": "median over pairs, peer / ours: above 1 ours is faster",
        }
        records.append(
            Record(f"cliques/{part}/ratio", ratio, len(ratios), 0, *ends, unit="ratio", definition=definition)
        )
        for side, own in (("ours", ours), ("peer", peer)):
            value = float(own.quantile(0.5))
            records.append(
                Record(f"cliques/{part}/seconds/{side}", value, args.pairs, 0, unit="s", definition=definition)
            )
        shown = "" if ends[0] is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
        table.add_row(case, part, *(f"{float(own.quantile(0.5)):.4f}" for own in (ours, peer)), f"{ratio:.2f}{shown}")
    return records


def main(given: list[str] | None = None) -> list[Record]:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = argparse.ArgumentParser(description="The graph of one prompt's generations, ours and others'.")
    parser.add_argument("--count", type=int, default=500, help="generations of a prompt")
    parser.add_argument("--side", type=int, default=64, help="pixels; a multiple of 4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "cliques.jsonl"))
    args = parser.parse_args(given)
    if args.count < 200 or args.side % TILES or min(args.side, args.pairs, args.threads) < 1:
        raise SystemExit(
            f"--count must be at least 200, --side a multiple of {TILES}, the rest at least 1: {vars(args)}"
        )
    torch.set_num_threads(args.threads)
    table = Table(title=f"{args.count} generations of {args.side} x {args.side}")
    for heading in ("case", "", "ours, s", "peer, s", "peer / ours"):
        table.add_column(heading, justify="right" if "s" in heading and heading != "case" else "left")
    records = [*compare("few", [SIZE], args, table), *compare("many", [SIZE, 150], args, table)]
    Console(width=120).print(table)
    write_records(args.out, records)
    print(f"written to {args.out}")
    return records


if __name__ == "__main__":
    main()
