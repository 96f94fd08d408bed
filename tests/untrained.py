"""Run folders of networks as they begin: enough for whatever reads a checkpoint."""

from pathlib import Path

import torch

from lightning_mem.modules import DenoiserModule
from lightning_mem.modules.base import META
from lightning_mem.networks import UNetConfig


def write_untrained(folder: Path, seed: int = 0, step: int = 0) -> str:
    """A checkpoint of a small network for 8 x 8 grey images; returns the folder."""
    torch.manual_seed(seed)
    module = DenoiserModule(network=UNetConfig((8,), norm_num_groups=4, mid_attention=False))
    meta = {"module": "DenoiserModule", "seed": 0, "step": step, "members_digest": "", "num_members": 0}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    checkpoint["optimizer_states"] = [{"param_groups": [{"lr": 0.001}]}]
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)
