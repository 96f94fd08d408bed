"""Metrics: neighbours, memorization, Fréchet distance, intervals; a pure function first, its metric second."""

from lightning_mem.metrics.cache import cached_features, cached_statistics
from lightning_mem.metrics.eidetic import EideticMemorization, eidetic_count, tiled_l2
from lightning_mem.metrics.extrapolation import frechet_infinity, frechet_infinity_interval
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
    frechet_distance,
    frechet_distance_from_features,
)
from lightning_mem.metrics.intervals import bootstrap_interval, jackknife_interval, wilson_interval
from lightning_mem.metrics.manifold import (
    ManifoldOverlap,
    PrecisionRecallDensityCoverage,
    manifold_overlap,
    neighborhood_radii,
    prdc,
    precision_recall,
)
from lightning_mem.metrics.memorization import (
    MemorizationRatio,
    NormalizedL2,
    memorization_ratio,
    memorized,
    normalized_l2,
)
from lightning_mem.metrics.memorization_scores import MemorizationScores
from lightning_mem.metrics.neighbors import duplicate_groups, nearest_neighbors
from lightning_mem.metrics.phases import SamplePhases, phase_shares, phase_threshold, sample_phases
from lightning_mem.metrics.scores import (
    SSCD_BANDS,
    average_memorization_score,
    memorization_curves,
    unique_memorization_score,
)
from lightning_mem.metrics.sscd import SSCDExtractor

__all__ = [
    "SSCD_BANDS",
    "AbstractExtractor",
    "EideticMemorization",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionExtractor",
    "ManifoldOverlap",
    "MemorizationRatio",
    "MemorizationScores",
    "NormalizedL2",
    "PixelsExtractor",
    "PrecisionRecallDensityCoverage",
    "SSCDExtractor",
    "SamplePhases",
    "TimmExtractor",
    "average_memorization_score",
    "bootstrap_interval",
    "build_extractor",
    "cached_features",
    "cached_statistics",
    "duplicate_groups",
    "eidetic_count",
    "extract_features",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_infinity",
    "frechet_infinity_interval",
    "jackknife_interval",
    "manifold_overlap",
    "memorization_curves",
    "memorization_ratio",
    "memorized",
    "nearest_neighbors",
    "neighborhood_radii",
    "normalized_l2",
    "phase_shares",
    "phase_threshold",
    "prdc",
    "precision_recall",
    "sample_phases",
    "tiled_l2",
    "unique_memorization_score",
    "wilson_interval",
]
