"""What generate-and-filter counts: how near every generation is to both banks, and which training images it names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mem.evaluation import Banks, Number
from lightning_mem.evaluation.comparison import BANKS
from lightning_mem.evaluation.copies import FEWEST_IMAGES, NO_HELDOUT
from lightning_mem.evaluation.numbers import JACKKNIFE, absent, share
from lightning_mem.metrics import eidetic_count, jackknife_interval, normalized_l2
from lightning_mem.records import atomic_write
from lightning_mem.types import SampleSet

Rule = Literal["normalized_l2", "rms_l2"]
"""What is cut: Carlini's adaptive distance, or the plain distance on [0, 1]."""


@dataclass
class Nearness:
    """How near generations are to the training images, and to held-out images; never the generations themselves.

    Args:
        addresses: int64 [N].
        nearest: int64 [N, 2], rows of the nearest and the second nearest training image.
        normalized_l2: float64 [N], in the whole bank of members.
        rms_l2: float64 [N] to the nearest, likewise.
        equal: float64 [N, 2 banks, 2 rules] with both banks cut to the smaller one's size: members, held-out;
            normalized_l2, rms_l2. Infinite without held-out images.
        seconds: float64 [N] of drawing and searching, its part's evenly; NaN where it was not timed.
    """

    addresses: Tensor
    nearest: Tensor
    normalized_l2: Tensor
    rms_l2: Tensor
    equal: Tensor
    seconds: Tensor

    def __len__(self) -> int:
        return len(self.addresses)

    def score(self, rule: Rule) -> Tensor:
        """In the whole bank of members; small is near."""
        return self.normalized_l2 if rule == "normalized_l2" else self.rms_l2

    @classmethod
    def of(cls, samples: SampleSet, banks: Banks, neighbors: int, alpha: float) -> "Nearness":
        """Search one part of the generations; not timed."""
        root = math.sqrt(samples.images[0].numel())
        distances, nearest = banks.search(samples.images, "members", neighbors)
        score, rms = normalized_l2(distances, alpha), distances[:, 0].double() / root
        equal = torch.full((len(samples), 2, 2), torch.inf, dtype=torch.float64)
        if banks.distinct("heldout") > 1:
            for place, bank in enumerate(BANKS):
                rows = banks.rows(bank)
                found = distances
                if bank == "heldout" or len(rows) < len(banks.images(bank)):
                    found, _ = banks.search(samples.images, bank, neighbors, rows)
                equal[:, place, 0], equal[:, place, 1] = normalized_l2(found, alpha), found[:, 0].double() / root
        return cls(samples.addresses, nearest[:, :2], score, rms, equal, torch.full_like(score, torch.nan))

    @classmethod
    def join(cls, parts: Sequence["Nearness"]) -> "Nearness":
        """All parts as one, in order."""
        return cls(*(torch.cat([getattr(part, own.name) for part in parts]) for own in fields(cls)))

    def save(self, file: Path) -> None:
        """Write ``.npz``, in one move."""
        with atomic_write(file, "wb") as opened:
            np.savez(opened, allow_pickle=False, **{own.name: getattr(self, own.name).numpy() for own in fields(self)})

    @classmethod
    def load(cls, file: Path) -> "Nearness":
        """Read what :meth:`save` wrote."""
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return cls(*(torch.from_numpy(arrays[own.name]) for own in fields(cls)))


@dataclass(frozen=True)
class Extracted:
    """The training images that generations name under one rule.

    Args:
        rule: What was cut.
        cut: Where.
        hit: bool [N], generations below (``rms_l2``: at most) the cut.
        group: int64 [N], the duplicate group of each generation's nearest training image.
    """

    rule: Rule
    cut: float
    hit: Tensor
    group: Tensor

    @classmethod
    def under(cls, near: Nearness, banks: Banks, rule: Rule, cut: float) -> "Extracted":
        """Cut the scores."""
        return cls(rule, cut, _below(near.score(rule), rule, cut), banks.groups["members"][near.nearest[:, 0]])

    @property
    def images(self) -> Tensor:
        """Groups that were extracted, ascending; two generations of one image count once."""
        return self.group[self.hit].unique()


def _below(score: Tensor, rule: Rule, cut: float) -> Tensor:
    return score < cut if rule == "normalized_l2" else score <= cut


def repeats_of(banks: Banks) -> Tensor:
    """How often each duplicate group was trained on in a pass, int64 [M] by group number; 0 where there is none.

    A picture and its mirror image, where training flips, are one image.
    """
    groups = banks.groups["members"]
    pairs = torch.stack([groups, banks.reference.owners], 1).unique(dim=0)
    return torch.zeros(len(groups), dtype=torch.int64).index_add_(0, pairs[:, 0], _times(banks)[pairs[:, 1]])


