"""The noising process, targets, sampling in blocks, guidance, and the closed forms of a finite set."""

from lightning_mem.diffusion.codec import Codec, LatentCodec, PixelCodec
from lightning_mem.diffusion.empirical import EmpiricalClassifier, EmpiricalDenoiser
from lightning_mem.diffusion.guidance import (
    Classifier,
    ClassifierGuidance,
    ScaleSchedule,
    classifier_gradient,
    gate_rates,
    guidance_settings,
)
from lightning_mem.diffusion.process import DiffusionProcess, Sampler
from lightning_mem.diffusion.sampling import ScoreTerm, sample, sample_x0
from lightning_mem.diffusion.target import Condition, Denoiser, Target
