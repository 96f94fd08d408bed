"""Metrics: neighbours, memorization, Fréchet distance, intervals; a pure function first, its metric second."""

from lightning_mem.metrics.features import (
    AbstractExtractor,
    InceptionExtractor,
    PixelsExtractor,
    TimmExtractor,
    build_extractor,
    extract_features,
)
from lightning_mem.metrics.frechet import (
    FeatureStatistics,
    FrechetDistance,
    cached_features,
    cached_statistics,
    frechet_distance,
    frechet_distance_from_features,
)
from lightning_mem.metrics.intervals import bootstrap_interval, jackknife_interval, wilson_interval
from lightning_mem.metrics.memorization import (
    MemorizationRatio,
    NormalizedL2,
    memorization_ratio,
    memorized,
    normalized_l2,
)
from lightning_mem.metrics.neighbors import duplicate_groups, nearest_neighbors

__all__ = [
    "AbstractExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionExtractor",
    "MemorizationRatio",
    "NormalizedL2",
    "PixelsExtractor",
    "TimmExtractor",
    "bootstrap_interval",
    "build_extractor",
    "cached_features",
    "cached_statistics",
    "duplicate_groups",
    "extract_features",
    "frechet_distance",
    "frechet_distance_from_features",
    "jackknife_interval",
    "memorization_ratio",
    "memorized",
    "nearest_neighbors",
    "normalized_l2",
    "wilson_interval",
]
