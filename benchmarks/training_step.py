"""Is our training step as fast as diffusers' own training loop?

Ours is the real path: DenoiserModule, MemorizationTrainer and MemorizationDataModule, with averaging and clipping and
without evaluation. The peer is the loop of diffusers' ``examples/unconditional_image_generation``:
Accelerator, DDPMScheduler.add_noise, mse_loss, clip_grad_norm_, AdamW, cosine schedule, EMAModel, the loss read once a
step. It is given what makes it fast: images that are decoded and normalised already (theirs are opened and transformed
one by one), no progress bar, no tracker. Same network, initial weights, batch size, precision, clipping and EMA decay.

Both live in one process: our Trainer is paused between chunks of steps while the peer takes its own. Warm-up first;
pairs alternate in order (A B, B A, A B ...), so slow drifts of the machine cancel.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mem.callbacks import EMA
from lightning_mem.data import AbstractSource, ArraySource, DigitsSource, MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.metrics import bootstrap_interval
from lightning_mem.modules import DenoiserModule, WarmupCosine
from lightning_mem.networks import UNetConfig
from lightning_mem.records import Record, digest, machine, write_records
from lightning_mem.trainer import MemorizationTrainer
from lightning_mem.types import to_float

ROOT = Path(__file__).resolve().parent.parent
DECAY, CLIP, MEMBERS = 0.995, 1.0, 1024
TURNS = 10  # how often ours and the peer alternate within a pair
ADAMW = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6}
"""The example script's own optimizer, for both."""


def options(description: str, steps: int, steps_help: str) -> argparse.ArgumentParser:
    """Options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=9, help="timings of each side")
    parser.add_argument("--steps", type=int, default=steps, help=steps_help)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for both")
    parser.add_argument("--channels_last", action="store_true", help="channels-last weights, for both")
    parser.add_argument(
        "--network", choices=["digits", "cifar10"], default="digits", help="of configs/NAME/denoiser.yaml"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    if args.pairs < 1 or args.steps < 1 or args.batch_size < 1:
        raise SystemExit(f"--pairs, --steps and --batch_size must be at least 1, got {vars(args)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here; use --device cpu")


def clock(device: str) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(
    name: str, ours: list[float], peer: list[float], images: int, definition: dict[str, Any], out: str
) -> Record:
    """Print the table, write three records (ratio, ours, peer), return the ratio's.

    Args:
        name: Key without its last part.
        ours: Seconds of our timings, in order.
        peer: Seconds of the peer's, paired with ours.
        images: How many images one timing covers.
        definition: What was timed.
        out: Records are added to this file.
    """

    def median(rows: Tensor) -> Tensor:
        return rows.quantile(0.5)

    seconds = {"ours": torch.tensor(ours).double(), "peer": torch.tensor(peer).double()}
    speeds = {side: images / value for side, value in seconds.items()}
    rows = {**speeds, "ratio": speeds["ours"] / speeds["peer"]}
    definition = {
        **definition,
        "pairs": len(ours),
        "threads": torch.get_num_threads(),
        "statistic": "median over pairs of the median turn; ratio = ours / peer, above 1 ours is faster",
        "interval": "percentile bootstrap over pairs 95%" if len(ours) > 1 else "none: one pair",
        "device": machine(),
    }
    table = Table(title=f"{name}: images per second, median of {len(ours)} pairs")
    for column in ("", "median", "low", "high", "all"):
        table.add_column(column, justify="left" if column in ("", "all") else "right")
    records = []
    for side, values in rows.items():
        value = float(median(values))
        ends = bootstrap_interval(median, values) if len(values) > 1 else (None, None)
        unit = "ratio" if side == "ratio" else "images/s"
        records.append(
            Record(
                name=f"{name}/{side}",
                value=value,
                low=ends[0],
                high=ends[1],
                n=len(values),
                step=0,
                unit=unit,
                seconds=round(sum(ours) + sum(peer), 3),
                definition=definition,
            )
        )
        shown = "{:.3f}" if side == "ratio" else "{:,.0f}"
        table.add_row(
            side,
            *("-" if v is None else shown.format(v) for v in (value, *ends)),
            " ".join(shown.format(v) for v in values.tolist()),
        )
    Console(width=120).print(table)
    write_records(out, records)
    print(f"written to {out}")
    return records[-1]


def recipe(name: str) -> tuple[UNetConfig, DiffusionProcess, int, int]:
    """Network, process, image size and channels of a shipped run."""
    config = yaml.safe_load((ROOT / "configs" / name / "denoiser.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]
    return UNetConfig(**model["network"]), DiffusionProcess(**model["process"]), data["image_size"], data["channels"]


def source_of(name: str, folder: str) -> AbstractSource:
    """Digits, or noise in the shape of CIFAR-10: time does not depend on what is in the picture."""
    if name == "digits":
        return DigitsSource()
    path = Path(folder) / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (2 * MEMBERS, 32, 32, 3), dtype=np.uint8))
    return ArraySource(str(path))


class Peer:
    """The training loop of diffusers' unconditional example."""

    def __init__(self, unet: UNet2DModel, images: Tensor, process: DiffusionProcess, args: argparse.Namespace) -> None:
        mixed = "bf16" if args.precision == "bf16-mixed" else "no"
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=args.device == "cpu")
        self.scheduler = DDPMScheduler.from_config(process.config)
        optimizer = torch.optim.AdamW(unet.parameters(), **ADAMW)
        loader = DataLoader(TensorDataset(images), batch_size=args.batch_size, shuffle=True, drop_last=True)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.ema = EMAModel(unet.parameters(), decay=DECAY, model_cls=UNet2DModel, model_config=unet.config)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            unet.train(), optimizer, loader, schedule
        )
        self.ema.to(self.accelerator.device)
        if args.compile:
            self.accelerator.unwrap_model(self.unet).compile()
        self.batches = self._batches()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            for (batch,) in self.loader:
                yield batch

    def run(self, steps: int) -> None:
        """So many optimizer steps."""
        count = self.scheduler.config.num_train_timesteps
        for _ in range(steps):
            x0 = next(self.batches)
            eps = torch.randn(x0.shape, device=x0.device)
            t = torch.randint(0, count, (len(x0),), device=x0.device)
            x_t = self.scheduler.add_noise(x0, eps, t)
            with self.accelerator.accumulate(self.unet):
                output = self.unet(x_t, t).sample
                loss = nn.functional.mse_loss(output.float(), eps.float())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.unet.parameters(), CLIP)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.ema.step(self.unet.parameters())
            self.loss = loss.detach().item()


