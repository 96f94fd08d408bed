"""Draw one set of samples, feed it to every metric: as a plain function, and as a callback during training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm import tqdm

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target, sample
from lightning_mem.metrics import (
    AbstractExtractor,
    build_extractor,
    duplicate_groups,
    frechet_distance_from_features,
    jackknife_interval,
    memorized,
    nearest_neighbors,
    normalized_l2,
    wilson_interval,
)
from lightning_mem.randomness import derive_seed, generator
from lightning_mem.records import Record, digest, write_records
from lightning_mem.types import SampleSet, Weights

NEIGHBORS = 50
"""Neighbours of the normalized L2 (Carlini et al.); fewer where a bank is smaller."""

INTERVAL_DIM = 512
"""Fréchet intervals (20 solves each) are given up to this feature size; above it they would outlast the sampling."""

Number = tuple[str, float | None, tuple[float, float] | None, int, str, dict[str, Any]]
"""Name, value, interval, n, unit and definition: what a record is made of."""

Gather = Callable[[Tensor], Tensor]
"""Collects [...] of every process as [world, ...]."""


@dataclass(frozen=True)
class Workers:
    """How the rows of one measurement are dealt out; by default this process does all.

    Args:
        rank: This process.
        world_size: Number of processes.
        gather: Collects one tensor of every process as [world, ...].
        pause: Called between blocks; may raise to stop at a clean point.
        device: Where features, neighbours and statistics are computed.
    """

    rank: int = 0
    world_size: int = 1
    gather: Gather = lambda rows: rows[None]
    pause: Callable[[], None] = lambda: None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def in_blocks(
        self, count: int, compute: Callable[[Tensor], Tensor], block: int = BLOCK, label: str | None = None
    ) -> Tensor:
        """Rows 0 .. count-1 computed in blocks of one shape, dealt out, and put together in order.

        The result does not depend on the number of processes: every process computes as many blocks as the others
        (collectives meet) and what was computed twice is dropped by its place.
        """
        blocks = torch.arange(-(-count // block) * block).clamp(max=count - 1).split(block)
        rounds = -(-len(blocks) // self.world_size)
        own = []
        # a bar where someone is looking and waits
        hidden = None if label is not None and self.rank == 0 and rounds > 1 else True
        for turn in tqdm(range(rounds), label, leave=False, disable=hidden):
            self.pause()
            own.append(compute(blocks[(self.rank + turn * self.world_size) % len(blocks)]))
        found = self.gather(torch.stack(own))  # [world, rounds, block, ...]
        return found.transpose(0, 1).flatten(0, 2)[:count]


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with.

    Args:
        members: uint8 [M, C, H, W]: what was trained on (both orientations where training flips).
        heldout: uint8 [H, C, H, W]: same source, never trained on; may be empty.
        owners: int64 [M]: the image that each row of ``members`` shows (its place in the member list).
        indices: int64: place of each member in its source, for the ledger.
        mirror: Mirror images count as one image.
        members_digest: Of the member set.
        heldout_digest: Of the held-out set.
        seed: Of the addressed draws that cut the larger bank.
    """

    members: Tensor
    heldout: Tensor
    owners: Tensor
    indices: Tensor
    mirror: bool = False
    members_digest: str = ""
    heldout_digest: str = ""
    seed: int = 0

    @classmethod
    def from_images(cls, members: Tensor, heldout: Tensor | None = None) -> "Reference":
        """A reference from two stacks of uint8 images [N, C, H, W].

        Args:
            members: What the model was trained on.
            heldout: Images of the same kind that it never saw; without them there is no control.
        """
        held = heldout if heldout is not None else members[:0]
        rows = torch.arange(len(members))
        return cls(members, held, rows, rows, members_digest=digest(members), heldout_digest=digest(held))

    @classmethod
    def from_datamodule(cls, data: MemorizationDataModule) -> "Reference":
        """The reference of a run."""
        bank, owners = data.bank()
        return cls(
            members=bank,
            heldout=data.heldout_bank(),
            owners=owners,
            indices=data.members.indices,
            mirror=data.flip,
            members_digest=data.members.digest,
            heldout_digest=data.heldout.digest,
            seed=data.seed,
        )

    def cut(self, bank: Tensor, name: str) -> Tensor:
        """Rows of ``bank`` in an addressed draw that makes both banks equally large, ascending."""
        size = min(len(self.members), len(self.heldout)) if len(self.heldout) else len(bank)
        if size >= len(bank):
            return torch.arange(len(bank))
        return torch.randperm(len(bank), generator=generator(self.seed, "bank", name))[:size].sort().values


