"""Is our Fréchet solver faster than the matrix root that others take, at the same answer?

``frechet_distance`` on two covariances of d = 2,048 features, and ``frechet_distance_from_features`` on n = 1,000 rows
of as many features, against the textbook formula with ``scipy.linalg.sqrtm`` of the product (pytorch-fid, clean-fid),
and against the eigenvalues of the product (torchmetrics). All must give one distance, or no record is written.
Sides alternate within a pair, and pairs in order, so slow drifts of the machine cancel. The features are Gaussian with
eigenvalues that fall as 1/i, like those of deep networks.

    OMP_NUM_THREADS=1 python benchmarks/frechet.py
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_mem.metrics import bootstrap_interval, frechet_distance, frechet_distance_from_features
from lightning_mem.randomness import generator
from lightning_mem.records import Record, machine, write_records

ROOT = Path(__file__).resolve().parent.parent
AGREE = {"full": 1e-6, "small": 5e-6}
"""Largest relative difference between two sides that are compared: SciPy's root of a matrix without full rank is itself
good to about 1e-6 only (our value there agrees with the eigenvalues of the Gram matrix to 1e-12)."""
PEERS = {"sqrtm": "scipy.linalg.sqrtm of the product", "eigvals": "torch.linalg.eigvals of the product"}


def features(n: int, d: int, arm: int) -> Tensor:
    """float64 [n, d] of a turned Gaussian with eigenvalues 1/i; the second arm is shifted and stretched a little."""
    draw = generator(0, "frechet", arm, n)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator(0, "frechet"), dtype=torch.float64)).Q
    scale = torch.arange(1, d + 1, dtype=torch.float64).rsqrt() * (1 + 0.15 * arm)
    return torch.randn(n, d, generator=draw, dtype=torch.float64) * scale @ turn + 0.02 * arm


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), torch.cov(rows.T)


def by_sqrtm(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """The textbook formula through SciPy's matrix root."""
    m1, s1, m2, s2 = (part.numpy() for part in (mu1, sigma1, mu2, sigma2))
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


def by_eigenvalues(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """The same through the eigenvalues of the product, which is not symmetric."""
    roots = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots)


def main(given: list[str] | None = None) -> list[Record]:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.

    Returns:
        The records: ``frechet/speedup/<peer>`` and ``frechet/seconds/<side>`` for each case.
    """
    parser = argparse.ArgumentParser(description="Our Fréchet solver against a matrix root.")
    parser.add_argument("--pairs", type=int, default=3, help="timings of each side")
    parser.add_argument("--d", type=int, default=2048, help="features")
    parser.add_argument("--n", type=int, default=1000, help="rows of the small case; below d")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "frechet.jsonl"))
    args = parser.parse_args(given)
    if args.pairs < 1 or not 2 <= args.n < args.d:
        raise SystemExit(f"--pairs must be at least 1 and --n in 2 .. d - 1, got {args.pairs}, {args.n} with {args.d}")
    many = [moments(features(2 * args.d + 1000, args.d, arm)) for arm in (0, 1)]
    few = [features(args.n, args.d, arm) for arm in (0, 1)]
    full = (*many[0], *many[1])

    def small(peer: Callable[..., float]) -> Callable[[], float]:
        return lambda: peer(*moments(few[0]), *moments(few[1]))  # the peers need the covariances

    cases: dict[str, tuple[int, dict[str, Callable[[], float]]]] = {
        "full": (
            2 * args.d + 1000,
            {
                "ours": lambda: frechet_distance(*full),
                "sqrtm": lambda: by_sqrtm(*full),
                "eigvals": lambda: by_eigenvalues(*full),
            },
        ),
        "small": (
            args.n,
            {"ours": lambda: frechet_distance_from_features(*few), "sqrtm": small(by_sqrtm)},
        ),
    }
    records, table = [], Table(title=f"Fréchet distance of {args.d} features: seconds, {args.pairs} pairs")
    for column in ("case", "peer", "ours", "peer's", "speedup", "low", "high", "differ by"):
        table.add_column(column, justify="left" if column in ("case", "peer") else "right")
    for case, (n, sides) in cases.items():
        frechet_distance_from_features(few[0][:50], few[1][:50])  # the libraries are awake
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        values: dict[str, float] = {}
        for number in range(args.pairs):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                start = time.perf_counter()
                values[name] = sides[name]()
                seconds[name].append(time.perf_counter() - start)
        for name in list(sides)[1:]:
            difference = abs(values["ours"] - values[name]) / abs(values[name])
            if difference > AGREE[case]:
                raise SystemExit(f"{case}: ours {values['ours']} and {name} {values[name]} differ: not compared")
            speedup = torch.tensor(seconds[name]).double() / torch.tensor(seconds["ours"]).double()
            records.append(_record(f"frechet/speedup/{name}", "ratio", speedup, case, name, n, args.d))
            shown = [f"{np.median(seconds[side]):.2f}" for side in ("ours", name)]
            ends = ["-" if end is None else f"{end:.1f}" for end in (records[-1].low, records[-1].high)]
            table.add_row(case, name, *shown, f"{records[-1].value:.1f}", *ends, f"{difference:.1e}")
        for name, values_s in seconds.items():
            taken = torch.tensor(values_s).double()
            records.append(_record(f"frechet/seconds/{name}", "s", taken, case, name, n, args.d))
    write_records(args.out, records)
    Console(width=110).print(table)
    return records


def _record(name: str, unit: str, rows: Tensor, case: str, side: str, n: int, d: int) -> Record:
    low, high = bootstrap_interval(lambda drawn: drawn.quantile(0.5), rows) if len(rows) > 1 else (None, None)
    definition = {
        "case": case,
        "peer": PEERS.get(side, "none: ours"),
        "scipy": scipy.__version__,
        "n": n,
        "d": d,
        "pairs": len(rows),
        "threads": torch.get_num_threads(),
        "statistic": "median over pairs; a speedup is the peer's seconds over ours, above 1 ours is faster",
        "interval": "percentile bootstrap over pairs 95%" if len(rows) > 1 else "none: one pair",
        "device": machine(),
    }
    value = float(rows.quantile(0.5))
    return Record(name, value, len(rows), 0, low=low, high=high, unit=unit, definition=definition)


if __name__ == "__main__":
    main()
