"""What the LightningModules share: addressed randomness, optimizer factories, and checkpoints that know their data."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.batches import Batch
from lightning_mem.modules.latents import LatentCache
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.types import Weights

META = "lightning_mem"
"""Key of our own part of a checkpoint."""


class _Shared:
    """A factory that copies of the module share: those that jsonargparse makes hold on to the whole program."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class AbstractModule(LightningModule, ABC):
    """Base of the three LightningModules.

    Noise and timesteps of step s are drawn at address (seed, "train", s) for the *global* batch, and each process
    takes its rows; the global generator, which dropout uses, is seeded at (seed, "train", s, rank) before each step.
    So a resumed run equals an uninterrupted one, and two processes see what one would have seen.

    Args:
        optimizer: Optimizer of the trained parameters.
        lr_scheduler: Learning-rate schedule, stepped once per optimizer step; null for none.
        seed: Of the training randomness; null takes the run's ``seed_everything``.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self._optimizer = _Shared(optimizer)
        self._lr_scheduler = None if lr_scheduler is None else _Shared(lr_scheduler)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._first_bad_step: Tensor | None = None
        self._latents: LatentCache | None = None
        self.restored_step = 0
        self.restored_weights: Weights = "raw"

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, if asked for, its schedule, stepped every optimizer step."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    @property
    def _batches_done(self) -> int:
        """Training batches before the current one; the address of its randomness."""
        return max(self.trainer.fit_loop.epoch_loop.total_batch_idx, 0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generator for this step: dropout draws from it."""
        seed = derive_seed(self.seed, "train", self._batches_done, self.global_rank)
        # torch.manual_seed visits every kind of accelerator there is, at each step
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_generator(self) -> torch.Generator:
        """The generator of this step's noise on the training device, the same on every process."""
        return generator(self.seed, "train", self._batches_done, device=self.device)

    def own_rows(self, global_rows: Tensor) -> Tensor:
        """This process's share of rows drawn for the global batch."""
        share = len(global_rows) // self.trainer.world_size
        return global_rows[self.global_rank * share : (self.global_rank + 1) * share]

    def gather_rows(self, parts: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
        """What all processes found for each row of a validation, ascending by row.

        Args:
            parts: Rows int64 [B] and values [B, ...] of each block this process was dealt.
        """
        # blocks have one size (the last is padded by repetition) and each process has equally many: the gather needs
        # no sizes, and rows that were dealt twice fall together
        rows, values = (torch.cat(column) for column in zip(*parts, strict=True))
        places, found = (torch.as_tensor(self.all_gather(part)) for part in (rows, values))
        merged = dict(zip(places.flatten().tolist(), found.reshape(-1, *values.shape[1:]), strict=True))
        return {row: merged[row] for row in sorted(merged)}

    def encoded(self, images: Tensor, source: str, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Images [B, C, H, W] in the space of the denoiser: themselves for pixels; latents are made once an image.

        Args:
            images: Pixels in [-1, 1].
            source: What ``rows`` counts in.
            rows: int64 [B], which image each is.
            mirrored: bool [B], and in which orientation.
        """
        if self._latents is None:
            return images
        return self._latents(images, zip(repeat(source), rows.tolist(), mirrored.tolist(), strict=False))

    def clean(self, batch: Batch) -> Tensor:
        """The batch's images in the space of the denoiser."""
        if self._latents is None:
            return batch["image"]
        return self.encoded(batch["image"], "data", batch["index"], batch["mirrored"])

    def on_fit_end(self) -> None:
        """Let go of latents."""
        if self._latents is not None:
            self._latents.clear()

    @property
    def is_shown(self) -> bool:
        """Whether anyone reads this step's loss: a progress bar, or a logger at its interval. Logging is not free."""
        return self.trainer.progress_bar_callback is not None or self.trainer._logger_connector.should_update_logs

    def watch_loss(self, loss: Tensor) -> None:
        """Remember on the device when the loss first stopped being finite; asking the device waits for it."""
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=loss.device)
        fine = torch.isfinite(loss.detach()) | (self._first_bad_step >= 0)
        self._first_bad_step = torch.where(fine, self._first_bad_step, self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop on a loss that is not finite: at once on a CPU, at the logging interval on a GPU."""
        if self.device.type == "cpu" or self.global_step % max(self.trainer.log_every_n_steps, 1) == 0:
            self.stop_if_not_finite()

    def on_validation_start(self) -> None:
        """A broken network is not measured and becomes no checkpoint."""
        self.stop_if_not_finite()

    def stop_if_not_finite(self) -> None:
        """Raise if a training loss was not finite.

        Raises:
            FloatingPointError: It names the step and the last good checkpoint.
        """
        if self._first_bad_step is None or int(self._first_bad_step) < 0:
            return
        last = os.path.join(self.trainer.default_root_dir, "checkpoints", "last.ckpt")
        good = f"the last good checkpoint is {last}" if os.path.exists(last) else "no checkpoint was written yet"
        raise FloatingPointError(
            f"the loss is not finite since step {int(self._first_bad_step) + 1}; {good}. "
            "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or leave reduced precision."
        )

    @abstractmethod
    def checkpoint_meta(self) -> dict[str, Any]:
        """What rebuilds this module's network without YAML: plain values only."""

    def _datamodule(self) -> MemorizationDataModule | None:
        if self._trainer is None:
            return None
        found = getattr(self.trainer, "datamodule", None)
        return found if isinstance(found, MemorizationDataModule) else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add class, seed, member digest and network configuration."""
        data = self._datamodule()
        checkpoint[META] = {
            "module": type(self).__name__,
            "seed": self.seed,
            "step": self.global_step,
            "members_digest": data.members.digest if data is not None else "",
            "num_members": len(data.members) if data is not None else 0,
            **self.checkpoint_meta(),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another module, or of another member set.

        Raises:
            ValueError: It names both sides.
        """
        meta = checkpoint.get(META)
        if meta is None or meta["module"] != type(self).__name__:
            found = "a foreign checkpoint" if meta is None else f"a checkpoint of {meta['module']}"
            raise ValueError(f"{type(self).__name__} was given {found}: pass one that {type(self).__name__} wrote")
        data = self._datamodule()
        if data is not None and meta["members_digest"] and meta["members_digest"] != data.members.digest:
            raise ValueError(
                f"the checkpoint was trained on the member set {meta['members_digest']} "
                f"({meta['num_members']} images), but this run's members are {data.members.digest} "
                f"({len(data.members)} images): use the data options "
                "of its own config.yaml, or data.members with its members.json"
            )
        self.restored_step = int(meta["step"])
        self.restored_weights = "ema" if "current_model_state" in checkpoint else "raw"
