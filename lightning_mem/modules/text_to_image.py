"""Text-to-image models of diffusers: a latent UNet, its autoencoder, and what embeds prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lightning_mem.diffusion import Denoiser
from lightning_mem.modules.latent_parts import LatentParts, class_of, load_codec, part_classes, read_index
from lightning_mem.networks import PromptEncoder, TextDenoiser
from lightning_mem.types import Prediction

UNKNOWN = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type")
"""Settings of a UNet that asks for more than prompt embeddings."""


@dataclass(frozen=True)
class TextToImageParts(LatentParts):
    """What a text-to-image UNet works with. Without a condition its target draws from the empty prompt.

    Args:
        conditioner: Makes conditions of prompts; null where the model has no text encoder.
        empty: Condition of the empty prompt; null likewise.
    """

    conditioner: PromptEncoder | None = None
    empty: Mapping[str, Tensor] | None = None
    component = "unet"
    network_class = UNet2DConditionModel

    @property
    def prompts(self) -> Callable[[Sequence[str]], Mapping[str, Tensor]] | None:
        """The text encoder."""
        return self.conditioner

    def _identity(self) -> Sequence[Any]:
        return list((self.empty or {}).values())

    def denoiser(self, network: Any, prediction: Prediction, cfg_weight: float) -> Denoiser:
        """Guided by its own condition."""
        return TextDenoiser(network, prediction, self.empty, cfg_weight)

    def _check(self, name: str, config: Any) -> None:
        more = [key for key in UNKNOWN if config.get(key) is not None]
        if more or not isinstance(config.sample_size, int) or config.in_channels != config.out_channels:
            shown = {key: config.get(key) for key in (*more, "sample_size", "in_channels", "out_channels")}
            raise ValueError(f"{name} has a UNet that is not Stable Diffusion's (v1 and v2): it says {shown}")


def is_text_to_image(path: str | Path) -> bool:
    """Whether a diffusers folder or hub id holds a UNet that is conditioned on embeddings."""
    return class_of(read_index(path), "unet") == UNet2DConditionModel.__name__


def load_text_parts(path: str | Path, device: torch.device | str = "cpu") -> TextToImageParts:
    """Autoencoder and text encoder of a Stable-Diffusion-type model, in float32.

    Args:
        path: A folder written by diffusers, with safetensors weights, or a hub id.
        device: Where to put the networks.

    Raises:
        ValueError: If a part is missing or is of another class (named).
    """
    part_classes(path, {"vae": "AutoencoderKL"})
    name, index = str(path), read_index(path)
    found = [class_of(index, part) for part in ("tokenizer", "text_encoder")]
    if None in found:
        return TextToImageParts(load_codec(path, device))
    if found[0] not in ("CLIPTokenizer", "CLIPTokenizerFast") or found[1] != "CLIPTextModel":
        raise ValueError(f"{name} has {found[0]} and {found[1]}; legal are CLIPTokenizer and CLIPTextModel")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(f"{name} needs transformers for its text encoder: pip install lightning-mem[text]") from error
    encoder: Any = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True)
    conditioner = PromptEncoder(CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"), encoder.to(device))
    return TextToImageParts(load_codec(path, device), conditioner, conditioner([""]))
