"""What is shown of attributions: planted truth in numbers, tables, and each query beside its first training images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attribution.asking import Scores
from lightning_mem.attribution.attributions_picture import draw_explained
from lightning_mem.attribution.base import Queries
from lightning_mem.attribution.costs import COSTS, cost_numbers, rounded, shortly
from lightning_mem.evaluation import Number, Reference, Scene
from lightning_mem.evaluation.numbers import absent, share
from lightning_mem.evaluation.table import LOOK, write_rows
from lightning_mem.records import Record, atomic_write

FIVE = 5
"""Places that ``source_first_five`` looks at."""


@dataclass(frozen=True)
class Explained:
    """Queries with all scores, and what they copy.

    Args:
        queries: What is explained.
        reference: The training images.
        scores: By method.
        about: What a definition says of a method.
        rms: RMS-L2 of every query to every training image, float64 [Q, N].
        groups: int64 [N]: images equal pixel for pixel share one.
        source: Place of the nearest training image, int64 [Q].
        copied: Whether the query copies it by the 1/3 rule, bool [Q].
        ratio: Distance to it over that to the second nearest, [Q].
        definition: Of the rule and the bank.
    """

    queries: Queries
    reference: Reference
    scores: Mapping[str, Scores]
    about: Mapping[str, Mapping[str, Any]]
    rms: Tensor
    groups: Tensor
    source: Tensor
    copied: Tensor
    ratio: Tensor
    definition: Mapping[str, Any]

    def source_ranks(self, name: str) -> Tensor:
        """Rank of what each query is nearest to by a method, int64 [Q], 1 = first; ties are put before it."""
        values = self.scores[name].values
        own = self.groups == self.groups[self.source][:, None]
        best = values.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        return ((values >= best) & ~own).sum(1) + 1

    def chance(self, places: int) -> float:
        """Share of the copies whose source stands among the first ``places`` of a random order."""
        total = len(self.groups)
        sizes = (self.groups == self.groups[self.source[self.copied]][:, None]).sum(1).tolist()
        missed = sum(math.comb(total - size, places) for size in sizes)
        return 1 - missed / (len(sizes) * math.comb(total, min(places, total)))

    def numbers(self) -> list[Number]:
        """Planted truth and costs of every method."""
        found = []
        copies = int(self.copied.sum())
        common = {"queries": self.queries.kind, "num_queries": len(self.queries), **self.definition}
        for name in self.scores:
            said = {**self.about[name], **common}
            if copies == 0:
                why = f"none of the {len(self.queries)} queries is a copy"
                found += [absent(f"{name}/{what}", why, said) for what in ("source_first", "source_first_five")]
            else:
                ranks = self.source_ranks(name)[self.copied]
                for what, places in (("source_first", 1), ("source_first_five", FIVE)):
                    hits = int((ranks <= places).sum())
                    found.append(share(f"{name}/{what}", hits, copies, {**said, "chance": self.chance(places)}))
                middle = float(ranks.double().quantile(0.5))
                found.append(Number(f"{name}/source_rank", middle, copies, {**said, "median": True}, None, "rank"))
            found += cost_numbers(name, self.scores[name].cost, said)
        return found


def write_explained(scene: Scene, found: Explained, top: int, pictures: int) -> None:
    """Tables, scores and picture."""
    ledger = {int(row["index"]): row for row in scene.ledger()}
    write_rows(scene.folder / "tables" / "attribution.csv", top_rows(found, ledger, top))
    write_rows(scene.folder / "tables" / "attribution_images.csv", image_rows(found, ledger))
    arrays = {name: own.values.float().numpy() for name, own in found.scores.items()}
    with atomic_write(scene.folder / "scores.npz", "wb") as file:
        np.savez(
            file, allow_pickle=False, addresses=found.queries.addresses.numpy(),
            indices=found.reference.indices.numpy(), **arrays,
        )  # fmt: skip
    if pictures:
        draw_explained(found, top, pictures, scene.folder / "images" / "attribution.png")


def top_rows(found: Explained, ledger: Mapping[int, Mapping[str, str]], top: int) -> Iterator[dict[str, Any]]:
    """The first training images of every query by every method, beside their rows of the ledger."""
    by_distance = found.rms.argsort(dim=1, stable=True).argsort(1) + 1
    for name, scores in found.scores.items():
        for query, order in enumerate(first_images(scores.values, top).tolist()):
            for rank, place in enumerate(order, start=1):
                index = int(found.reference.indices[place])
                known = ledger.get(index, {})
                yield {
                    "query": int(found.queries.addresses[query]),
                    "copy": int(found.copied[query]),
                    "method": name,
                    "rank": rank,
                    "index": index,
                    "score": f"{float(scores.values[query, place]):.6g}",
                    "rms_l2": f"{float(found.rms[query, place]):.6f}",
                    "rank_by_l2": int(by_distance[query, place]),
                    "copies": known.get("copies", 0),
                    "nearest": known.get("nearest", ""),
                    "file": found.reference.file_of(index),
                }


def image_rows(found: Explained, ledger: Mapping[int, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """One row a training image: how often each method puts it first, its mean score, and its row of the ledger."""
    firsts = {
        name: first_images(own.values, 1)[:, 0].bincount(minlength=len(found.groups)).tolist()
        for name, own in found.scores.items()
    }
    means = {name: own.values.mean(0).tolist() for name, own in found.scores.items()}
    for place, index in enumerate(found.reference.indices.tolist()):
        known = ledger.get(index, {})
        columns = {f"{name}_first": first[place] for name, first in firsts.items()}
        columns |= {f"{name}_mean": f"{mean[place]:.6g}" for name, mean in means.items()}
        yield {
            "index": index, **columns, "copies": known.get("copies", 0), "nearest": known.get("nearest", ""),
            "file": found.reference.file_of(index),
        }  # fmt: skip


def first_images(scores: Tensor, top: int) -> Tensor:
    """Places of the largest scores, int64 [Q, top]; of equal ones the lower place, fewer where there are fewer."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :top]


def explained_table(records: Sequence[Record]) -> Table:
    """One row a method: planted truth and costs."""
    first = next((record for record in records if record.name.endswith("/source_first")), None)
    caption = ""
    if first is not None:
        about = first.definition
        caption = (
            f"of {about['num_queries']} queries ({about['queries']}), {first.n} are copies by the rule of nearest "
        )
        caption += "neighbours; first, in five, rank: where their source stands by the method (median rank)"
        caption += f"; by chance {about['chance']:.3f} come first" if first.n else ""
    table = Table(title="attributions", title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        _, method, what = record.name.split("/", 2)
        rows.setdefault(method, {})[what] = record
    costs = [(kind, word, unit) for kind, word, unit in COSTS if any(kind in own for own in rows.values())]
    for heading in ("method", "first", "in five", "rank", *(word for _, word, _ in costs)):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for method, own in rows.items():
        shares = [shortly(own.get(what)) for what in ("source_first", "source_first_five")]
        table.add_row(method, *shares, rounded(own.get("source_rank")), *(rounded(own.get(k), u) for k, _, u in costs))
    return table
