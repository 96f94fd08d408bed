"""SIDE's scores on one set of samples: AMS and UMS per band, beside their held-out control."""

import math
from typing import Any

import torch

from lightning_mem.evaluation.comparison import BANKS, Comparison
from lightning_mem.evaluation.copies import NEIGHBORS, NO_HELDOUT, ending
from lightning_mem.evaluation.numbers import JACKKNIFE, WILSON, Number, absent
from lightning_mem.evaluation.workers import Workers
from lightning_mem.metrics import SSCD_BANDS, MemorizationScores
from lightning_mem.metrics.similarities import Measure

PIXEL_BANDS: dict[str, tuple[float, float]] = {"low": (1.4, 1.6), "mid": (1.0, 1.4), "high": (0.0, 1.0)}
"""Bands of Carlini's adaptive distance in pixels: the cuts 1.0, 1.4 and 1.6 are those in use; ``high`` is nearest."""

SPACES: dict[str, tuple[Measure, dict[str, tuple[float, float]]]] = {
    "sscd": ("cosine", SSCD_BANDS),
    "pixels": ("normalized_l2", PIXEL_BANDS),
}
"""Where bands are known: cosines of SSCD, and Carlini's adaptive distance in pixels."""


def scores(c: Comparison) -> list[Number]:
    """``memorization/ams/<extractor>/<band>`` and ``memorization/ums/...``: share of samples, images per sample."""
    numbers: list[Number] = []
    for extractor in c.banks.extractors:
        if extractor.name not in SPACES:
            continue
        measure, bands = SPACES[extractor.name]
        for bank in BANKS:
            rows = c.banks.rows(bank)
            about: dict[str, Any] = {
                **c.describe(bank), "bank_size": len(rows), "extractor": extractor.name,
                "extractor_digest": extractor.digest, "distance": measure, "pairs": "any",
            }  # fmt: skip
            if measure == "normalized_l2":
                about |= {"alpha": 0.5, "neighbors": min(NEIGHBORS, len(rows))}
            if c.banks.distinct(bank) < 2:
                numbers += [
                    absent(f"memorization/{kind}/{extractor.name}/{band}{ending(bank)}", NO_HELDOUT, about)
                    for kind in ("ams", "ums")
                    for band in bands
                ]
                continue
            images = c.banks.images(bank)
            space = images[rows] if extractor.name == "pixels" else c.banks.features(bank, extractor)[rows]
            metric = MemorizationScores(
                space.to(c.banks.workers.device), bands, measure=measure, groups=c.banks.groups[bank][rows], k=NEIGHBORS
            )
            samples = c.samples.images if extractor.name == "pixels" else c.features(extractor)
            _update(metric, samples, c.banks.workers)
            values, intervals = metric.compute(), metric.intervals()
            for kind, key in (("ams", "average"), ("ums", "unique")):
                for band, (low, high) in bands.items():
                    found = intervals[f"{key}/{band}"]
                    how = WILSON if kind == "ams" else JACKKNIFE
                    definition = {**about, "band_low": low, "band_high": high if math.isfinite(high) else None}
                    definition |= {"interval": how} if found is not None else {}
                    name = f"memorization/{kind}/{extractor.name}/{band}{ending(bank)}"
                    unit = "fraction" if kind == "ams" else "images per sample"
                    value = float(values[f"{key}/{band}"])
                    numbers.append(Number(name, value, len(c.samples), definition, found, unit))
    return numbers


def _update(metric: MemorizationScores, samples: torch.Tensor, workers: Workers) -> None:
    """Each process takes in its samples; then all hold the states of all."""
    metric.distributed_available_fn = lambda: False  # the workers gather, once, whoever they are
    metric.to(workers.device)
    places = torch.arange(len(samples))
    if workers.world_size == 1 or len(samples) < workers.world_size:
        metric.update(samples.to(workers.device), places)
        return
    own = places[workers.rank :: workers.world_size]
    metric.update(samples[own].to(workers.device), own)
    reductions: dict[str, Any] = metric._reductions
    for name, reduction in reductions.items():
        setattr(metric, name, reduction(workers.gather(getattr(metric, name))))
