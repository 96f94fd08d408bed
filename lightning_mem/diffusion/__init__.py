"""The noising process, targets, sampling in blocks, and the closed-form denoiser."""

from lightning_mem.diffusion.empirical import EmpiricalDenoiser
from lightning_mem.diffusion.process import DiffusionProcess, Sampler
from lightning_mem.diffusion.sampling import ScoreTerm, sample, sample_x0
from lightning_mem.diffusion.target import Condition, Denoiser, PixelCodec, Target
