"""Ensembles whose members are closed forms of the images they saw: exact 'trained' members at no cost."""

import torch
from torch import Tensor

from lightning_mem.attribution import Ensemble, UnitCodes
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.randomness import generator


def random_images(count: int, size: int = 4, seed: int = 0) -> Tensor:
    """uint8 [count, 1, size, size]."""
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator(seed, "images"))


def closed_ensemble(images: Tensor, codes: UnitCodes, process: DiffusionProcess) -> Ensemble:
    """Members that know exactly the images of their units; row r of the images is source index r."""
    members = tuple(EmpiricalDenoiser(images[codes.seen_by(k)], process).target() for k in range(codes.num_members))
    return Ensemble(members, codes)