def _times(banks: Banks) -> Tensor:
    """How often each training image stands in a pass, int64 by owner."""
    found = banks.reference.repeats
    return torch.ones(int(banks.reference.owners.max()) + 1, dtype=torch.int64) if found is None else found


def near_copies(groups: Tensor, banks: Banks, delta: float) -> Tensor:
    """k of each image: training images within delta, itself (and mirror images, where training flips) included.

    One that stands several times in a pass counts as often.
    """
    if len(groups) == 0:
        return torch.zeros(0, dtype=torch.int64)
    members = banks.images("members").to(banks.workers.device)
    times = _times(banks)[banks.reference.owners].to(members.device)
    trained = members.repeat_interleave(times, 0) if (times > 1).any() else members
    return torch.as_tensor(eidetic_count(members[groups], trained, delta)).cpu()


def numbers_under(near: Nearness, banks: Banks, rule: Rule, cut: float, about: dict[str, Any]) -> list[Number]:
    """Share of generations, distinct images, the control on banks of one size, precision, and shares by repeats."""
    own = Extracted.under(near, banks, rule, cut)
    n = len(near)
    definition = {**about, **banks.describe("members"), "rule": rule, "cut": cut}
    numbers = [share("generations", int(own.hit.sum()), n, definition)]

    def distinct(rows: Tensor) -> float:
        return float(len(own.group[rows][own.hit[rows]].unique()))

    count = distinct(torch.arange(n))
    ends = _jackknife(distinct, n, count)
    numbers.append(Number("images", count, n, {**definition, "interval": JACKKNIFE}, ends, "images"))
    numbers += _precision(near, banks, rule, cut, definition)
    repeats, groups = repeats_of(banks), banks.groups["members"].unique()
    if len(repeats[groups].unique()) > 1:  # where some are repeated
        done = torch.zeros(len(repeats), dtype=torch.bool).index_fill_(0, own.images, True)
        for times in repeats[groups].unique().tolist():
            those = groups[repeats[groups] == times]
            by = {**definition, "repeats": times}
            numbers.append(share("images_by_repeats", int(done[those].sum()), len(those), by))
    return numbers


def _jackknife(count: Any, n: int, found: float) -> tuple[float, float] | None:
    if found < FEWEST_IMAGES or n < 20:
        return None
    low, high = jackknife_interval(count, n)
    return (max(0.0, low), high) if low < high else None


def _precision(near: Nearness, banks: Banks, rule: Rule, cut: float, definition: dict[str, Any]) -> list[Number]:
    r"""The rule on banks of one size, and its precision :math:`\max(0, 1 - h / m)` of m hits and h in the control."""
    if banks.distinct("heldout") < 2:
        return [absent(name, NO_HELDOUT, definition) for name in ("generations_equal", "precision")]
    hits = _below(near.equal[:, :, int(rule == "rms_l2")], rule, cut)
    rows = {bank: len(banks.rows(bank)) for bank in BANKS}
    own = {**definition, "bank_size": rows["members"]}
    numbers = [
        share("generations_equal", int(hits[:, 0].sum()), len(hits), own),
        share("generations_equal_heldout", int(hits[:, 1].sum()), len(hits), {**own, "bank": "heldout"}),
    ]
    if not hits[:, 0].any():
        return [*numbers, absent("precision", "no generation was within the cut", own)]

    def precision(rows: Tensor) -> float:
        found, control = hits[rows].sum(0).tolist()
        return max(0.0, 1 - control / max(found, 1))

    ends = None
    if int(hits[:, 0].sum()) >= FEWEST_IMAGES and len(hits) >= 20:
        low, high = jackknife_interval(precision, len(hits))
        ends = (max(0.0, low), min(1.0, high)) if low < high else None
    value = precision(torch.arange(len(hits)))
    return [*numbers, Number("precision", value, int(hits[:, 0].sum()), {**own, "interval": JACKKNIFE}, ends)]


def eidetic_numbers(
    near: Nearness, banks: Banks, delta: float, limits: Sequence[int], about: dict[str, Any]
) -> list[Number]:
    """Images with a generation within delta that at most k training images resemble that much, for several k."""
    found = Extracted.under(near, banks, "rms_l2", delta).images
    counts = near_copies(found, banks, delta)
    definition = {**about, **banks.describe("members"), "rule": "rms_l2", "cut": delta}
    return [
        Number("eidetic_images", float((counts <= k).sum()), len(near), {**definition, "k": k}, None, "images")
        for k in limits
    ]
