"""Tests for copying that read real unseen images too: authenticity, and the data-copying statistic C_T."""

from functools import partial
from typing import Any

from torch import Tensor

from lightning_mem.evaluation.comparison import Bank, Banks, Comparison
from lightning_mem.evaluation.copies import NO_HELDOUT, NO_PAIR
from lightning_mem.evaluation.numbers import Number, absent, share
from lightning_mem.evaluation.quality import SIDES, space_of
from lightning_mem.metrics import (
    AbstractExtractor,
    authentic,
    data_copying,
    nearest_neighbors,
    own_nearest_distances,
)

PER_CELL, MOST_CELLS = 100, 10
"""Images of each kind for every cell of C_T, and the most cells."""

FEWEST = 20
"""Samples, held-out images and training images from which on C_T is given."""


def authenticity(c: Comparison) -> list[Number]:
    """``authenticity/<extractor>/train``: share of samples farther from their nearest image than it is from its own.

    ``.../heldout`` is the control, ``.../unseen`` what real images score that were never trained on.
    """
    numbers = []
    for extractor in c.banks.extractors:
        for bank, side in SIDES:
            name = f"authenticity/{extractor.name}/{side}"
            about = {**c.describe(bank), **space_of(extractor), "bank_size": len(c.banks.rows(bank))}
            if c.banks.distinct(bank) < 2:
                numbers.append(absent(name, NO_PAIR, about))
                continue
            samples = c.samples.images if extractor.name == "pixels" else c.features(extractor)
            hits = _authentic(c.banks, samples, bank, extractor)
            numbers.append(share(name, hits, len(c.samples), about))
        if len(c.banks.images("heldout")):
            numbers.append(c.banks.once(("authentic unseen", extractor.name), partial(_unseen, c.banks, extractor)))
    return numbers


def _space(banks: Banks, bank: Bank, extractor: AbstractExtractor) -> Tensor:
    return banks.images(bank) if extractor.name == "pixels" else banks.features(bank, extractor)


def _authentic(banks: Banks, samples: Tensor, bank: Bank, extractor: AbstractExtractor) -> int:
    """How many are authentic, in the bank cut to equal size."""
    rows, device = banks.rows(bank), banks.workers.device
    groups = banks.groups[bank][rows].to(device)
    real = _space(banks, bank, extractor)[rows].to(device)
    own = banks.once(("own nearest", bank, extractor.name), partial(own_nearest_distances, real, groups=groups))
    distances, indices = nearest_neighbors(samples.to(device), real, 1, groups=groups)
    return int(authentic(distances[:, 0], indices[:, 0], own).sum())


def _unseen(banks: Banks, extractor: AbstractExtractor) -> Number:
    queries = _space(banks, "heldout", extractor)
    hits = _authentic(banks, queries, "members", extractor)
    about = {**banks.describe("members"), **space_of(extractor), "bank_size": len(banks.rows("members"))}
    return share(f"authenticity/{extractor.name}/unseen", hits, len(queries), {**about, "queries": "heldout images"})


def copying(c: Comparison) -> list[Number]:
    """``data_copying/<extractor>``: C_T, a z score; far below 0 samples lie nearer to members than unseen images do."""
    numbers = []
    members, heldout = c.banks.rows("members"), c.banks.images("heldout")
    fewest = min(len(members), len(heldout), len(c.samples))
    for extractor in c.banks.extractors:
        cells = max(1, min(MOST_CELLS, fewest // PER_CELL))
        about: dict[str, Any] = {
            **c.describe("members"), **space_of(extractor), "bank_size": len(members), "cells": cells,
            "heldout_size": len(heldout),
        }  # fmt: skip
        name = f"data_copying/{extractor.name}"
        if fewest < FEWEST:
            why = f"needs {FEWEST} samples, training and held-out images, got {fewest}" if len(heldout) else NO_HELDOUT
            numbers.append(absent(name, why, about, "z score"))
            continue
        sides = [c.samples.images, *(_space(c.banks, bank, extractor) for bank, _ in SIDES)]
        if extractor.name != "pixels":
            sides[0] = c.features(extractor)
        device = c.banks.workers.device
        real = sides[1][members]
        found = data_copying(sides[0].to(device), real.to(device), sides[2].to(device), cells=cells, fewest=FEWEST)
        about |= {"deviation": round(found.deviation, 6), "left_out": round(found.left_out, 6)}
        numbers.append(Number(name, found.value, len(c.samples), about, None, "z score"))
    return numbers
