"""Metrics: neighbours, memorization, Fréchet distance, intervals; a pure function first, its metric second."""

from lightning_mem.metrics.authpct import Authenticity, authentic, authenticity, own_nearest_distances
from lightning_mem.metrics.cache import cached_features, cached_statistics
from lightning_mem.metrics.datamodeling import (
    DatamodelingComparison,
    compare_datamodeling_scores,
    linear_datamodeling_score,
    rank_correlation,
    subset_predictions,
)
from lightning_mem.metrics.divergence import (
    DivergenceDifference,
    GaussianMixture,
    divergence_difference,
    label_divergence,
)
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
from lightning_mem.metrics.kernel import kernel_distance, memorization_informed_frechet_distance
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
from lightning_mem.metrics.roc import Roc, roc
from lightning_mem.metrics.scores import (
    SSCD_BANDS,
    average_memorization_score,
    memorization_curves,
    unique_memorization_score,
)
from lightning_mem.metrics.sharded import Shard, sharded_neighbors
from lightning_mem.metrics.sscd import SSCDExtractor
from lightning_mem.metrics.three_sample import DataCopying, data_copying
from lightning_mem.metrics.two_sample import two_sample_p_value

__all__ = [
    "SSCD_BANDS",
    "AbstractExtractor",
    "Authenticity",
    "DataCopying",
    "DatamodelingComparison",
    "DivergenceDifference",
    "EideticMemorization",
    "FeatureStatistics",
    "FrechetDistance",
    "GaussianMixture",
    "InceptionExtractor",
    "ManifoldOverlap",
    "MemorizationRatio",
    "MemorizationScores",
    "NormalizedL2",
    "PixelsExtractor",
    "PrecisionRecallDensityCoverage",
    "Roc",
    "SSCDExtractor",
    "SamplePhases",
    "Shard",
    "TimmExtractor",
    "authentic",
    "authenticity",
    "average_memorization_score",
    "bootstrap_interval",
    "build_extractor",
    "cached_features",
    "cached_statistics",
    "compare_datamodeling_scores",
    "data_copying",
    "divergence_difference",
    "duplicate_groups",
    "eidetic_count",
    "extract_features",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_infinity",
    "frechet_infinity_interval",
    "jackknife_interval",
    "kernel_distance",
    "label_divergence",
    "linear_datamodeling_score",
    "manifold_overlap",
    "memorization_curves",
    "memorization_informed_frechet_distance",
    "memorization_ratio",
    "memorized",
    "nearest_neighbors",
    "neighborhood_radii",
    "normalized_l2",
    "own_nearest_distances",
    "phase_shares",
    "phase_threshold",
    "prdc",
    "precision_recall",
    "rank_correlation",
    "roc",
    "sample_phases",
    "sharded_neighbors",
    "subset_predictions",
    "tiled_l2",
    "two_sample_p_value",
    "unique_memorization_score",
    "wilson_interval",
]
