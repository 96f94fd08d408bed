"""A Stable-Diffusion-type pipeline, tiny and untrained, as its author would have saved it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SCHEDULE |= {"set_alpha_to_one": False, "steps_offset": 1}


def tiny_vae(**options: Any) -> AutoencoderKL:
    """Halves the side: 3 x 16 x 16 becomes 4 x 8 x 8."""
    given = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(latent_channels=4, norm_num_groups=2, **given, **options)


def tiny_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, **options,
    )  # fmt: skip


def tiny_pipeline(scheduler: Any = None) -> StableDiffusionPipeline:
    words = ["<|startoftext|>", "<|endoftext|>", *[chr(c) + end for c in range(97, 123) for end in ("", "</w>")]]
    vocabulary = {word: place for place, word in enumerate(words)}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, unet, encoder = tiny_vae(), tiny_unet(), CLIPTextModel(text)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    pipeline = StableDiffusionPipeline(
        vae.eval(), encoder.eval(), tokenizer, unet.eval(), scheduler or DDIMScheduler(**SCHEDULE), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path) -> str:
    tiny_pipeline().save_pretrained(str(folder), safe_serialization=True)
    return str(folder)
