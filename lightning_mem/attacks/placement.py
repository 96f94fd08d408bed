"""Bringing a target to the device where an attack asks it."""

from dataclasses import replace

import torch

from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import network_of


def placed(target: Target, device: torch.device | str) -> Target:
    """The target with its network on a device, where its samples will be drawn."""
    network = network_of(target.denoiser)
    if network is not None:
        network.to(device)
    return replace(target, device=device)
