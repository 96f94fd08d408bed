"""The curve of a run that is over: its checkpoints sampled and measured in turn; continues where it stopped."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation.curves import draw_curves
from lightning_mem.evaluation.draw import draw_samples
from lightning_mem.evaluation.evaluate import Source, measure_source
from lightning_mem.evaluation.measure import Measure
from lightning_mem.modules import load_target, read_checkpoint
from lightning_mem.modules.base import META
from lightning_mem.records import Record, read_records
from lightning_mem.types import Weights


@dataclass(frozen=True)
class Draw:
    """How each checkpoint is sampled.

    Args:
        num_samples: How many, at least 1.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        seed: Of noise and labels.
        weights: ``ema`` takes averaged weights where there are any, ``raw`` the optimizer's own.
    """

    num_samples: int = 512
    num_steps: int = 50
    sampler: Sampler = "ddim"
    eta: float = 0.0
    seed: int = 0
    weights: Weights = "ema"

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Checkpoint:
    """One file and what it says of itself.

    Args:
        path: The file.
        step: Optimizer steps.
        members_digest: Of the images it was trained on; empty where it does not know.
    """

    path: Path
    step: int
    members_digest: str


def find_checkpoints(pattern: str) -> list[Checkpoint]:
    """The checkpoints of a glob in order of steps; of two at one step the first by name.

    Raises:
        ValueError: If there are none, or a file is not a checkpoint of ours.
    """
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(
            f"no file matches --checkpoints {pattern!r}: quote the pattern, e.g. 'runs/digits/checkpoints/*'"
        )
    by_step: dict[int, Checkpoint] = {}
    for path in paths:
        meta = read_checkpoint(path).get(META)
        if meta is None:
            raise ValueError(f"{path} is no checkpoint of this program: narrow the pattern")
        by_step.setdefault(int(meta["step"]), Checkpoint(path, int(meta["step"]), str(meta["members_digest"])))
    return [by_step[step] for step in sorted(by_step)]


def check_trained_on(checkpoints: Sequence[Checkpoint], members_digest: str) -> None:
    """Refuse checkpoints that were trained on other images than those they would be compared with."""
    for checkpoint in checkpoints:
        if checkpoint.members_digest and checkpoint.members_digest != members_digest:
            raise ValueError(
                f"{checkpoint.path} was trained on the member set {checkpoint.members_digest}, but the data options "
                f"lead to {members_digest}: use the run's own config.yaml"
            )


def measure_checkpoints(
    checkpoints: Sequence[Checkpoint], measure: Measure, draw: Draw, out: Path, *, pairs: int = 32
) -> list[list[Record]]:
    """Records of every checkpoint, drawn and measured where ``out/results.jsonl`` does not hold them yet.

    Everything of one checkpoint is written in one move, so a stopped call continues with the next one and ends with
    the same records as one that was never stopped. Draws ``images/curves.png``.
    """
    found = []
    for checkpoint in checkpoints:
        target = load_target(checkpoint.path, draw.weights, str(measure.workers.device))
        settings = {
            "sampler": draw.sampler, "num_steps": draw.num_steps, "eta": draw.eta, "block": BLOCK,
            "sample_seed": draw.seed, "target": target.digest, "measure": measure.digest,
        }  # fmt: skip
        records = _known(out, checkpoint.step, target, {"num_samples": draw.num_samples, **settings})
        if not records:
            samples = draw_samples(
                target,
                draw.num_samples,
                seed=draw.seed,
                num_steps=draw.num_steps,
                sampler=draw.sampler,
                eta=draw.eta,
                workers=measure.workers,
            )
            samples.settings = settings
            name = f"{checkpoint.path.stem} (step {checkpoint.step}, {target.weights})"
            source = Source(samples, name, out, checkpoint.step, generator=checkpoint.path.parent.parent.name)
            records = measure_source(source, measure, pairs).records
        found.append(records)
    draw_curves({out.name: [r for records in found for r in records]}, out / "images" / "curves.png", str(out))
    return found


def _known(out: Path, step: int, target: Target, definition: Mapping[str, Any]) -> list[Record]:
    """Records of this checkpoint under this very definition."""

    def same(record: Record) -> bool:
        return definition.items() <= record.definition.items()

    here = [r for r in read_records(out / "results.jsonl") if r.step == step and r.weights == target.weights]
    own = [record for record in here if same(record)]
    # what depends on the reference alone carries no settings; it is kept with those that do
    return own + [r for r in here if "target" not in r.definition] if own else []
