"""Memorized, spurious or generalized: what each sample is near to, with thresholds from images never seen."""

import math
from functools import partial

from torch import Tensor

from lightning_mem.evaluation.comparison import BANKS, Banks, Comparison
from lightning_mem.evaluation.copies import NO_HELDOUT, ending, unseen_distances
from lightning_mem.evaluation.numbers import WILSON, Number, absent
from lightning_mem.metrics import phase_shares, phase_threshold, wilson_interval
from lightning_mem.metrics.phases import PHASES

RATE = 0.01
"""Share of unseen real images that may lie as near; both thresholds are taken at it."""

FEWEST = math.ceil(1 / RATE) - 1
"""Held-out images from which on such a threshold can be told."""


def phases(c: Comparison) -> list[Number]:
    """``memorization/phase/memorized``, ``.../spurious`` (near other samples only) and ``.../generalized``."""
    numbers: list[Number] = []
    n, heldout = len(c.samples), len(c.banks.images("heldout"))
    scale = math.sqrt(c.samples.images[0].numel())
    for bank in BANKS:
        wanted = PHASES if bank == "members" else PHASES[:1]  # what is near no training image needs no control
        names = {phase: f"memorization/phase/{phase}{ending(bank)}" for phase in wanted}
        rule = {**c.describe(bank), "bank_size": len(c.banks.rows(bank)), "rate": RATE, "distance": "rms-l2"}
        if min(n, heldout) < FEWEST:
            why = f"thresholds at {RATE} need {FEWEST} held-out images and samples, got {heldout} and {n}"
            numbers += [absent(name, why if heldout else NO_HELDOUT, rule) for name in names.values()]
            continue
        crowd = min(n, heldout)  # the threshold and the samples must see equally many others
        members = c.banks.once("delta members", lambda: phase_threshold(unseen_distances(c.banks)[:, 0]))
        samples = c.banks.once(("delta samples", crowd), partial(_crowd_threshold, c.banks, crowd))
        shares = phase_shares(
            c.nearest(bank, 1, cut=True)[0][:, 0],
            to_others(c.banks, c.samples.images, crowd),
            delta_members=members,
            delta_samples=samples,
        )
        rule |= {"delta_members": members / scale, "delta_samples": samples / scale, "crowd": crowd}
        for phase, value in shares.items():
            if phase == "memorized":
                ends = wilson_interval(round(value * n), n)
                numbers.append(Number(names[phase], value, n, {**rule, "interval": WILSON}, ends))
            elif phase in names:
                numbers.append(Number(names[phase], value, n, rule))
    return numbers


def to_others(banks: Banks, images: Tensor, crowd: int) -> Tensor:
    """Plain L2 of each image to its nearest other among the first ``crowd`` of them."""
    distances, _ = banks.among(images, crowd, 2)
    nearest = distances[:, 0].clone()
    nearest[:crowd] = distances[:crowd, 1]  # itself comes first
    return nearest


def _crowd_threshold(banks: Banks, crowd: int) -> float:
    return phase_threshold(to_others(banks, banks.images("heldout")[:crowd], crowd))
