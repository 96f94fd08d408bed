"""Are our exact neighbours faster than everybody's, and is the memory they take bounded?

``nearest_neighbors`` (k = 2) against ``torch.cdist`` and ``topk``, faiss ``IndexFlatL2``, scikit-learn's brute force,
and the broadcast form (on few queries: in full it takes an hour), on the same rows with the same threads. Three data
sets: photograph patches cut from scikit-learn's two pictures at random places and sizes; the same with queries and
bank from disjoint parts of the pictures, so that overlap does not flatter; and Gaussian noise, where nothing can be
ruled out early. Sides alternate; the peers get float32 rows made beforehand. Neighbours are checked against float64
products (exact for 8-bit images); a peer's wrong answers are counted.

    python benchmarks/neighbors.py
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lightning_mem.metrics import bootstrap_interval, nearest_neighbors
from lightning_mem.randomness import derive_seed
from lightning_mem.records import Record, machine, write_records

ROOT = Path(__file__).resolve().parent.parent
SIDE = 32
K = 2
PEERS = {
    "cdist": "torch.cdist and topk, whole table",
    "faiss": f"faiss-cpu {faiss.__version__} IndexFlatL2",
    "sklearn": "scikit-learn NearestNeighbors(algorithm='brute')",
    "broadcast": "(queries[:, None] - bank).square().sum(-1), 1 query at a time",
}


def patches(count: int, seed: int, columns: tuple[float, float] = (0, 1)) -> Tensor:
    """uint8 [count, 3, 32, 32]: squares of random place and side, resized; from a part of the pictures' width."""
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    draw = np.random.default_rng(derive_seed(seed, "patches"))
    found = np.empty((count, 3, SIDE, SIDE), np.uint8)
    for place in range(count):
        picture = pictures[draw.integers(len(pictures))]
        left, right = (round(end * picture.width) for end in columns)
        side = int(draw.integers(SIDE, min(257, right - left + 1)))
        x, y = int(draw.integers(left, right - side + 1)), int(draw.integers(0, picture.height - side + 1))
        patch = picture.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        found[place] = np.asarray(patch).transpose(2, 0, 1)
    return torch.from_numpy(found)


def data(name: str, queries: int, bank: int) -> tuple[Tensor, Tensor]:
    """Queries and bank."""
    if name == "noise":
        dim = 3 * SIDE * SIDE
        generators = [torch.Generator().manual_seed(derive_seed(seed, "noise")) for seed in (1, 0)]
        return torch.randn(queries, dim, generator=generators[0]), torch.randn(bank, dim, generator=generators[1])
    if name == "disjoint":
        return patches(queries, 1, (0.6, 1)), patches(bank, 0, (0, 0.6))
    return patches(queries, 1), patches(bank, 0)


def sides(queries: Tensor, bank: Tensor, few: int) -> dict[str, Callable[[], Tensor]]:
    """Each side as a call that returns indices [Q, K]."""
    q, b = (rows.flatten(1).float() for rows in (queries, bank))  # the peers take float32
    index = faiss.IndexFlatL2(q.shape[1])
    index.add(b.numpy())
    brute = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(b.numpy())

    def broadcast() -> Tensor:
        found = [(row - b).square().sum(-1).topk(K, largest=False).indices for row in q[:few]]
        return torch.stack(found)

    return {
        "ours": lambda: nearest_neighbors(queries, bank, K)[1],
        "cdist": lambda: torch.cdist(q, b).topk(K, largest=False).indices,
        "faiss": lambda: torch.from_numpy(index.search(q.numpy(), K)[1]),
        "sklearn": lambda: torch.from_numpy(brute.kneighbors(q.numpy(), return_distance=False)),
        "broadcast": broadcast,
    }


