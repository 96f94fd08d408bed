"""Training of the UNet denoiser, from scratch or from an existing diffusers model."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDPMScheduler, DiffusionPipeline
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mem.data.batches import Batch
from lightning_mem.diffusion import DiffusionProcess, PixelCodec, Target
from lightning_mem.modules.base import META, AbstractModule
from lightning_mem.modules.latent_parts import LatentParts
from lightning_mem.modules.latents import LatentCache
from lightning_mem.modules.pretrained import (
    checkpoint_file,
    latent_parts,
    load_pretrained,
    load_target,
    read_checkpoint,
)
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator
from lightning_mem.types import Weights

Loss = Literal["plain", "min_snr"]


def loss_weight(process: DiffusionProcess, t: Tensor, loss: Loss, gamma: float = 5.0) -> Tensor:
    r"""Weight of the squared error at t, for the process's own prediction.

    .. math:: \min(\mathrm{SNR}, \gamma) / \{\mathrm{SNR},\ \mathrm{SNR} + 1,\ 1\}
        \text{ for } \{\epsilon, v, x_0\}

    Args:
        process: Its schedule and prediction.
        t: int64 [B].
        loss: ``plain`` is 1 everywhere.
        gamma: Of min-SNR, positive.

    Source:
        Hang et al., arXiv:2303.09556, eq. 4 and section 3.4.
    """
    if loss == "plain":
        return torch.ones(len(t), device=t.device)
    snr = process.snr(t)
    scale = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[process.prediction]
    return (snr.clamp(max=gamma) / scale).to(torch.float32)


class DenoiserModule(AbstractModule):
    """Trains a UNet to denoise; logs ``train/loss`` and, on held-out images and as many members, ``val/loss``.

    A checkpoint alone restores the sampler (:func:`load_target`): it holds the network's and the schedule's
    configuration, the averaged weights where an averaging callback ran, and the digest of the member set.

    Args:
        image_size: Side in pixels; given by ``data.image_size``.
        channels: 1 or 3; given by ``data.channels``.
        num_classes: Labels the network is conditioned on; given by the rule ``data.labels``; null for none.
        network: The UNet; not used with ``pretrained``.
        process: Noise schedule and prediction; not used with ``pretrained``. null: cosine, 1000 timesteps, eps.
        pretrained: A diffusers folder or hub id to start from: network, schedule and prediction are taken from it. A
            text-to-image model (Stable Diffusion) or class-conditional transformer (DiT) is trained on latents; of
            the first every image under the empty prompt, of the second not its variance, which no sampler here uses.
        loss: Weighting of the squared error: ``plain`` or ``min_snr``.
        snr_gamma: Gamma of ``min_snr``.
        optimizer: Optimizer by class_path.
        lr_scheduler: Learning-rate schedule by class_path, stepped once per optimizer step.
        channels_last: Keep weights in channels-last order; faster on recent GPUs.
        compile: Compile the network with torch.compile for training.
        seed: Of noise, timesteps and dropout; null takes ``seed_everything``.

    Raises:
        ValueError: If sizes do not fit the network, or ``pretrained`` is not a model this can train (named).
    """

    def __init__(
        self,
        image_size: int = 8,
        channels: int = 1,
        num_classes: int | None = None,
        network: UNetConfig | None = None,
        process: DiffusionProcess | None = None,
        pretrained: str | None = None,
        loss: Loss = "plain",
        snr_gamma: float = 5.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels_last: bool = False,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self._parts: LatentParts | None = None
        self.unet: Any
        if snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {snr_gamma}")
        if pretrained is not None:
            if network is not None or process is not None:
                raise ValueError("pretrained brings its own network and process: leave both out of the configuration")
            self._parts = latent_parts(pretrained)
            if self._parts is None:
                unet, self.process = load_pretrained(pretrained)
            else:
                self._latents = LatentCache(self._parts.codec)
                unet, self.process = self._parts.load_network(pretrained)
            self.unet = unet.train()
            self._check_pretrained(pretrained, image_size, channels, num_classes)
        else:
            self.unet = build_unet(network or UNetConfig(), image_size, channels, num_classes)
            self.process = process or DiffusionProcess()
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.pretrained = pretrained
        self.shape = (channels, image_size, image_size)
        if self._parts is not None:
            self.shape = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        self.num_classes = num_classes
        self.loss: Loss = loss
        self.snr_gamma = snr_gamma
        self._compile = compile
        self._validation: list[tuple[Tensor, Tensor]] = []

    def _check_pretrained(self, path: str, image_size: int, channels: int, num_classes: int | None) -> None:
        sizes = sizes_of(self.unet, self._parts)
        for name, given, own in (
            ("channels", channels, sizes["channels"]),
            ("num_classes", num_classes, sizes["num_classes"]),
            ("image_size", image_size, sizes["image_size"]),
        ):
            if (own is not None and given != own) or (name == "num_classes" and given != own):
                raise ValueError(f"{path} has {name} {own}, but the data give {given}: set the data options to match")

    @classmethod
    def from_diffusers(cls, path: str | Path, **options: Any) -> "DenoiserModule":
        """A module around a diffusers pipeline (folder or hub id); ``options`` as in the constructor."""
        parts = latent_parts(path)
        sizes = sizes_of((load_pretrained(str(path)) if parts is None else parts.load_network(path))[0], parts)
        return cls(**{**sizes, "pretrained": str(path), **options})

    @classmethod
    def from_checkpoint(cls, path: str | Path, weights: Weights = "ema", **options: Any) -> "DenoiserModule":
        """A module with the network of a checkpoint or run folder, to export, fine-tune or look into.

        Args:
            path: ``*.ckpt`` or a run folder.
            weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
            options: As in the constructor, except what the checkpoint knows.
        """
        target = load_target(path, weights)
        channels, size, _ = target.codec.pixel_shape(target.shape)
        if not isinstance(target.codec, PixelCodec):
            file = checkpoint_file(path)
            options |= {"pretrained": path if file is None else read_checkpoint(file)[META]["based_on"]}
        module = cls(size, channels, target.num_classes, **options)
        module.unet, module.process = target.denoiser.module.train(), target.process
        return module

    def to_diffusers(self, folder: str | Path) -> Path:
        """Write a folder that :meth:`from_diffusers` loads, and diffusers' pipeline of its kind (safetensors)."""
        if self._parts is not None:
            own = {self._parts.component: self.unet}
            whole = DiffusionPipeline.from_pretrained(self.pretrained, **own, use_safetensors=True)
            whole.save_pretrained(str(folder), safe_serialization=True)
            return Path(folder)
        scheduler = DDPMScheduler.from_config(self.process.config)
        DDIMPipeline(unet=self.unet, scheduler=scheduler).save_pretrained(str(folder), safe_serialization=True)
        return Path(folder)

    def target(self, weights: Weights = "raw") -> Target:
        """The network as it stands, as the target of any verb; shares the weights, copies nothing.

        Args:
            weights: What to call the weights that are in the network now.
        """
        if self._parts is not None:
            return self._parts.target(self.unet, self.process, weights, self.device, identified=False)
        return Target(
            denoiser=UNetDenoiser(self.unet, self.process.prediction),
            process=self.process,
            shape=self.shape,
            num_classes=self.num_classes,
            weights=weights,
            device=self.device,
        )

    def on_fit_start(self) -> None:
        """Compile the network, if asked for."""
        if self._compile:
            self.unet.compile()

    def _loss(self, x0: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Weighted squared error of each row, [B]."""
        x_t = self.process.add_noise(x0, eps, t)
        output = self.target().denoiser(x_t, t, labels)
        error = (output.float() - self.process.training_target(x0, eps, t)).square().flatten(1).mean(1)
        return error * loss_weight(self.process, t, self.loss, self.snr_gamma)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean weighted error at timesteps and noise addressed by the step."""
        x0 = self.clean(batch)
        rows = len(x0) * self.trainer.world_size
        draw = self.training_generator()
        t = torch.randint(self.process.num_timesteps, (rows,), generator=draw, device=self.device)
        eps = torch.randn((rows, *x0.shape[1:]), generator=draw, device=self.device)
        labels = batch["label"] if self.num_classes is not None else None
        loss = self._loss(x0, self.own_rows(eps), self.own_rows(t), labels).mean()
        self.watch_loss(loss)
        if self.is_shown:
            self.log("train/loss", loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Error of each row at a timestep and noise addressed by its image: the same at every validation."""
        t, eps = [], []
        for index in batch["index"].tolist():
            draw = generator(0, "validation", index)
            t.append(torch.randint(self.process.num_timesteps, (1,), generator=draw))
            eps.append(torch.randn(self.shape, generator=draw))
        labels = batch["label"] if self.num_classes is not None else None
        t_rows, eps_rows = torch.cat(t).to(self.device), torch.stack(eps).to(self.device)
        loss = self._loss(self.clean(batch), eps_rows, t_rows, labels)
        self._validation.append((batch["row"], loss.double()))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over held-out images, and over as many members beside it."""
        data = self._datamodule()
        if data is None:
            return
        found = {row: float(loss) for row, loss in self.gather_rows(self._validation).items()}
        split = len(data.heldout)
        for name, part in (
            ("val/loss", [v for row, v in found.items() if row < split]),
            ("val/loss_members", [v for row, v in found.items() if row >= split]),
        ):
            if part:
                self.log(name, sum(part) / len(part), prog_bar=name == "val/loss", rank_zero_only=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def checkpoint_meta(self) -> dict[str, Any]:
        """Configuration of network and process, as JSON text: plain values survive any loader."""
        network = {k: list(v) if isinstance(v, tuple) else v for k, v in self.unet.config.items() if k[0] != "_"}
        return {
            "network": network,
            "process": {k: v for k, v in self.process.config.items() if isinstance(v, str | int | float | bool)},
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            **({} if self._parts is None else {"based_on": self.pretrained, "parts_digest": self._parts.digest}),
        }


def sizes_of(unet: Any, parts: LatentParts | None) -> dict[str, int | None]:
    """Channels and side of the images that a network makes, and its number of classes."""
    config = unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    channels, size, _ = shape if parts is None else parts.codec.pixel_shape(shape)
    classes = config.num_class_embeds if parts is None else parts.num_classes
    return {"channels": channels, "image_size": size, "num_classes": classes}
