"""Thin builders over diffusers' UNets and timm's ResNets."""

from lightning_mem.networks.classifier import ClassifierConfig, TimeClassifier, build_classifier
from lightning_mem.networks.dit import DiTDenoiser
from lightning_mem.networks.text import PromptEncoder, TextDenoiser
from lightning_mem.networks.unet import UNetConfig, UNetDenoiser, build_unet
