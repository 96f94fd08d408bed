"""Text-to-image models of diffusers as targets: a latent UNet, its autoencoder, and what embeds prompts."""

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download

from lightning_mem.diffusion import DiffusionProcess, LatentCodec, Target
from lightning_mem.networks import PromptEncoder, TextDenoiser
from lightning_mem.records import digest

INDEX = "model_index.json"
"""The file of a diffusers pipeline that names its parts."""

PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": None}
"""What a text-to-image pipeline must have, and of which class."""

UNKNOWN = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type")
"""Settings of a UNet that asks for more than prompt embeddings."""


def read_index(path: str | Path) -> dict[str, Any]:
    """Names and classes of a pipeline's parts; empty where there is no diffusers pipeline."""
    try:
        file = Path(path) / INDEX if Path(path).is_dir() else hf_hub_download(str(path), INDEX)
        index = json.loads(Path(file).read_text())
    except (OSError, ValueError):  # of the hub too: no such repository, no network, no name of one
        return {}
    return index if isinstance(index, dict) else {}


def is_text_to_image(path: str | Path) -> bool:
    """Whether a diffusers folder or hub id holds a UNet that is conditioned on embeddings."""
    return (read_index(path).get("unet") or [None, None])[1] == PARTS["unet"]


def load_text_to_image(path: str | Path, device: str = "cpu", cfg_weight: float = 1.0) -> Target:
    """The target of a Stable-Diffusion-type model, in float32.

    Without a condition it draws from the empty prompt. Its images are square, of the size the UNet is made for.

    Args:
        path: A folder written by diffusers, with safetensors weights, or a hub id.
        device: Where to put the networks.
        cfg_weight: Weight of classifier-free guidance; 1 for none.

    Raises:
        ValueError: If a part is missing, is of another class, or asks for more than prompt embeddings (named).
    """
    name, index = str(path), read_index(path)
    for part, wanted in PARTS.items():
        found = (index.get(part) or [None, None])[1]
        if found is None or (wanted is not None and found != wanted):
            raise ValueError(f"{name} has as {part} {found or 'nothing'}, but a text-to-image target needs {wanted}")
    unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True)
    more = [key for key in UNKNOWN if unet.config.get(key) is not None]
    size = unet.config.sample_size
    if more or not isinstance(size, int) or unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"{name} has a UNet that is not Stable Diffusion's (v1 and v2): its configuration says "
            f"{ {key: unet.config.get(key) for key in (*more, 'sample_size', 'in_channels', 'out_channels')} }"
        )
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", use_safetensors=True)
    scheduler = DDIMScheduler.load_config(name, subfolder="scheduler")
    # latents are not clipped; schedulers that know no clipping do not say so, and others read that as "clip"
    process = DiffusionProcess.from_config({"clip_sample": False, **scheduler, "_class_name": index["scheduler"][1]})
    unet, codec = unet.to(device).eval().requires_grad_(False), LatentCodec(vae.to(device))
    conditioner = _prompt_encoder(name, index, device)
    empty = None if conditioner is None else conditioner([""])
    weights = [value for _, value in sorted(unet.state_dict().items())]
    return Target(
        denoiser=TextDenoiser(unet, process.prediction, empty, cfg_weight),
        process=process,
        shape=(unet.config.in_channels, size, size),
        digest=digest(process.digest, codec.digest, cfg_weight, *([] if empty is None else empty.values()), *weights),
        codec=codec,
        conditioner=conditioner,
        device=device,
    )


def _prompt_encoder(name: str, index: dict[str, Any], device: str) -> PromptEncoder | None:
    """CLIP's text model, where the pipeline has it."""
    found = [(index.get(part) or [None, None])[1] for part in ("tokenizer", "text_encoder")]
    if None in found:
        return None
    if found[0] not in ("CLIPTokenizer", "CLIPTokenizerFast") or found[1] != "CLIPTextModel":
        raise ValueError(f"{name} has {found[0]} and {found[1]}; legal are CLIPTokenizer and CLIPTextModel")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(f"{name} needs transformers for its text encoder: pip install lightning-mem[text]") from error
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
    encoder: Any = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True)
    return PromptEncoder(tokenizer, encoder.to(device))
