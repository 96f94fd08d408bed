"""What does a label tell a model that memorizes its images, and when does a random one stop telling it?

SIDE's theory (arXiv:2410.02467 v7, theorem 1) says that a model conditioned on an informative label memorizes at least
as much as one without. ``label_divergence`` is that difference at equal eps for models in closed form: kernel densities
of 128 digits and of each label's digits. Below 0: conditioning brings the model closer to its images. True labels,
random ones with as many classes, a label per image, and one label for all (which must give exactly 0), over eps.

    OMP_NUM_THREADS=1 python benchmarks/divergence.py

A quarter of a minute; writes benchmarks/results/divergence.jsonl and docs/side_divergence.png.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.data import MemorizationDataModule
from lightning_mem.metrics import label_divergence
from lightning_mem.records import Record, machine, write_records

ROOT = Path(__file__).resolve().parent.parent
RULES = {"true": "true", "random": "random (10)", "unique": "one per image", "constant": "one for all"}


def labelled(rule: str, num_members: int, seed: int) -> tuple[Tensor, Tensor]:
    """The members of a digits run under a label rule, and their labels."""
    drawn = "random" if rule == "constant" else rule
    classes = {"random": 10, "constant": 1}.get(rule)
    data = MemorizationDataModule(num_members=num_members, num_heldout=0, labels=drawn, num_classes=classes, seed=seed)  # type: ignore[arg-type]
    data.setup()
    if data.members.labels is None:
        raise SystemExit(f"the rule {rule} gave no labels")
    return data.members.images, data.members.labels


def main(given: list[str] | None = None) -> list[Record]:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_members", type=int, default=128)
    parser.add_argument("--eps", type=float, nargs="*", default=[0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "divergence.jsonl"))
    parser.add_argument("--picture", default=str(ROOT / "docs" / "side_divergence.png"))
    args = parser.parse_args(given)
    records, figure = [], Figure(figsize=(6.4, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for rule, words in RULES.items():
        images, labels = labelled(rule, args.num_members, args.seed)
        shares = labels.bincount().double() / len(labels)
        entropy = float(torch.special.entr(shares).sum())
        found = [label_divergence(images, labels, eps, seed=args.seed) for eps in args.eps]
        if rule == "constant" and any(part.value != 0 for part in found):
            raise SystemExit("one label for all must tell nothing: nothing is recorded")
        (line,) = axes.plot(args.eps, [part.value for part in found], "o-", ms=3, label=words)
        axes.fill_between(args.eps, [part.low for part in found], [part.high for part in found],
                          color=line.get_color(), alpha=0.2, lw=0)  # fmt: skip
        axes.axhline(-entropy, color=line.get_color(), lw=0.7, ls=":")
        for eps, part in zip(args.eps, found, strict=True):
            about = {"labels": rule, "eps": eps, "bank_size": len(images), "model": "kernel density, sigma = eps",
                     "scale": "[-1, 1]", "interval": "t over draws, stratified by image, 95%",
                     "device": machine()}  # fmt: skip
            records.append(Record("attack/side/divergence_difference", part.value, part.n, 0, low=part.low,
                                  high=part.high, seed=args.seed, unit="nats", definition=about))  # fmt: skip
        numbers = [f"{eps}: {p.value:.3f} [{p.low:.3f}, {p.high:.3f}]" for eps, p in zip(args.eps, found, strict=True)]
        print(f"{words:14} entropy {entropy:.3f}  {'  '.join(numbers)}")
    axes.set(xscale="log", xlabel="eps (in [-1, 1])", ylabel="conditional - unconditional divergence (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(0.02, 0.35), fontsize=8, frameon=False, title_fontsize=8,
                title="labels (dotted: minus their entropy)")  # fmt: skip
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture)
    write_records(args.out, records)
    return records


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
