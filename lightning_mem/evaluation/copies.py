"""Rules on copying, in pixels: every one beside its held-out control."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_mem.evaluation.comparison import BANKS, Bank, Banks, Comparison, Rules
from lightning_mem.evaluation.numbers import JACKKNIFE, WILSON, Number, absent, share
from lightning_mem.metrics import (
    duplicate_groups,
    eidetic_count,
    jackknife_interval,
    memorized,
    normalized_l2,
    wilson_interval,
)

NEIGHBORS = 50
"""Neighbours of the normalized L2 (Carlini et al.); fewer where a bank is smaller."""

FEWEST_IMAGES = 10
"""Distinct images from which on their number has an interval: below, the jackknife's normal theory fails."""

NO_PAIR = "the rule needs two different images in the bank"
NO_HELDOUT = "there are no held-out images"


def ending(bank: Bank) -> str:
    """What stands behind a key: nothing for members, ``_heldout`` for the control."""
    return "" if bank == "members" else "_heldout"


def ratio(c: Comparison) -> list[Number]:
    """``memorization/ratio``: share of samples less than a third as far from their nearest image as from the second."""
    numbers = []
    for bank in BANKS:
        name = f"memorization/ratio{ending(bank)}"
        rule = {**c.describe(bank), "threshold": c.rules.threshold, "distance": "l2 uint8"}
        if c.banks.distinct(bank) < 2:
            numbers.append(Number(name, None, 0, {**rule, "interval": WILSON}))
            continue
        hits = memorized(c.nearest(bank)[0], c.rules.threshold)
        numbers.append(share(name, int(hits.sum()), len(hits), rule))
    if len(c.banks.reference.heldout):
        numbers += c.banks.once(("ratio unseen", c.rules), lambda: _ratio_unseen(c.banks, c.rules))
    return numbers


def _ratio_unseen(banks: Banks, rules: Rules) -> list[Number]:
    """The rule with held-out images as queries: what it says where nothing can have been copied."""
    images = banks.reference.heldout
    hits = int(memorized(banks.search(images, "members", 2)[0], rules.threshold).sum())
    n, definition = len(images), _unseen(banks)
    rule = {**definition, "threshold": rules.threshold}
    return [Number("memorization/ratio_unseen", hits / n, n, rule, wilson_interval(hits, n))]


def _unseen(banks: Banks) -> dict[str, Any]:
    n = len(banks.reference.heldout)
    return {"queries": "heldout images", "num_samples": n, **banks.describe("members")}


def copied_images(c: Comparison) -> list[Number]:
    """``memorization/copied_images``: how many different training images the ratio rule finds copied."""
    numbers = []
    for bank in BANKS:
        name = f"memorization/copied_images{ending(bank)}"
        rule = {**c.describe(bank), "threshold": c.rules.threshold, "distance": "l2 uint8"}
        if c.banks.distinct(bank) < 2:
            numbers.append(absent(name, NO_PAIR, rule, "images"))
            continue
        distances, nearest = c.nearest(bank)
        hit = memorized(distances, c.rules.threshold)
        numbers.append(_distinct(name, c.banks.groups[bank][nearest[:, 0]], hit, c.banks.distinct(bank), rule))
    return numbers


def duplicates(c: Comparison) -> list[Number]:
    """``samples/duplicates``: share of samples that repeat another pixel for pixel; they count each time elsewhere."""
    groups = duplicate_groups(c.samples.images)
    repeated = len(groups) - len(groups.unique())
    return [Number("samples/duplicates", repeated / len(groups), len(groups), c.common)]


def _distinct(name: str, images: Tensor, hit: Tensor, available: int, definition: dict[str, Any]) -> Number:
    """How many different images the hits name, with a block jackknife over samples."""

    def count(rows: Tensor) -> float:
        return float(len(images[rows][hit[rows]].unique()))

    n, found = len(images), count(torch.arange(len(images)))
    interval = None
    if found >= FEWEST_IMAGES and n >= 20:
        low, high = jackknife_interval(count, n)
        if low < high:  # blocks that do not differ say nothing
            interval = (max(0.0, low), min(high, float(available)))
            definition = {**definition, "interval": JACKKNIFE}
    return Number(name, found, n, definition, interval, "images")