def differing(queries: Tensor, bank: Tensor, found: Tensor) -> int:
    """How many queries have a neighbour that float64 products do not confirm; equal distances may change places."""
    q, b = (rows.flatten(1).double() for rows in (queries[: len(found)], bank))
    squares, wrong = b.square().sum(1), 0
    for part, rows in zip(q.split(500), found.split(500), strict=True):
        squared = squares - 2 * (part @ b.T)  # the query's own square changes no order
        true = squared.topk(K, largest=False).values
        tolerance = 0 if not queries.is_floating_point() else 1e-9 * squares.max()
        wrong += int((squared.gather(1, rows).sort(1).values - true > tolerance).any(1).sum())
    return wrong


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Bytes of anonymous memory (not of mapped files) at the peak, above what there was."""
    status, found, stop = Path("/proc/self/status"), {"extra": 0}, threading.Event()

    def anonymous() -> int:
        return 1024 * int(status.read_text().split("RssAnon:")[1].split()[0])

    before = anonymous()

    def watch() -> None:
        while not stop.wait(0.005):
            found["extra"] = max(found["extra"], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def compare(name: str, args: argparse.Namespace) -> list[Record]:
    """Time all sides on one data set."""
    queries, bank = data(name, args.queries, args.bank)
    calls = sides(queries, bank, args.few)
    calls["ours"]()  # first calls set up threads
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    wrong: dict[str, int] = {}
    for turn in range(args.pairs):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for side in order:
            if side in ("sklearn", "broadcast") and turn > 0:
                continue  # once: they are far behind
            start = time.perf_counter()
            found = calls[side]()
            seconds[side].append(time.perf_counter() - start)
            if turn == 0:
                wrong[side] = differing(queries, bank, found[: args.checked])
    if wrong["ours"]:
        raise SystemExit(f"{name}: {wrong['ours']} of our answers are not the nearest: nothing is recorded")
    return report(name, seconds, wrong, args)


def about(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What was searched, for definitions."""
    return {
        "data": "noise" if name == "noise" else "patches",
        "regions": {"noise": "none", "disjoint": "disjoint"}.get(name, "overlapping"),
        "queries": args.queries,
        "bank_size": args.bank,
        "dim": 3 * SIDE * SIDE,
        "k": K,
        "ours_dtype": "float32" if name == "noise" else "uint8",
        "threads": torch.get_num_threads(),
        "device": machine(),
    }


def report(name: str, seconds: dict[str, list[float]], wrong: dict[str, int], args: argparse.Namespace) -> list[Record]:
    """Print the table of one data set and make its records."""
    table = Table(title=f"{name}: {args.queries:,} x {args.bank:,} x {3 * SIDE * SIDE}, k = {K}")
    for column in ("", "seconds", "peer / ours", "low", "high", "wrong"):
        table.add_column(column, justify="left" if not column else "right")
    records = []
    per_query = {
        side: torch.tensor(times).double() / (args.few if side == "broadcast" else args.queries)
        for side, times in seconds.items()
    }
    for side, each in per_query.items():
        ratios = each / per_query["ours"][: len(each)]
        ends = bootstrap_interval(torch.median, ratios) if len(ratios) > 1 else (None, None)
        value = float(ratios.quantile(0.5))
        shown = ["-" if v is None else f"{v:.2f}" for v in (value, *ends)]
        table.add_row(side, " ".join(f"{v:.2f}" for v in seconds[side]), *shown, f"{wrong[side]} of {args.checked}")
        if side == "ours":
            own = float(torch.tensor(seconds[side]).quantile(0.5))
            records.append(Record("neighbors/seconds/ours", own, len(each), 0, unit="s",
                                  definition=about(name, args), seconds=round(sum(seconds[side]), 2)))  # fmt: skip
            continue
        definition = {
            **about(name, args),
            "peer": PEERS[side],
            "queries": args.few if side == "broadcast" else args.queries,
            "peer_dtype": "float32",
            "statistic": "median over pairs of seconds per query, peer / ours: above 1 ours is faster",
            "interval": "percentile bootstrap over pairs 95%" if len(each) > 1 else "none: one pair",
            "checked": args.checked,
        }
        took = round(sum(seconds[side]), 2)
        records += [
            Record(f"neighbors/speedup/{side}", value, len(each), 0, *ends, unit="ratio", definition=definition,
                   seconds=took),
            Record(f"neighbors/wrong/{side}", wrong[side], args.checked, 0, unit="queries", definition=definition),
            Record(f"neighbors/seconds/{side}", float(torch.tensor(seconds[side]).quantile(0.5)), len(each), 0,
                   unit="s", definition=definition, seconds=took),
        ]  # fmt: skip
    Console(width=120).print(table)
    return records


