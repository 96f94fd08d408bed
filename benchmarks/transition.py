"""Does the same recipe copy 64 digits and not 1,024? The field's transition, with intervals, from ordinary run folders.

Trains what is missing (about three minutes a run on two cores; killed and started again it does what is left), then
writes the curves' records, one pooled record per claim, and the picture of the README.

    python benchmarks/transition.py
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_mem.evaluation.curves import curve, draw_curves, onset
from lightning_mem.records import Record, read_records, write_records

CONFIG = "configs/digits/denoiser.yaml"
KEPT = ("memorization/ratio", "memorization/ratio_heldout", "frechet/pixels/heldout", "frechet/pixels/train",
        "memorization/normalized_l2_unseen", "memorization/ratio_unseen")  # fmt: skip


def train(folder: Path, members: int, seed: int) -> list[Record]:
    """Records of one run; trains it, or the rest of it, if it is not finished."""
    if not (folder / "summary.json").exists():
        options = ["--trainer.default_root_dir", str(folder), "--data.num_members", str(members)]
        options += ["--seed_everything", str(seed)]
        if (folder / "checkpoints" / "last.ckpt").exists():
            options += ["--ckpt_path", "last"]
        subprocess.run([sys.executable, "-m", "lightning_mem", "fit", "--config", CONFIG, *options], check=True)
    return read_records(folder / "results.jsonl")


def pooled(runs: Sequence[list[Record]], name: str, members: int) -> Record:
    """The last value over all seeds: mean, and the envelope of the seeds' own intervals."""
    last = [curve(records, name)[-1] for records in runs]
    low, high = min(r.low or 0.0 for r in last), max(r.high or 0.0 for r in last)
    definition = {**last[0].definition, "num_members": members, "seeds": len(last)}
    definition["interval"] = f"envelope of {len(last)} seeds' wilson 95%"
    return replace(
        last[0],
        value=sum(r.value or 0.0 for r in last) / len(last),
        low=low,
        high=high,
        n=sum(r.n for r in last),
        definition=definition,
        run="pooled",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the 64-image runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/transition"), help="where the run folders are")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transition.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/transition.png"))
    given = parser.parse_args()
    small = [train(given.runs / f"members64_seed{seed}", 64, seed) for seed in given.seeds]
    large = train(given.runs / "members1024_seed0", 1024, 0)
    records = []
    for members, runs in ((64, small), (1024, [large])):
        records += [pooled(runs, name, members) for name in ("memorization/ratio", "memorization/ratio_heldout")]
        for seed, run in enumerate(runs):
            # equal keys of several runs are told apart by what they were trained on
            about = {"num_members": members, "seed_everything": given.seeds[seed] if members == 64 else 0}
            records += [replace(r, definition={**r.definition, **about}) for r in run if r.name in KEPT]
    write_records(given.out, records)
    draw_curves({"64 images": small[0], "1,024 images": large}, given.picture, "the same UNet, steps and batch size")
    for members, runs in ((64, small), (1024, [large])):
        for name in ("memorization/ratio", "memorization/ratio_heldout"):
            r = pooled(runs, name, members)
            print(f"{members:5} images  {name:28} {r.value:.3f}  [{r.low:.3f}, {r.high:.3f}]  n = {r.n}")
        print(f"{members:5} images  onset at steps {[onset(run) for run in runs]}")


if __name__ == "__main__":
    main()
