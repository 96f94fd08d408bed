"""Training of the UNet denoiser, from scratch or from an existing diffusers model."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mem.data.batches import Batch
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.modules.base import META, AbstractModule
from lightning_mem.modules.text_to_image import is_text_to_image, load_text_to_image
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator
from lightning_mem.records import digest
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
        pretrained: A diffusers folder or hub id to start from: network, schedule and prediction are taken from it.
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
        if snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {snr_gamma}")
        if pretrained is not None:
            if network is not None or process is not None:
                raise ValueError("pretrained brings its own network and process: leave both out of the configuration")
            unet, self.process = load_pretrained(pretrained)
            self.unet = unet.train()
            self._check_pretrained(pretrained, image_size, channels, num_classes)
        else:
            self.unet = build_unet(network or UNetConfig(), image_size, channels, num_classes)
            self.process = process or DiffusionProcess()
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.pretrained = pretrained
        self.shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.loss: Loss = loss
        self.snr_gamma = snr_gamma
        self._compile = compile
        self._validation: list[tuple[Tensor, Tensor]] = []

    def _check_pretrained(self, path: str, image_size: int, channels: int, num_classes: int | None) -> None:
        theirs = self.unet.config
        for name, given, own in (
            ("channels", channels, theirs.in_channels),
            ("num_classes", num_classes, theirs.num_class_embeds),
            ("image_size", image_size, theirs.sample_size),
        ):
            if (own is not None and given != own) or (name == "num_classes" and given != own):
                raise ValueError(f"{path} has {name} {own}, but the data give {given}: set the data options to match")

    @classmethod
    def from_diffusers(cls, path: str | Path, **options: Any) -> "DenoiserModule":
        """A module around a diffusers pipeline (folder or hub id); ``options`` as in the constructor."""
        unet, _ = load_pretrained(str(path))
        config = unet.config
        sizes = {"image_size": config.sample_size, "channels": config.in_channels}
        return cls(**{**sizes, "num_classes": config.num_class_embeds, "pretrained": str(path), **options})

    @classmethod
    def from_checkpoint(cls, path: str | Path, weights: Weights = "ema", **options: Any) -> "DenoiserModule":
        """A module with the network of a checkpoint or run folder, to export, fine-tune or look into.

        Args:
            path: ``*.ckpt`` or a run folder.
            weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
            options: As in the constructor, except what the checkpoint knows.
        """
        target = load_target(path, weights)
        channels, size, _ = target.shape
        module = cls(size, channels, target.num_classes, **options)
        module.unet, module.process = target.denoiser.module.train(), target.process
        return module

    def to_diffusers(self, folder: str | Path) -> Path:
        """Write a folder that ``DDIMPipeline.from_pretrained`` and :meth:`from_diffusers` load (safetensors)."""
        scheduler = DDPMScheduler.from_config(self.process.config)
        DDIMPipeline(unet=self.unet, scheduler=scheduler).save_pretrained(str(folder), safe_serialization=True)
        return Path(folder)

    def target(self, weights: Weights = "raw") -> Target:
        """The network as it stands, as the target of any verb; shares the weights, copies nothing.

        Args:
            weights: What to call the weights that are in the network now.
        """
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
        output = self.unet(x_t, t, class_labels=labels).sample
        error = (output.float() - self.process.training_target(x0, eps, t)).square().flatten(1).mean(1)
        return error * loss_weight(self.process, t, self.loss, self.snr_gamma)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean weighted error at timesteps and noise addressed by the step."""
        x0 = batch["image"]
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
        loss = self._loss(batch["image"], eps_rows, t_rows, labels)
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
        }


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
        path: ``*.ckpt`` (read with weights_only=True), a run folder (its ``checkpoints/last.ckpt``), else diffusers.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` the optimizer's own.
        device: Where to put the network.
        cfg_weight: Weight of classifier-free guidance of a text-to-image model; 1 for none.

    Raises:
        ValueError: If the checkpoint is not one of a DenoiserModule, or cannot be read, or cfg_weight is not 1 and the
            model knows no prompts.
    """
    name, path = str(path), Path(path)
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if path.suffix != ".ckpt" and is_text_to_image(name):
        return load_text_to_image(name, device, cfg_weight)
    if cfg_weight != 1:
        raise ValueError(f"cfg_weight {cfg_weight} is for text-to-image models, and {name} is none: leave it at 1")
    if path.suffix != ".ckpt":
        unet, process = load_pretrained(name)
        size, num_classes = unet.config.sample_size, unet.config.num_class_embeds
        shape = (unet.config.in_channels, size, size)
        kind: Weights = "raw"
    else:
        checkpoint = read_checkpoint(path)
        meta = checkpoint.get(META, {})
        if meta.get("module") != DenoiserModule.__name__:
            raise ValueError(f"{path} is a checkpoint of {meta.get('module', 'something else')}, not of DenoiserModule")
        unet = UNet2DModel.from_config(meta["network"])
        averaged = "current_model_state" in checkpoint
        state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
        unet.load_state_dict({name.removeprefix("unet."): value for name, value in state.items()})
        process = DiffusionProcess.from_config(meta["process"])
        shape, num_classes = tuple(meta["shape"]), meta["num_classes"]
        kind = "ema" if averaged and weights == "ema" else "raw"
    unet = unet.to(device).eval()
    return Target(
        denoiser=UNetDenoiser(unet, process.prediction),
        process=process,
        shape=shape,
        num_classes=num_classes,
        weights=kind,
        digest=digest(process.digest, *[value for _, value in sorted(unet.state_dict().items())]),
        device=device,
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