def memory(args: argparse.Namespace) -> list[Record]:
    """Memory besides the answer: on images in memory, and on a memory-mapped file larger than the budget."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.npy"
        mapped = np.lib.format.open_memmap(file, "w+", np.uint8, (args.mapped, 3 * SIDE * SIDE))
        draw = np.random.default_rng(derive_seed(0, "mapped"))
        for start in range(0, args.mapped, 10_000):
            mapped[start : start + 10_000] = draw.integers(0, 256, mapped[start : start + 10_000].shape, np.uint8)
        mapped.flush()
        queries, bank = data("patches", args.queries, args.bank)
        cases = {"resident": (queries.flatten(1), bank.flatten(1)), "mapped": (queries[:1000].flatten(1), mapped)}
        cases["mapped"][0][0] = torch.from_numpy(np.array(mapped[-1]))
        for storage, (some, rows) in cases.items():
            for chunk_bytes in (args.chunk_mib * 2**20, 4 * args.chunk_mib * 2**20):
                with peak_memory() as peak:
                    start = time.perf_counter()
                    distances, indices = nearest_neighbors(some, rows, K, chunk_bytes=chunk_bytes)
                    took = time.perf_counter() - start
                if storage == "mapped" and (indices[0, 0] != args.mapped - 1 or distances[0, 0] != 0):
                    raise SystemExit("the last row of the mapped bank was not found")
                share = peak["extra"] / chunk_bytes
                definition = {"storage": storage, "bank_size": len(rows), "dim": rows.shape[1], "k": K,
                              "queries": len(some), "chunk_bytes": chunk_bytes, "threads": torch.get_num_threads(),
                              "statistic": "peak anonymous memory above the start, answer included",
                              "device": machine()}  # fmt: skip
                records.append(Record("neighbors/extra_memory", peak["extra"], 1, 0, unit="bytes",
                                      definition=definition, seconds=round(took, 2)))  # fmt: skip
                print(f"{storage:9} {len(rows):9,} rows, budget {chunk_bytes >> 20} MiB: {peak['extra'] >> 20} MiB more"
                      f" ({share:.2f} of it), {took:.1f} s")  # fmt: skip
    return records


def main(given: list[str] | None = None) -> list[Record]:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Our neighbours against everybody's.")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--few", type=int, default=200, help="queries of the broadcast form")
    parser.add_argument("--checked", type=int, default=2_000, help="queries whose neighbours are checked in float64")
    parser.add_argument("--pairs", type=int, default=3, help="timings of ours, cdist and faiss")
    parser.add_argument("--mapped", type=int, default=1_000_000, help="rows of the memory-mapped bank; 0: leave it out")
    parser.add_argument("--chunk_mib", type=int, default=256, help="budget of the memory measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", nargs="*", choices=("patches", "disjoint", "noise"),
                        default=["patches", "disjoint", "noise"])  # fmt: skip
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "neighbors.jsonl"))
    args = parser.parse_args(given)
    if min(args.queries, args.few, args.checked, args.pairs, args.threads) < 1 or args.bank < K:
        raise SystemExit(f"counts must be at least 1 and the bank at least {K}, got {vars(args)}")
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    records = []
    for name in args.data:
        records += compare(name, args)
        write_records(args.out, records)
    if args.mapped:
        records += memory(args)
    write_records(args.out, records)
    print(f"written to {args.out}")
    return records


if __name__ == "__main__":
    main()
