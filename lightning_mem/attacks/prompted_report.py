"""What prompted extraction leaves behind: numbers, a row for every prompt, and pictures of what was found."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.evaluation import Number
from lightning_mem.evaluation.numbers import absent, share
from lightning_mem.evaluation.pictures import pixels, tile
from lightning_mem.records import atomic_write

FOUND = ("edges", "largest", "clique", "mean_distance", "exact", "seconds")
"""What a prompt's graph says: edges, size of the largest clique, size and tightness of the ranking one, whether the
search for cliques was complete, and what drawing and searching took."""


@dataclass
class Verdict:
    """What one prompt gave.

    Args:
        prompt: The prompt.
        kind: ``members``, or ``heldout`` for the control.
        flagged: Whether some clique is large enough.
        image: uint8 [C, H, W], the medoid of the clique, which is what is claimed; empty where not flagged.
        address: Of the medoid among the prompt's generations; of the first one where there is no clique.
        edges: Of the graph.
        largest: Vertices of the largest clique; 1 where there is none.
        clique: Vertices of the clique by which the prompt is ranked.
        mean_distance: Within that clique; null where there is none.
        exact: Whether the search for cliques was complete.
        seconds: Of drawing the generations and searching their graph.
        nearest: By bank: tiled distance to the nearest image, and its row; of flagged prompts that were verified.
    """

    prompt: str
    kind: str
    flagged: bool
    image: Tensor
    address: int
    edges: int
    largest: int
    clique: int
    mean_distance: float | None
    exact: bool
    seconds: float
    nearest: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[float, ...]:
        """Flagged ones first, the tightest clique first; the others by the size of their cliques."""
        tight = math.inf if self.mean_distance is None else self.mean_distance
        return (0, tight, -self.largest) if self.flagged else (1, -self.largest, tight)


def prompted_numbers(
    found: Sequence[Verdict], delta: float, settings: Mapping[str, Any], banks: Mapping[str, Tensor]
) -> list[Number]:
    """Shares of flagged prompts and of true ones among them, and how many different images came out."""
    numbers = []
    for kind, end in (("members", ""), ("heldout", "_heldout")):
        own = [verdict for verdict in found if verdict.kind == kind]
        about = {**settings, "prompts": kind}
        if not own:
            numbers.append(absent(f"flagged{end}", "there are no held-out prompts", about))
            continue
        numbers.append(share(f"flagged{end}", sum(v.flagged for v in own), len(own), about))
        sizes = torch.tensor([v.largest for v in own], dtype=torch.float64)
        numbers.append(Number(f"clique_size{end}", float(sizes.mean()), len(own), about, None, "samples"))
    flagged = [verdict for verdict in found if verdict.flagged]
    for bank, images in banks.items():
        end = "" if bank == "members" else "_heldout"
        about = {**settings, "bank": bank, "bank_size": len(images), "delta": delta, "distance": "tiled rms-l2"}
        if not flagged or len(images) == 0:
            why = "no prompt was flagged" if not flagged else "there are no held-out images"
            numbers += [absent(f"precision{end}", why, about), absent(f"images{end}", why, about, "images")]
            continue
        rows = [row for distance, row in (v.nearest[bank] for v in flagged) if distance <= delta]
        numbers.append(share(f"precision{end}", len(rows), len(flagged), about))
        numbers.append(Number(f"images{end}", float(len(set(rows))), len(flagged), about, None, "images"))
    return numbers


def write_prompts(file: Path, ranked: Sequence[Verdict], indices: Tensor | None) -> None:
    """One row a prompt, in order of rank.

    Args:
        file: ``.csv``.
        ranked: All prompts.
        indices: int64, place in the source of each row of the members' bank; null where they were not read.
    """
    with atomic_write(file) as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow([
            "rank", "prompt", "prompts", "flagged", "largest_clique", "clique", "mean_distance", "edges", "exact",
            "medoid", "nearest", "index", "nearest_heldout",
        ])  # fmt: skip
        for rank, own in enumerate(ranked, 1):
            near = {bank: f"{distance:.6g}" for bank, (distance, _) in own.nearest.items()}
            index = int(indices[own.nearest["members"][1]]) if indices is not None and "members" in near else ""
            tight = "" if own.mean_distance is None else f"{own.mean_distance:.6g}"
            writer.writerow([
                rank, own.prompt, own.kind, int(own.flagged), own.largest, own.clique, tight, own.edges,
                int(own.exact), own.address, near.get("members", ""), index, near.get("heldout", ""),
            ])  # fmt: skip


def draw_found(path: Path, shown: Sequence[Verdict], members: Tensor | None) -> None:
    """Write a PNG of medoid | nearest training image of flagged prompts, in order of rank; without these, the medoid.

    Args:
        path: ``.png``.
        shown: Flagged prompts.
        members: uint8 [M, C, H, W]; null where they were not read.
    """
    columns = min(6, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.2 * columns, 1.6 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, own in zip(panels, shown, strict=False):
        pair = [own.image] if members is None else [own.image, members[own.nearest["members"][1]]]
        axes.imshow(pixels(tile(torch.stack(pair), len(pair))), cmap="gray", vmin=0, vmax=255)
        near = f", {own.nearest['members'][0]:.3f}" if members is not None else ""
        axes.set_title(f"{own.prompt[:24]}\nclique {own.clique}{near}", fontsize=6, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