@dataclass
class Measurement:
    """What one set of samples gave.

    Args:
        records: Every number, with its interval and definition.
        distances: float32 [N, 2], plain L2 to the nearest and second nearest member groups.
        nearest: int64 [N], row of the nearest member in the reference's bank.
        memorized: bool [N].
    """

    records: list[Record]
    distances: Tensor
    nearest: Tensor
    memorized: Tensor

    def values(self) -> dict[str, float]:
        """Logged keys and numbers; interval ends as ``<key>_low`` and ``<key>_high``."""
        found: dict[str, float] = {}
        for record in self.records:
            parts = {"": record.value, "_low": record.low, "_high": record.high}
            found |= {record.name + end: value for end, value in parts.items() if value is not None}
        return found


class Measure:
    """Every metric on a set of samples against one reference; what depends on the reference alone is kept.

    Args:
        reference: Members and held-out images.
        extractors: Names for the Fréchet distance: ``pixels``, ``inception``, ``inception-64``, ``timm/<model>``.
        extractor_weights: Local weight file per extractor name.
        threshold: Of the memorization ratio, in (0, 1).
        workers: How the work is dealt out.
    """

    def __init__(
        self,
        reference: Reference,
        extractors: Sequence[str] = ("pixels",),
        extractor_weights: dict[str, str] | None = None,
        threshold: float = 1 / 3,
        workers: Workers | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.reference, self.threshold = reference, threshold
        self.workers = workers or Workers()
        device = self.workers.device
        paths = extractor_weights or {}
        self.extractors: list[AbstractExtractor] = [
            build_extractor(name, paths.get(name), device=device) for name in extractors
        ]
        self._groups = {
            "members": duplicate_groups(reference.members, mirror=reference.mirror),
            "heldout": duplicate_groups(reference.heldout, mirror=reference.mirror),
        }
        self._features: dict[tuple[str, str], Tensor] = {}
        self._floors: dict[str, float] = {}
        self._unseen: list[Number] | None = None

    def __call__(
        self,
        samples: SampleSet,
        *,
        step: int = 0,
        prefix: str = "",
        config_digest: str = "",
        run: str = "",
        seed: int = 0,
    ) -> Measurement:
        """Measure.

        Args:
            samples: The generated images.
            step: Optimizer steps of the network they came from.
            prefix: Put before every key (``raw/``).
            config_digest: Of the run.
            run: Name of the run folder.
            seed: Seed of the draw.

        Raises:
            ValueError: If shapes do not fit, or a bank has fewer than two different images.
        """
        start = time.perf_counter()
        reference = self.reference
        if samples.images.shape[1:] != reference.members.shape[1:]:
            raise ValueError(
                f"samples are {tuple(samples.images.shape[1:])}, "
                f"the training images {tuple(reference.members.shape[1:])}"
            )
        common = {"num_samples": len(samples), **samples.settings}
        numbers: list[Number] = []
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for bank in ("members", "heldout"):
            ending = "" if bank == "members" else "_heldout"
            definition = {**common, **self._bank_definition(bank)}
            rule = {**definition, "threshold": self.threshold, "distance": "l2 uint8", "interval": "wilson 95%"}
            if not self._has_ratio(bank):
                numbers.append((f"memorization/ratio{ending}", None, None, 0, "fraction", rule))
                continue
            found[bank] = self._neighbors(samples.images, bank)
            hits = int(memorized(found[bank][0], self.threshold).sum())
            n, ends = len(samples), wilson_interval(hits, len(samples))
            numbers.append((f"memorization/ratio{ending}", hits / n, ends, n, "fraction", rule))
            numbers += self._equal_banks(samples.images, bank, ending, definition)
        if self._unseen is None:  # what the rules say on real images that were never trained on: measured once
            self._unseen = self._measure_unseen()
        numbers += self._unseen
        for extractor in self.extractors:
            numbers += self._frechet(samples.images, extractor, common)
        digests = {"heldout": reference.heldout_digest, "members": reference.members_digest}
        seconds = time.perf_counter() - start
        records = [
            Record(
                name=prefix + name,
                value=value,
                low=None if ends is None else float(ends[0]),
                high=None if ends is None else float(ends[1]),
                n=n,
                step=step,
                weights=samples.weights,
                seed=seed,
                unit=unit,
                seconds=round(seconds, 3),
                definition=definition,
                data_digest=digests[definition.get("bank", "members")],
                config_digest=config_digest,
                run=run,
            )
            for name, value, ends, n, unit, definition in numbers
        ]
        distances, nearest = found["members"]
        return Measurement(records, distances, nearest[:, 0], memorized(distances, self.threshold))

    def _has_ratio(self, bank: str) -> bool:
        distinct = len(self._groups[bank].unique())
        if bank == "members" and distinct < 2:
            raise ValueError(f"the memorization ratio needs two different training images, got {distinct}")
        return distinct >= 2

    def _bank_definition(self, bank: str) -> dict[str, Any]:
        groups = "exact duplicates and mirror images" if self.reference.mirror else "exact duplicates"
        size = len(self.reference.members if bank == "members" else self.reference.heldout)
        return {"bank": bank, "bank_size": size, "groups": groups}

    def _neighbors(self, images: Tensor, bank: str, k: int = 2, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(distances [N, k], bank rows [N, k]), dealt out over the processes."""
        stack = self.reference.members if bank == "members" else self.reference.heldout
        groups = self._groups[bank]
        if rows is not None:
            stack, groups = stack[rows], groups[rows]
        device = self.workers.device
        bank_images, bank_groups = stack.to(device), groups.to(device)
        k = min(k, len(bank_groups.unique()))

        def search(places: Tensor) -> Tensor:
            distances, indices = nearest_neighbors(images[places].to(device), bank_images, k, groups=bank_groups)
            return torch.stack([distances.double(), indices.double()], dim=-1)

        both = self.workers.in_blocks(len(images), search, block=4 * BLOCK).cpu()
        indices = both[..., 1].to(torch.int64)
        return both[..., 0].float(), indices if rows is None else rows[indices]

    def _equal_banks(self, images: Tensor, bank: str, ending: str, definition: dict[str, Any]) -> list[Number]:
        """Statistics that depend on the size of the bank, on banks cut to the smaller one."""
        stack = self.reference.members if bank == "members" else self.reference.heldout
        rows = self.reference.cut(stack, bank)
        distances, _ = self._neighbors(images, bank, NEIGHBORS, rows)
        n, k = distances.shape
        cut = {**definition, "bank_size": len(rows)}
        close = int((normalized_l2(distances) < 1).sum())
        nearest = distances[:, 0].double() / math.sqrt(images[0].numel())
        mean, error = nearest.mean().item(), nearest.std().item() / math.sqrt(n)
        return [
            (
                f"memorization/normalized_l2{ending}",
                close / n,
                wilson_interval(close, n),
                n,
                "fraction",
                {**cut, "cut": 1.0, "alpha": 0.5, "neighbors": k, "interval": "wilson 95%"},
            ),
            (
                f"memorization/nearest_mean{ending}",
                mean,
                (mean - 1.96 * error, mean + 1.96 * error),
                n,
                "rms-l2",
                {**cut, "interval": "normal 95%"},
            ),
        ]

    def _measure_unseen(self) -> list[Number]:
        """The rules with held-out images as queries: what they say where nothing can have been copied."""
        if len(self.reference.heldout) == 0:
            return []
        images = self.reference.heldout
        n = len(images)
        definition = {"queries": "heldout images", "num_samples": n, **self._bank_definition("members")}
        distances, _ = self._neighbors(images, "members")
        hits = int(memorized(distances, self.threshold).sum())
        rows = self.reference.cut(self.reference.members, "members")
        wide, _ = self._neighbors(images, "members", NEIGHBORS, rows)
        close = int((normalized_l2(wide) < 1).sum())
        about = {**definition, "bank_size": len(rows), "cut": 1.0, "alpha": 0.5, "neighbors": wide.shape[1]}
        rule = {**definition, "threshold": self.threshold}
        return [
            ("memorization/ratio_unseen", hits / n, wilson_interval(hits, n), n, "fraction", rule),
            ("memorization/normalized_l2_unseen", close / n, wilson_interval(close, n), n, "fraction", about),
        ]

    def _extract(self, images: Tensor, extractor: AbstractExtractor) -> Tensor:
        """float32 [N, d] on the measuring device, dealt out over the processes."""
        device = self.workers.device
        return self.workers.in_blocks(len(images), lambda rows: extractor(images[rows].to(device)))

    def _reference_features(self, bank: str, extractor: AbstractExtractor) -> Tensor:
        key = (bank, extractor.name)
        if key not in self._features:
            images = self.reference.members if bank == "members" else self.reference.heldout
            self._features[key] = self._extract(images, extractor)
        return self._features[key]

    def _frechet(self, images: Tensor, extractor: AbstractExtractor, common: dict[str, Any]) -> list[Number]:
        features = self._extract(images, extractor)
        about = {"extractor": extractor.name, "extractor_digest": extractor.digest, "resize": extractor.resize}
        numbers: list[Number] = []
        for bank, ending in (("members", "train"), ("heldout", "heldout")):
            size = len(self.reference.members if bank == "members" else self.reference.heldout)
            name = f"frechet/{extractor.name}/{ending}"
            definition = {**common, **about, "bank": bank, "bank_size": size}
            if size < 2:
                numbers.append((name, None, None, 0, "squared distance", definition))
                continue
            real = self._reference_features(bank, extractor)
            value = frechet_distance_from_features(features, real)
            interval = None
            if features.shape[1] <= INTERVAL_DIM and len(features) >= 40:
                interval = jackknife_interval(partial(_frechet_of_rows, features=features, real=real), len(features))
                definition["interval"] = "block jackknife 95%"
            numbers.append((name, value, interval, len(features), "squared distance", definition))
            if getattr(extractor, "official", False):
                numbers.append((f"fid/{ending}", value, interval, len(features), "squared distance", definition))
        if len(self.reference.heldout) >= 4:
            numbers.append(self._floor(extractor, about))
        return numbers

    def _floor(self, extractor: AbstractExtractor, about: dict[str, Any]) -> Number:
        """What fresh real images score: one half of the held-out images against the other."""
        name = f"frechet/{extractor.name}/floor"
        real = self._reference_features("heldout", extractor)
        half = len(real) // 2
        if name not in self._floors:
            self._floors[name] = frechet_distance_from_features(real[:half], real[half:])
        definition = {**about, "bank": "heldout", "bank_size": len(real) - half, "queries": "heldout images"}
        return (name, self._floors[name], None, half, "squared distance", definition)


def _frechet_of_rows(rows: Tensor, features: Tensor, real: Tensor) -> float:
    return frechet_distance_from_features(features[rows], real)


def draw_labels(num_classes: int, addresses: Tensor, seed: int) -> Tensor:
    """Uniform labels addressed by sample, int64 [N]."""
    return torch.tensor([derive_seed(seed, "condition", int(a)) % num_classes for a in addresses], dtype=torch.int64)


def draw_samples(
    target: Target,
    num_samples: int,
    *,
    seed: int = 0,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    workers: Workers | None = None,
) -> SampleSet:
    """Samples 0 .. num_samples-1 of a seed, from the same starting noise every time.

    Args:
        target: What to sample.
        num_samples: How many.
        seed: Of noise and labels.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        workers: How blocks are dealt out.
    """
    workers = workers or Workers()
    addresses = torch.arange(num_samples)
    labels = None if target.num_classes is None else draw_labels(target.num_classes, addresses, seed)

    def draw(rows: Tensor) -> Tensor:
        # the rows that pad the last block repeat an address; sample() pads by itself and gives the same pixels
        own = rows.unique()
        condition = None if labels is None else labels[own]
        images = sample(
            target, own, seed=seed, num_steps=num_steps, sampler=sampler, eta=eta, condition=condition, block=BLOCK
        )
        return images[torch.searchsorted(own, rows)].to(workers.device)

    images = workers.in_blocks(num_samples, draw, label="drawing samples").cpu()
    settings = {"sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed}
    return SampleSet(images, addresses, labels, target.weights, settings)


class Listener(Protocol):
    """A callback that wants to see the samples of an evaluation (gallery, ledger)."""

    def on_evaluation(
        self, trainer: Trainer, samples: SampleSet, reference: Reference, measurement: Measurement, step: int
    ) -> None:
        """Called on the first process after the records were written."""


class SampleEvaluation(Callback):
    """Measures memorization, its held-out control and Fréchet distances at Lightning's validations.

    Works in any LightningModule that has ``target()``. Runs before the first validation batch, when an averaging
    callback has its weights swapped in, so the numbers do not depend on the order of the callbacks. Draws every time
    from the same starting noise (a paired curve) and never from a generator that training uses. Cost:
    ``num_samples * num_steps`` network evaluations a time, shared by all processes; printed at the start of ``fit``.

    Args:
        num_samples: Samples of one evaluation.
        num_samples_test: Samples under ``test``; null takes ``num_samples``.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        seed: Of the starting noise and of labels.
        threshold: Of the memorization ratio, in (0, 1); the literature uses 1/3.
        extractors: Feature extractors of the Fréchet distance: ``pixels``, ``inception`` (the original FID network),
            ``inception-64``, or ``timm/<model>``.
        extractor_weights: Local weight file per extractor name; without it weights come from their own address.
        log_spaced: Evaluate at this many log-spaced validations (and the last) instead of every one.
        raw: Also measure the raw weights where there are averaged ones, under ``raw/``; doubles the cost.
        reference: Images to compare with when the run has no MemorizationDataModule (Python only).
    """

    def __init__(
        self,
        num_samples: int = 512,
        num_samples_test: int | None = None,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        threshold: float = 1 / 3,
        extractors: list[str] | None = None,
        extractor_weights: dict[str, str] | None = None,
        log_spaced: int | None = None,
        raw: bool = False,
        reference: Any = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_steps", num_steps), ("log_spaced", log_spaced)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.num_samples, self.num_samples_test = num_samples, num_samples_test
        self.num_steps, self.sampler, self.eta = num_steps, sampler, eta
        self.seed, self.threshold, self.raw = seed, threshold, raw
        self.extractors = ["pixels"] if extractors is None else extractors
        self.extractor_weights = extractor_weights
        self.log_spaced = log_spaced
        self.reference: Reference | None = reference
        self._measure: Measure | None = None
        self._seconds = 0.0
        self._train_start = 0.0
        self._values: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build extractors now: a missing weight file should stop the run before it trains."""
        if stage == "predict":  # drawing samples only
            return
        if not hasattr(pl_module, "target"):
            raise ValueError(f"SampleEvaluation needs a module with target(), {type(pl_module).__name__} has none")
        if self._measure is None:
            reference = self._reference(trainer)
            if len(reference.heldout) == 0:
                rank_zero_warn("no held-out images: the memorization ratio has no control in this run")
            self._measure = Measure(
                reference, self.extractors, self.extractor_weights, self.threshold, self._workers(trainer)
            )

    def _reference(self, trainer: Trainer) -> Reference:
        data = getattr(trainer, "datamodule", None)
        if self.reference is not None:
            return self.reference
        if isinstance(data, MemorizationDataModule):
            return Reference.from_datamodule(data)
        raise ValueError(
            "SampleEvaluation needs images to compare with: a MemorizationDataModule, or "
            "reference=Reference.from_images(members, heldout)"
        )

    def _workers(self, trainer: Trainer) -> Workers:
        def gather(rows: Tensor) -> Tensor:
            found = trainer.strategy.all_gather(rows)
            return found if trainer.world_size > 1 else found[None]

        def pause() -> None:
            stop = bool(trainer.received_sigterm)
            if trainer.world_size > 1:
                flags = trainer.strategy.all_gather(torch.tensor(stop, device=trainer.strategy.root_device))
                stop = bool(flags.any())
            if stop:
                raise SIGTERMException

        return Workers(trainer.global_rank, trainer.world_size, gather, pause, trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The last values: a resumed run's callbacks monitor them until the next evaluation."""
        return {"values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last values."""
        self._values = dict(state_dict["values"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what one evaluation costs."""
        known = {name: torch.tensor(value) for name, value in self._values.items()}
        trainer.callback_metrics.update({k: v for k, v in known.items() if k not in trainer.callback_metrics})
        self._train_start, self._seconds = time.monotonic(), 0.0
        every = trainer.val_check_batch
        calls = self.num_samples * self.num_steps * (2 if self.sampler == "heun" else 1)
        calls *= 2 if self.raw and self._averaging(trainer) is not None else 1
        message = (
            f"one evaluation: {self.num_samples} samples x {self.num_steps} {self.sampler} steps = {calls:,} network "
            f"evaluations in {calls // BLOCK:,} calls of {BLOCK}"
        )
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, MemorizationDataModule) and every and every != float("inf") and self.log_spaced is None:
            # forward and backward of one training image cost about three evaluations
            training = 3 * data.batch_size * int(every)
            message += f", about {calls / (calls + training):.0%} of the network's work at every {every} steps"
        rank_zero_info(message)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this validation is measured."""
        if trainer.sanity_checking:
            return False
        if self.log_spaced is None or trainer.state.fn != "fit":
            return True
        every, last = trainer.val_check_batch, trainer.max_steps
        if not every or every == float("inf") or last < 1:
            raise ValueError("log_spaced needs trainer.max_steps and an integer trainer.val_check_interval")
        number, count = trainer.global_step // int(every), max(last // int(every), 1)
        chosen = {round(math.exp(x)) for x in torch.linspace(0, math.log(count), self.log_spaced).tolist()}
        return number in chosen or number == count

    @staticmethod
    def _averaging(trainer: Trainer) -> WeightAveraging | None:
        found = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
        return found[0] if found else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure before the first batch: every callback's swap has happened by now."""
        if batch_idx == 0 and dataloader_idx == 0 and self.is_due(trainer):
            self._evaluate(trainer, pl_module, self.num_samples)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation, with the full number of samples."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._evaluate(trainer, pl_module, self.num_samples_test or self.num_samples)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> None:
        start = time.monotonic()
        fitting = trainer.state.fn == "fit"
        step = trainer.global_step if fitting else getattr(pl_module, "restored_step", 0)
        averaging = self._averaging(trainer) if fitting else None
        weights: Weights = "ema" if averaging is not None else getattr(pl_module, "restored_weights", "raw")
        values = self._draw_and_measure(trainer, pl_module, num_samples, step, weights, "")
        if self.raw and averaging is not None:
            averaging._swap_models(pl_module)
            try:
                values |= self._draw_and_measure(trainer, pl_module, num_samples, step, "raw", "raw/")
            finally:
                averaging._swap_models(pl_module)
        seconds = time.monotonic() - start
        self._seconds += seconds
        self._values = dict(values)
        values["time/evaluation_seconds"] = seconds
        if fitting:
            values["time/evaluation_share"] = self._seconds / max(time.monotonic() - self._train_start, 1e-9)
        for name, value in values.items():
            shown = name in ("memorization/ratio", "memorization/ratio_heldout")
            # every process holds the same number: nothing to reduce
            pl_module.log(name, value, on_step=False, on_epoch=True, prog_bar=shown, rank_zero_only=False)

    def _draw_and_measure(
        self, trainer: Trainer, pl_module: Any, num_samples: int, step: int, weights: Weights, prefix: str
    ) -> dict[str, float]:
        if self._measure is None:
            raise ValueError("SampleEvaluation was not set up: run it in a Trainer")
        target: Target = pl_module.target()
        target.weights = weights
        with trainer.precision_plugin.forward_context():
            samples = draw_samples(
                target,
                num_samples,
                seed=self.seed,
                num_steps=self.num_steps,
                sampler=self.sampler,
                eta=self.eta,
                workers=self._measure.workers,
            )
        folder = Path(trainer.default_root_dir)
        measurement = self._measure(
            samples,
            step=step,
            prefix=prefix,
            config_digest=getattr(trainer, "config_digest", ""),
            run=folder.name,
            seed=self.seed,
        )
        if trainer.is_global_zero:
            write_records(folder / "results.jsonl", measurement.records)
            samples.save(folder / "samples" / f"{prefix.replace('/', '_')}last.npz")
            for callback in trainer.callbacks:
                if not prefix and hasattr(callback, "on_evaluation"):
                    callback.on_evaluation(trainer, samples, self._measure.reference, measurement, step)
        return measurement.values()
