"""How near the distribution of samples is to that of real images, in each feature space."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from lightning_mem.evaluation.comparison import Bank, Comparison
from lightning_mem.evaluation.numbers import JACKKNIFE, WILSON, Number, absent
from lightning_mem.metrics import (
    AbstractExtractor,
    FeatureStatistics,
    frechet_distance_from_features,
    frechet_infinity,
    frechet_infinity_interval,
    jackknife_interval,
    kernel_distance,
    manifold_overlap,
    memorization_informed_frechet_distance,
    neighborhood_radii,
)

INTERVAL_DIM = 512
"""Fréchet intervals (20 solves each) are given up to this feature size; above it they would outlast the sampling."""

PARTS = 5
"""Most parts that the extrapolation to infinitely many samples deals them into."""

INFINITY_DIM, INFINITY_BLOCKS = 64, 10
"""Its intervals (15 solves a block) are given up to this feature size, with so many blocks."""

MANIFOLD_NEIGHBORS = 5
"""k of precision, recall, density and coverage."""

SIDES: tuple[tuple[Bank, str], ...] = (("members", "train"), ("heldout", "heldout"))
"""Each bank and what a key calls it."""


def space_of(extractor: AbstractExtractor) -> dict[str, Any]:
    """What a definition says about a feature space."""
    return {"extractor": extractor.name, "extractor_digest": extractor.digest, "resize": extractor.resize}


def is_inception(extractor: AbstractExtractor) -> bool:
    """Whether these are the 2048 features of the original Inception: only there a distance is called FID or KID."""
    return extractor.name == "inception" and bool(getattr(extractor, "official", False))


def frechet(c: Comparison) -> list[Number]:
    """``frechet/<extractor>/train`` and ``.../heldout``, and ``.../floor``: what fresh real images score."""
    return [number for extractor in c.banks.extractors for number in _frechet(c, extractor)]


def _frechet(c: Comparison, extractor: AbstractExtractor) -> Iterator[Number]:
    features, unit = c.features(extractor), "squared distance"
    n = len(features)
    for bank, side in SIDES:
        size = len(c.banks.images(bank))
        name = f"frechet/{extractor.name}/{side}"
        definition = {**c.common, **space_of(extractor), "bank": bank, "bank_size": size}
        if size < 2 or n < 2:
            yield Number(name, None, 0, definition, None, unit)
            continue
        real = c.banks.features(bank, extractor)
        value, interval = frechet_distance_from_features(features, real), None
        if features.shape[1] <= INTERVAL_DIM and n >= 40:
            interval = jackknife_interval(partial(_frechet_of_rows, features=features, real=real), n)
            definition["interval"] = JACKKNIFE
        yield Number(name, value, n, definition, interval, unit)
        if is_inception(extractor):
            yield Number(f"fid/{side}", value, n, definition, interval, unit)
    if len(c.banks.images("heldout")) >= 4:
        yield c.banks.once(("floor", extractor.name), lambda: _floor(c, extractor))


def _frechet_of_rows(rows: Tensor, features: Tensor, real: Tensor) -> float:
    return frechet_distance_from_features(features[rows], real)


def _floor(c: Comparison, extractor: AbstractExtractor) -> Number:
    """One half of the held-out images against the other."""
    real = c.banks.features("heldout", extractor)
    half = len(real) // 2
    value = frechet_distance_from_features(real[:half], real[half:])
    definition = {
        **space_of(extractor), "bank": "heldout", "bank_size": len(real) - half, "queries": "heldout images",
    }  # fmt: skip
    return Number(f"frechet/{extractor.name}/floor", value, half, definition, None, "squared distance")


def prdc(c: Comparison) -> list[Number]:
    """``precision``, ``recall``, ``density`` and ``coverage``, each ``/<extractor>/train`` and ``.../heldout``."""
    return [number for extractor in c.banks.extractors for number in _prdc(c, extractor)]


def _prdc(c: Comparison, extractor: AbstractExtractor) -> Iterator[Number]:
    k, n, names = MANIFOLD_NEIGHBORS, len(c.samples), ("precision", "recall", "density", "coverage")
    for bank, side in SIDES:
        rows = c.banks.rows(bank, n)
        definition = {**c.common, **space_of(extractor), "bank": bank, "bank_size": len(rows), "neighbors": k}
        if min(len(rows), n) <= k:
            why = f"needs more than {k} samples and images, got {n} and {len(rows)}"
            yield from (absent(f"{name}/{extractor.name}/{side}", why, definition) for name in names)
            continue
        real = c.banks.features(bank, extractor)[rows]
        radii = c.banks.once(("radii", bank, extractor.name, n), partial(neighborhood_radii, real, k))
        overlap = manifold_overlap(c.features(extractor), real, k, radii=radii)
        intervals = overlap.intervals()
        for name, value in overlap.values().items():
            ends = intervals[name]
            ends = None if ends is None or ends[0] == ends[1] else ends  # blocks that do not differ say nothing
            how = {} if ends is None else {"interval": WILSON if name == "precision" else JACKKNIFE}
            yield Number(f"{name}/{extractor.name}/{side}", value, n, {**definition, **how}, ends)


def infinite(c: Comparison) -> list[Number]:
    """``frechet_infinity/<extractor>/train`` and ``.../heldout``: the Fréchet distance at infinitely many samples."""
    numbers, unit = [], "squared distance"
    for extractor in c.banks.extractors:
        features = c.features(extractor)
        n, dim = features.shape
        for bank, side in SIDES:
            real = c.banks.features(bank, extractor) if len(c.banks.images(bank)) else features[:0]
            name = f"frechet_infinity/{extractor.name}/{side}"
            definition = {**c.common, **space_of(extractor), "bank": bank, "bank_size": len(real), "parts": PARTS}
            # training images are all there are; held-out ones stand for what is not there
            least = PARTS * (dim + 1)
            if min(n, n if bank == "members" else len(real)) < least or len(real) < 2:
                why = f"needs {least} samples and held-out images for {dim} features, got {n} and {len(real)}"
                numbers.append(absent(name, why, definition, unit))
                continue
            reference = FeatureStatistics.from_features(real) if bank == "members" else real
            ends, how = None, {}
            if dim <= INFINITY_DIM:
                ends = frechet_infinity_interval(features, reference, parts=PARTS, blocks=INFINITY_BLOCKS)
                how = {"interval": JACKKNIFE, "blocks": INFINITY_BLOCKS}
            value = frechet_infinity(features, reference, parts=PARTS)
            numbers.append(Number(name, value, n, {**definition, **how}, ends, unit))
    return numbers


def kernel(c: Comparison) -> list[Number]:
    """``kernel/<extractor>/train`` and ``.../heldout``, squared MMD; ``kid/...`` only with Inception's own weights."""
    numbers = []
    for extractor in c.banks.extractors:
        for bank, side in SIDES:
            rows = c.banks.rows(bank)
            definition = {**c.common, **space_of(extractor), "bank": bank, "bank_size": len(rows)}
            names = [f"kernel/{extractor.name}/{side}"]
            names += [f"kid/{side}"] if is_inception(extractor) else []
            n = len(c.samples)
            if min(n, len(rows)) < 2:
                why = f"needs 2 images, got {len(rows)}"
                numbers += [absent(name, why, definition, "squared mmd") for name in names]
                continue
            value = kernel_distance(c.features(extractor), c.banks.features(bank, extractor)[rows])
            numbers += [Number(name, value, n, definition, None, "squared mmd") for name in names]
    return numbers


def mifid(c: Comparison) -> list[Number]:
    """``mifid/<extractor>/train`` and ``.../heldout``: Fréchet distance over how near samples are to the members."""
    numbers, unit = [], "squared distance"
    for extractor in c.banks.extractors:
        if not extractor.name.startswith("inception"):  # its cut was chosen for that space
            continue
        for bank, side in SIDES:
            name, size = f"mifid/{extractor.name}/{side}", len(c.banks.images(bank))
            definition = {**c.common, **space_of(extractor), "bank": bank, "bank_size": size, "eps": 0.1}
            if min(size, len(c.samples)) < 2:
                numbers.append(absent(name, f"needs 2 images, got {size}", definition, unit))
                continue
            value = memorization_informed_frechet_distance(
                c.features(extractor),
                c.banks.features(bank, extractor),
                training=c.banks.features("members", extractor),
            )
            if math.isinf(value):
                numbers.append(absent(name, "infinite: every sample is an exact copy", definition, unit))
                continue
            numbers.append(Number(name, value, len(c.samples), definition, None, unit))
    return numbers
