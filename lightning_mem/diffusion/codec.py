"""Codecs: between pixels and the space a denoiser works in."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_mem.records import digest

BLOCK = 4
"""Images of one call of an autoencoder: one shape, so that what an image becomes does not depend on its company."""


class Codec(Protocol):
    """Between pixels in [-1, 1] and the space of a denoiser."""

    name: str

    def encode(self, images: Tensor) -> Tensor:
        """What the denoiser would have seen of these pixels, float32."""

    def decode(self, x0: Tensor) -> Tensor:
        """Pixels, nominally in [-1, 1]."""

    def pixel_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the pixels behind a point of shape (C, H, W)."""


class PixelCodec:
    """The codec of models that work on pixels: nothing to encode."""

    name = "pixels"

    def encode(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1] as they are."""
        return images

    def decode(self, x0: Tensor) -> Tensor:
        """Pixels in [-1, 1] as they are."""
        return x0

    def pixel_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The same."""
        return shape


class LatentCodec:
    r"""The codec of latent diffusion: an autoencoder's latents, brought to about unit variance.

    .. math:: z = (\mu(x) - m)\, s, \qquad \hat x = D(z / s + m)

    :math:`\mu` is the mode of the encoder's posterior, so that an image has one latent (the training of such a model
    draws from the posterior; its spread is small beside the noise of all but the first timesteps). s is the
    autoencoder's ``scaling_factor``, m its ``shift_factor`` (0 where it has none); where it has statistics a channel,
    ``latents_mean`` and ``latents_std``, m is the mean and s is divided by the deviation. In blocks of one shape, in
    float32, in evaluation mode, without gradients, on the device of what it is given.

    Args:
        vae: diffusers' AutoencoderKL; is frozen.

    Raises:
        ValueError: If it has no ``scaling_factor``, or its factor is not positive.

    Source:
        Rombach et al., arXiv:2112.10752, section 3.1 and appendix G (the scaling).
    """

    name = "latents"

    def __init__(self, vae: Any) -> None:
        self.vae = vae.float().eval().requires_grad_(False)
        config = self.vae.config
        scale = config.get("scaling_factor")
        if not scale or scale <= 0:
            raise ValueError(f"{type(vae).__name__} needs a positive scaling_factor in its configuration, got {scale}")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shift = mean if mean is not None else [config.get("shift_factor") or 0.0]
        per_channel = [scale / s for s in std] if std is not None else [scale]
        self._shift = torch.tensor(shift, dtype=torch.float32).reshape(1, -1, 1, 1)
        self._scale = torch.tensor(per_channel, dtype=torch.float32).reshape(1, -1, 1, 1)
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentCodec":
        # frozen: copies of whatever holds it share it
        return self

    @property
    def digest(self) -> str:
        """Identity: equal digests mean equal latents."""
        return digest(self._shift, self._scale, *[value for _, value in sorted(self.vae.state_dict().items())])

    def encode(self, images: Tensor) -> Tensor:
        """Latents float32 [N, c, H / factor, W / factor] of pixels in [-1, 1], [N, C, H, W]."""
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise ValueError(
                f"images must have sides divisible by {self.factor} for this autoencoder, got {tuple(images.shape[2:])}"
            )
        if images.shape[1] != self.vae.config["in_channels"]:
            raise ValueError(
                f"the autoencoder encodes {self.vae.config['in_channels']} channels, got {images.shape[1]}: "
                "set data.channels to match"
            )
        shift, scale = self._shift.to(images.device), self._scale.to(images.device)
        return self._in_blocks(images, lambda part: (self.vae.encode(part).latent_dist.mode() - shift) * scale)

    def decode(self, x0: Tensor) -> Tensor:
        """Pixels float32 [N, C, H, W], nominally in [-1, 1], of latents [N, c, h, w]."""
        shift, scale = self._shift.to(x0.device), self._scale.to(x0.device)
        return self._in_blocks(x0, lambda part: self.vae.decode(part / scale + shift).sample)

    def pixel_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the pixels behind a latent of shape (c, h, w)."""
        _, height, width = shape
        return self.vae.config["out_channels"], height * self.factor, width * self.factor

    @torch.no_grad()
    def _in_blocks(self, rows: Tensor, call: Any) -> Tensor:
        self.vae.to(rows.device)
        found = []
        with torch.autocast(rows.device.type, enabled=False):  # a training in reduced precision sees the same latents
            for part in torch.arange(len(rows)).split(BLOCK):
                padded = torch.cat([part, part[-1:].expand(BLOCK - len(part))])
                found.append(call(rows[padded].float())[: len(part)])
        return torch.cat(found)
