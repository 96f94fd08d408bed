"""Text-to-image models of diffusers as targets: a latent UNet, its autoencoder, and what embeds prompts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from torch import Tensor

from lightning_mem.diffusion import DiffusionProcess, LatentCodec, Target
from lightning_mem.networks import PromptEncoder, TextDenoiser
from lightning_mem.records import digest
from lightning_mem.types import Weights

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


@dataclass(frozen=True)
class TextToImageParts:
    """What a text-to-image UNet works with; frozen, so that copies of whatever holds it share it.

    Args:
        codec: Between latents and pixels.
        conditioner: Makes conditions of prompts; null where the model has no text encoder.
        empty: Condition of the empty prompt; null likewise.
    """

    codec: LatentCodec
    conditioner: PromptEncoder | None
    empty: Mapping[str, Tensor] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextToImageParts":
        return self

    @cached_property
    def digest(self) -> str:
        """Identity: equal digests mean equal latents and an equal empty prompt."""
        return digest(self.codec.digest, *(self.empty or {}).values())

    def target(
        self,
        unet: UNet2DConditionModel,
        process: DiffusionProcess,
        weights: Weights = "raw",
        device: torch.device | str = "cpu",
        cfg_weight: float = 1.0,
        identified: bool = True,
    ) -> Target:
        """The target of a UNet with these parts; ``identified`` computes its digest."""
        values = [value for _, value in sorted(unet.state_dict().items())] if identified else []
        size = unet.config.sample_size
        return Target(
            denoiser=TextDenoiser(unet, process.prediction, self.empty, cfg_weight),
            process=process,
            shape=(unet.config.in_channels, size, size),
            weights=weights,
            digest=digest(process.digest, self.digest, cfg_weight, *values) if identified else "",
            codec=self.codec,
            conditioner=self.conditioner,
            device=device,
        )


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
    parts = load_parts(path, device)
    unet, process = load_latent_unet(path)
    unet.requires_grad_(False)
    return parts.target(unet.to(device).eval(), process, "raw", device, cfg_weight)


def load_latent_unet(path: str | Path) -> tuple[UNet2DConditionModel, DiffusionProcess]:
    """UNet and process of a Stable-Diffusion-type model; see :func:`load_text_to_image`."""
    name, scheduler = str(path), _classes(path)["scheduler"]
    unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True)
    config = unet.config
    more = [key for key in UNKNOWN if config.get(key) is not None]
    if more or not isinstance(config.sample_size, int) or config.in_channels != config.out_channels:
        shown = {key: config.get(key) for key in (*more, "sample_size", "in_channels", "out_channels")}
        raise ValueError(f"{name} has a UNet that is not Stable Diffusion's (v1 and v2): it says {shown}")
    schedule = DDIMScheduler.load_config(name, subfolder="scheduler")
    # latents are not clipped; schedulers that know no clipping do not say so, and others read that as "clip"
    return unet, DiffusionProcess.from_config({"clip_sample": False, **schedule, "_class_name": scheduler})


def load_parts(path: str | Path, device: torch.device | str = "cpu") -> TextToImageParts:
    """Autoencoder and text encoder of a Stable-Diffusion-type model; see :func:`load_text_to_image`."""
    name, classes = str(path), _classes(path)
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", use_safetensors=True)
    found = [classes["tokenizer"], classes["text_encoder"]]
    if None in found:
        return TextToImageParts(LatentCodec(vae.to(device)), None, None)
    if found[0] not in ("CLIPTokenizer", "CLIPTokenizerFast") or found[1] != "CLIPTextModel":
        raise ValueError(f"{name} has {found[0]} and {found[1]}; legal are CLIPTokenizer and CLIPTextModel")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(f"{name} needs transformers for its text encoder: pip install lightning-mem[text]") from error
    encoder: Any = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True)
    conditioner = PromptEncoder(CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"), encoder.to(device))
    return TextToImageParts(LatentCodec(vae.to(device)), conditioner, conditioner([""]))


def _classes(path: str | Path) -> dict[str, str | None]:
    """Class of each part.

    Raises:
        ValueError: If one that is needed is missing or of another class.
    """
    index = read_index(path)
    found = {part: (index.get(part) or [None, None])[1] for part in (*PARTS, "tokenizer", "text_encoder")}
    for part, wanted in PARTS.items():
        if found[part] is None or wanted not in (None, found[part]):
            raise ValueError(
                f"{path} has as {part} {found[part] or 'nothing'}, but a text-to-image model needs {wanted or 'one'}"
            )
    return found
