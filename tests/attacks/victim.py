"""A target whose network was never trained: everything about it is exact but what it draws."""

from pathlib import Path

import torch

from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.modules import DenoiserModule
from lightning_mem.modules.base import META
from lightning_mem.networks import UNetConfig


def write_target(folder: Path, seed: int = 0) -> str:
    """A run folder with one checkpoint, of 8 x 8 grey images."""
    torch.manual_seed(seed)
    process = DiffusionProcess("linear", num_timesteps=100)
    module = DenoiserModule(network=UNetConfig((8,), norm_num_groups=4, mid_attention=False), process=process)
    meta = {"module": "DenoiserModule", "seed": 0, "step": 7, "members_digest": "", "num_members": 0}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)
