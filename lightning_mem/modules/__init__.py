"""The LightningModules."""

from lightning_mem.modules.base import AbstractModule
from lightning_mem.modules.classifier import AbstractClassifierModule, FrozenClassifier
from lightning_mem.modules.denoiser import DenoiserModule
from lightning_mem.modules.pretrained import load_target, read_checkpoint
from lightning_mem.modules.random_label import LoadedRandomLabel, RandomLabelModule, load_random_label
from lightning_mem.modules.schedules import WarmupCosine
from lightning_mem.modules.surrogate import LoadedClassifier, SurrogateModule, load_classifier
