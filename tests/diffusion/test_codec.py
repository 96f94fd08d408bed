"""Latents are the mode of the posterior, scaled as the pipelines of diffusers scale them."""

import copy

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from stable_diffusion import tiny_vae
from torch import Tensor

from lightning_mem.diffusion import LatentCodec, PixelCodec
from lightning_mem.types import to_float


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def vae(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vae(**options)


@pytest.mark.parametrize(
    ("options", "scale", "shift"),
    [
        ({"scaling_factor": 0.3}, torch.tensor(0.3), torch.tensor(0.0)),
        ({"scaling_factor": 1.5, "shift_factor": 0.1}, torch.tensor(1.5), torch.tensor(0.1)),
        (
            {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
            (0.5 / torch.tensor([1.0, 2, 3, 4])).reshape(1, 4, 1, 1),
            torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(1, 4, 1, 1),
        ),
    ],
)
def test_latents_are_the_scaled_mode_and_come_back(options: dict, scale: Tensor, shift: Tensor) -> None:
    own = vae(**options)
    codec, pixels = LatentCodec(copy.deepcopy(own)), to_float(images(4))
    theirs = VaeImageProcessor(vae_scale_factor=2).preprocess(images(4) / 255.0)  # to [-1, 1]
    torch.testing.assert_close(pixels, theirs, rtol=0, atol=1e-6)
    with torch.no_grad():
        mean = own.eval().encode(theirs).latent_dist.mean
        back = own.decode(mean).sample
    latents = codec.encode(pixels)
    assert latents.shape[1:] == (4, 8, 8)
    torch.testing.assert_close(latents, (mean - shift) * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), back, rtol=1e-4, atol=1e-5)
    assert codec.pixel_shape(tuple(latents.shape[1:])) == (3, 16, 16)


def test_an_image_has_one_latent_in_any_company() -> None:
    codec, pixels = LatentCodec(vae()), to_float(images(7))
    whole = codec.encode(pixels)
    assert torch.equal(codec.encode(pixels[5:6]), whole[5:6])
    assert torch.equal(codec.encode(pixels.flip(0)), whole.flip(0))
    assert torch.equal(codec.decode(whole[6:]), codec.decode(whole)[6:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(pixels), whole)


def test_the_autoencoder_is_frozen_and_told_apart() -> None:
    own = vae().train()
    codec = LatentCodec(own)
    assert not own.training
    assert not codec.encode(to_float(images(1)).requires_grad_()).requires_grad
    assert copy.deepcopy(codec) is codec
    other = vae(scaling_factor=0.5)
    assert codec.digest == LatentCodec(vae()).digest != LatentCodec(other).digest
    assert PixelCodec().pixel_shape((3, 5, 6)) == (3, 5, 6)


def test_what_it_cannot_encode_is_named() -> None:
    codec = LatentCodec(vae())
    with pytest.raises(ValueError, match=r"sides divisible by 2 .* got \(15, 16\)"):
        codec.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="encodes 3 channels, got 1"):
        codec.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="positive scaling_factor in its configuration, got 0"):
        LatentCodec(vae(scaling_factor=0))