def normalized(c: Comparison) -> list[Number]:
    """``memorization/normalized_l2`` (Carlini's adaptive distance below 1) and ``memorization/nearest_mean``."""
    numbers = []
    for bank in BANKS:
        cut = {**c.describe(bank), "bank_size": len(c.banks.rows(bank))}
        if c.banks.distinct(bank) < 2:
            names = (("normalized_l2", "fraction"), ("nearest_mean", "rms-l2"))
            numbers += [absent(f"memorization/{name}{ending(bank)}", NO_PAIR, cut, unit) for name, unit in names]
            continue
        distances, _ = c.nearest(bank, NEIGHBORS, cut=True)
        n, k = distances.shape
        rule = {**cut, "cut": 1.0, "alpha": 0.5, "neighbors": k}
        close = int((normalized_l2(distances) < 1).sum())
        numbers.append(share(f"memorization/normalized_l2{ending(bank)}", close, n, rule))
        nearest = distances[:, 0].double() / math.sqrt(c.samples.images[0].numel())
        mean, error = nearest.mean().item(), nearest.std().item() / math.sqrt(n) if n > 1 else math.nan
        ends = (mean - 1.96 * error, mean + 1.96 * error) if n > 1 else None
        definition = {**cut, "interval": "normal 95%"}
        numbers.append(Number(f"memorization/nearest_mean{ending(bank)}", mean, n, definition, ends, "rms-l2"))
    if len(c.banks.reference.heldout):
        numbers += c.banks.once("normalized unseen", lambda: _normalized_unseen(c.banks))
    return numbers


def unseen_distances(banks: Banks) -> Tensor:
    """Plain L2 of held-out images to their nearest training images, in the members' bank cut to equal size."""

    def search() -> Tensor:
        return banks.search(banks.reference.heldout, "members", NEIGHBORS, banks.rows("members"))[0]

    return banks.once("unseen distances", search)


def _normalized_unseen(banks: Banks) -> list[Number]:
    distances = unseen_distances(banks)
    n, k = distances.shape
    close = int((normalized_l2(distances) < 1).sum())
    about = {**_unseen(banks), "bank_size": len(banks.rows("members")), "cut": 1.0, "alpha": 0.5, "neighbors": k}
    return [Number("memorization/normalized_l2_unseen", close / n, n, about, wilson_interval(close, n))]


def extracted(c: Comparison) -> list[Number]:
    """``memorization/extracted``: samples within delta of an image; ``extracted_images``: how many different ones.

    ``memorization/eidetic_k`` is the median, over those images, of how many training images lie within delta of one
    (itself included): 1 for a picture that stands alone, large where duplicates were learned.
    """
    numbers = []
    for bank in BANKS:
        rule = {**c.describe(bank), "bank_size": len(c.banks.rows(bank)), "delta": c.rules.delta, "distance": "rms-l2"}
        names = [f"memorization/{part}{ending(bank)}" for part in ("extracted", "extracted_images", "eidetic_k")]
        if c.banks.distinct(bank) == 0:
            units = ("fraction", "images", "images")
            numbers += [absent(name, NO_HELDOUT, rule, unit) for name, unit in zip(names, units, strict=True)]
            continue
        distances, nearest = c.nearest(bank, 1, cut=True)
        hit = distances[:, 0].double() / math.sqrt(c.samples.images[0].numel()) <= c.rules.delta
        numbers.append(share(names[0], int(hit.sum()), len(hit), rule))
        groups = c.banks.groups[bank][nearest[:, 0]]
        numbers.append(_distinct(names[1], groups, hit, c.banks.distinct(bank), rule))
        found = groups[hit].unique()
        if len(found) == 0:
            numbers.append(absent(names[2], "no image was extracted", rule, "images"))
            continue
        images = c.banks.images(bank)
        counts = torch.as_tensor(eidetic_count(images[found], images[c.banks.rows(bank)], c.rules.delta))
        numbers.append(Number(names[2], float(counts.double().quantile(0.5)), len(found), rule, None, "images"))
    if len(c.banks.reference.heldout):
        numbers += c.banks.once(("extracted unseen", c.rules), lambda: _extracted_unseen(c.banks, c.rules))
    return numbers


def _extracted_unseen(banks: Banks, rules: Rules) -> list[Number]:
    images, rows = banks.reference.heldout, banks.rows("members")
    nearest = unseen_distances(banks)[:, 0].double() / math.sqrt(images[0].numel())
    about = {**_unseen(banks), "bank_size": len(rows), "delta": rules.delta, "distance": "rms-l2"}
    return [share("memorization/extracted_unseen", int((nearest <= rules.delta).sum()), len(images), about)]
