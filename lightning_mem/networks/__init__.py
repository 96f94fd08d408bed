"""Thin builders over diffusers' UNets."""

from lightning_mem.networks.unet import UNetConfig, UNetDenoiser, build_unet