class TakeTurns(Callback):
    """Times chunks of the Trainer's steps and lets the peer take its own between them.

    A timing of ours runs from one end of a batch to another, so it holds everything that Lightning does for a step.
    Within a pair the two alternate every few steps: the machine's speed drifts over seconds, for both alike.
    """

    def __init__(self, peer: Peer, args: argparse.Namespace, warmup: int) -> None:
        self.peer, self.args, self.warmup = peer, args, warmup
        self.turn = max(args.steps // TURNS, 1)
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._start = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the warm-up, and after each turn of ours: our time, then the peer's turn."""
        done = trainer.global_step - self.warmup
        if done < 0 or done % self.turn:
            return
        now = clock(self.args.device)
        if done == 0:
            self.peer.run(self.warmup)
        else:
            self.ours.append(now - self._start)
            self.peer.run(self.turn)
            self.theirs.append(clock(self.args.device) - now)
        self._start = clock(self.args.device)

    def pairs(self, times: list[float]) -> list[float]:
        """Seconds of a turn in each pair: the median of its turns, so that a hiccup of the machine is no result."""
        each = len(times) // self.args.pairs
        return [statistics.median(times[i * each : (i + 1) * each]) for i in range(self.args.pairs)]


def trainer_of(folder: str, args: argparse.Namespace, max_steps: int, callbacks: list[Callback]) -> MemorizationTrainer:
    """The Trainer as the command line builds it, with averaging and clipping, without evaluation, bar or W&B."""
    return MemorizationTrainer(
        default_root_dir=folder,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        precision=args.precision,
        max_steps=max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        gradient_clip_val=CLIP,
        log_every_n_steps=50,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=DECAY), *callbacks],
    )


def module_of(args: argparse.Namespace, max_steps: int) -> DenoiserModule:
    """Our module with the example's optimizer."""
    network, process, size, channels = recipe(args.network)
    torch.manual_seed(0)
    return DenoiserModule(
        image_size=size,
        channels=channels,
        network=network,
        process=process,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **ADAMW),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 500, 100_000),
        channels_last=args.channels_last,
        compile=args.compile,
        seed=0,
    )


def main(given: list[str] | None = None) -> Record:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = options("Our training step against diffusers' training loop.", 100, "optimizer steps of one timing")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the first timing")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "training_step.jsonl"))
    args = parser.parse_args(given)
    check(args)
    if args.warmup < 1:
        raise SystemExit(f"--warmup must be at least 1, got {args.warmup}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        turn = max(args.steps // TURNS, 1)
        total = args.warmup + args.pairs * (args.steps // turn) * turn
        module = module_of(args, total)
        channels, size, _ = module.shape
        data = MemorizationDataModule(
            source=source_of(args.network, folder),
            num_members=MEMBERS,
            num_heldout=64,
            image_size=size,
            channels=channels,
            batch_size=args.batch_size,
            steps_per_epoch=total,
        )
        data.setup()
        peer = Peer(copy.deepcopy(module.unet), to_float(data.members.images), module.process, args)
        turns = TakeTurns(peer, args, args.warmup)
        trainer_of(f"{folder}/run", args, total, [turns]).fit(module, datamodule=data)
    definition = {
        "peer": "diffusers train_unconditional.py: images decoded before, no bar, no tracker, loss read every step",
        "accelerate": version("accelerate"),
        "network": f"configs/{args.network}",
        "network_digest": digest(peer.accelerator.unwrap_model(peer.unet).config),
        "batch_size": args.batch_size,
        "steps_per_timing": args.steps,
        "turns_per_pair": turns.args.steps // turns.turn,
        "precision": args.precision,
        "compile": args.compile,
        "channels_last": args.channels_last,
        "ema": DECAY,
    }
    images = turns.turn * args.batch_size
    ours, theirs = turns.pairs(turns.ours), turns.pairs(turns.theirs)
    return report("time/training_step", ours, theirs, images, definition, args.out)


if __name__ == "__main__":
    main()
