"""Attribution: which training images made a sample; one published method, one file."""

from lightning_mem.attribution.attributions import Attributions, QueryOptions
from lightning_mem.attribution.base import AbstractAttribution, AbstractExplanation, Queries, QueryKind
from lightning_mem.attribution.chance import RandomScores
from lightning_mem.attribution.codes import UnitCodes, balanced_codes, minimum_members, units_of
from lightning_mem.attribution.counterfactual import Landscape, false_attribution_rate, geometric_mean, landscape
from lightning_mem.attribution.d_trak import DTRAK
from lightning_mem.attribution.datamodeling import DatamodelingScores
from lightning_mem.attribution.ensemble import Ensemble, EnsembleDenoiser
from lightning_mem.attribution.ensemble_ablation import EnsembleAblation, ablation_losses
from lightning_mem.attribution.features import GradientOptions
from lightning_mem.attribution.influence import first_order_landscape, first_order_shifts, weight_derivatives
from lightning_mem.attribution.retrac import ReTrac
from lightning_mem.attribution.similarity import FeatureSimilarity, PixelSimilarity
from lightning_mem.attribution.tracin import TracIn
from lightning_mem.attribution.trak import TRAK
