"""What a path stands for: a model to start from, and the target of a checkpoint, a run folder or a diffusers model."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from lightning.pytorch.utilities import rank_zero_info

from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.modules.base import META
from lightning_mem.modules.class_to_image import is_class_to_image, load_class_parts
from lightning_mem.modules.latent_parts import LatentParts
from lightning_mem.modules.text_to_image import is_text_to_image, load_text_parts
from lightning_mem.networks import UNetDenoiser
from lightning_mem.records import digest
from lightning_mem.types import Weights

DENOISER = "DenoiserModule"
"""Whose checkpoints are targets."""


def load_pretrained(path: str) -> tuple[UNet2DModel, DiffusionProcess]:
    """Network and process of an unconditional diffusers pipeline.

    Args:
        path: A folder written by diffusers, or a hub id.

    Raises:
        ValueError: If there is no such pipeline, its weights are not safetensors, or it is of a kind that cannot be
            trained here (latent, text-conditioned, flow matching): named.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained must be a diffusers folder (model_index.json, safetensors weights) or a hub id, "
            f"got {path!r}: {error}"
        ) from error
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel) or getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None):
        raise ValueError(
            f"{path} is a {type(pipeline).__name__} with a {type(unet).__name__}; legal are pixel-space pipelines "
            "around UNet2DModel (DDPMPipeline, DDIMPipeline)"
        )
    rank_zero_info(f"starting from {path}: {sum(p.numel() for p in unet.parameters()):,} parameters")
    return unet, DiffusionProcess.from_config(
        {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    )


def load_target(path: str | Path, weights: Weights = "ema", device: str = "cpu", cfg_weight: float = 1.0) -> Target:
    """The target of a checkpoint, a run folder, or a diffusers folder or hub id.

    Args:
        path: ``*.ckpt`` (read with weights_only=True), a run folder (its ``checkpoints/last.ckpt``), else diffusers. A
            checkpoint of a latent model names the model it started from, whose autoencoder and text encoder are read
            from there, and compared by digest.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
        device: Where to put the network.
        cfg_weight: Weight of classifier-free guidance of a latent model; 1 for none.

    Raises:
        ValueError: If the checkpoint is not one of a DenoiserModule, or cannot be read, a part of a latent model is
            missing or of another class, or cfg_weight is not 1 and the model was not made for it.
    """
    file = checkpoint_file(path)
    if file is not None:
        return _of_checkpoint(file, weights, device, cfg_weight)
    parts = latent_parts(path, device)
    if parts is not None:
        network, process = parts.load_network(path)
        network.requires_grad_(False)
        return parts.target(network.to(device).eval(), process, "raw", device, cfg_weight)
    unet, process = load_pretrained(str(path))
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    return _of_pixels(path, unet.to(device).eval(), process, shape, unet.config.num_class_embeds, "raw", cfg_weight)


def latent_parts(path: str | Path, device: str = "cpu") -> LatentParts | None:
    """What the network of a latent diffusers model works with; null where it is none.

    Args:
        path: A diffusers folder or hub id: of a text-to-image UNet, or a class-conditional transformer.
        device: Where to put autoencoder and text encoder.

    Raises:
        ValueError: If a part is missing or is of another class (named).
    """
    if is_text_to_image(path):
        return load_text_parts(path, device)
    return load_class_parts(path, device) if is_class_to_image(path) else None


def checkpoint_file(path: str | Path) -> Path | None:
    """The checkpoint that a path means: itself, or ``checkpoints/last.ckpt`` of a run folder; null for diffusers."""
    path = Path(path)
    if path.is_dir() and (path / "checkpoints").is_dir():
        return path / "checkpoints" / "last.ckpt"
    return path if path.suffix == ".ckpt" else None


def _of_checkpoint(path: Path, weights: Weights, device: str, cfg_weight: float) -> Target:
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get(META, {})
    if meta.get("module") != DENOISER:
        raise ValueError(f"{path} is a checkpoint of {meta.get('module', 'something else')}, not of {DENOISER}")
    based_on = meta.get("based_on")
    parts = None if based_on is None else latent_parts(based_on, device)
    if based_on is not None and parts is None:
        raise ValueError(f"{path} was trained from {based_on}, where there is no latent model now: put it back there")
    unet = (UNet2DModel if parts is None else parts.network_class).from_config(meta["network"])
    averaged = "current_model_state" in checkpoint
    state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
    unet.load_state_dict({name.removeprefix("unet."): value for name, value in state.items()})
    unet, process = unet.to(device).eval(), DiffusionProcess.from_config(meta["process"])
    kind: Weights = "ema" if averaged and weights == "ema" else "raw"
    if parts is None:
        return _of_pixels(path, unet, process, tuple(meta["shape"]), meta["num_classes"], kind, cfg_weight)
    if parts.digest != meta["parts_digest"]:
        raise ValueError(
            f"{path} was trained with the autoencoder and conditioner {meta['parts_digest']} of {based_on}, but those "
            f"there are now {parts.digest}: put the model it started from back in its place"
        )
    return parts.target(unet, process, kind, device, cfg_weight)


def _of_pixels(
    path: str | Path,
    unet: UNet2DModel,
    process: DiffusionProcess,
    shape: tuple[int, int, int],
    num_classes: int | None,
    weights: Weights,
    cfg_weight: float,
) -> Target:
    if cfg_weight != 1:
        raise ValueError(f"cfg_weight {cfg_weight} is for latent models, and {path} is none: leave it at 1")
    return Target(
        denoiser=UNetDenoiser(unet, process.prediction),
        process=process,
        shape=shape,
        num_classes=num_classes,
        weights=weights,
        digest=digest(process.digest, *[value for _, value in sorted(unet.state_dict().items())]),
        device=unet.device,
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint, read so that it cannot run code.

    Raises:
        ValueError: If the file is missing, cut off, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises a dozen types for damaged files
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not ours): {error}") from error
