"""The scene that attacks and attributions act on, which shows training images only once scoring begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, ScoreTerm, Target
from lightning_mem.diffusion.additions import Judge
from lightning_mem.evaluation.ledger import read_ledger
from lightning_mem.evaluation.numbers import Number
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.rejection import Accepted, rejection_into, rejection_settings
from lightning_mem.evaluation.workers import Workers
from lightning_mem.records import Record
from lightning_mem.types import SampleSet


class DrawBlocks(Protocol):
    """Draws a range of addresses with all processes, in blocks that survive a stop; every process gets the set."""

    def __call__(
        self, file: Path, first: int, count: int, settings: dict[str, Any], guidance: Sequence[ScoreTerm]
    ) -> SampleSet:
        """Samples ``first`` .. ``first + count - 1``, kept in ``file``; read from there where they are."""


@dataclass(frozen=True)
class Scene:
    """What an attack acts on, and all it may ask for.

    Args:
        target: The model.
        home: Run folder of the target.
        folder: Of the attack's results.
        blocks: Draws samples.
        read: Reads the training images and the held-out control; called once, by :meth:`reference`.
        workers: How scoring is dealt out to processes.
        first: Calls a function on the first process while the others wait.
        step: Optimizer steps of the target.
        config_digest: Of the target's run.
    """

    target: Target
    home: Path
    folder: Path
    blocks: DrawBlocks
    read: Callable[[], Reference]
    workers: Workers = field(default_factory=Workers)
    first: Callable[[Callable[[], None]], None] = lambda work: work()
    step: int = 0
    config_digest: str = ""
    _read: list[Reference] = field(default_factory=list)

    def draw(
        self,
        name: str,
        num_samples: int,
        *,
        seed: int,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        guidance: Sequence[ScoreTerm] = (),
        first: int = 0,
    ) -> SampleSet:
        """Samples of the target; kept in ``samples/<name>.npz``, continued where they stopped.

        Args:
            name: Of the file.
            num_samples: How many.
            seed: Of starting noise and labels.
            num_steps: Sampler steps.
            sampler: See :func:`lightning_mem.diffusion.sample`.
            eta: See there.
            guidance: Score terms with ``settings``.
            first: Address of the first sample.

        Raises:
            RuntimeError: If the training images were read already: what is drawn then could depend on them.
        """
        if self._read:
            raise RuntimeError("the training images were read already: an attack draws all its samples before scoring")
        settings = {
            "sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed,
            "target": self.target.digest,
        }  # fmt: skip
        return self.blocks(self.folder / "samples" / f"{name}.npz", first, num_samples, settings, guidance)

    def draw_accepted(
        self,
        name: str,
        num_samples: int,
        judge: Judge,
        *,
        seed: int,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        guidance: Sequence[ScoreTerm] = (),
        max_tries: int = 100,
    ) -> Accepted:
        """Samples that a judge accepts, each drawn again from fresh noise until it does.

        The first try is the draw ``<name>_first``; the result is kept in ``samples/<name>.npz``, and which samples
        were accepted after how many draws in ``samples/<name>_tries.csv``.

        Args:
            name: Of the file.
            num_samples: How many.
            judge: Of an addition: which samples may leave.
            seed: As for :meth:`draw`.
            num_steps: Sampler steps.
            sampler: See :func:`lightning_mem.diffusion.sample`.
            eta: See there.
            guidance: Score terms with ``settings``.
            max_tries: Draws an address may take, at least 1; where none is accepted, the last one stays.

        Raises:
            RuntimeError: If the training images were read already.
        """
        rejection_settings(guidance, judge, max_tries)  # refuses before anything is drawn
        options: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "eta": eta}
        first = self.draw(f"{name}_first", num_samples, seed=seed, guidance=guidance, **options)
        return rejection_into(
            self.folder / "samples" / f"{name}.npz", first, self.target, judge, seed=seed, max_tries=max_tries,
            guidance=guidance, workers=self.workers, on_the_first=self.first, **options,
        )  # fmt: skip

    def record(self, prefix: str, number: Number, *, seed: int, data_digest: str = "", seconds: float = 0.0) -> Record:
        """A number of this attack as it is recorded, with the target's step, weights and run.

        Args:
            prefix: Put before its name, such as ``attack/loss/``.
            number: What was measured.
            seed: Of the draw.
            data_digest: Of the images that it was measured against.
            seconds: What measuring took.
        """
        low, high = (None, None) if number.interval is None else map(float, number.interval)
        return Record(
            prefix + number.name, number.value, number.n, self.step, low, high, self.target.weights, seed, number.unit,
            round(seconds, 3), number.definition, data_digest, self.config_digest, self.home.name,
        )  # fmt: skip

    def ledger(self) -> list[dict[str, str]]:
        """What the run's ledger says of this target: a row a training image that was copied."""
        here = str(self.step), self.target.weights
        return [row for row in read_ledger(self.home / "ledger.csv") if (row["step"], row["weights"]) == here]

    def reference(self) -> Reference:
        """The training images and the held-out control: scoring begins."""
        if not self._read:
            self._read.append(self.read())
        return self._read[0]


class Act(Protocol):
    """What is done on a scene, an attack or an attribution; see :class:`lightning_mem.attacks.AbstractAttack`."""

    name: str

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of everything that decides the result; names the folder of the results."""

    def run(self, scene: Scene) -> list[Record]:
        """Draw what is needed, then score; every process gets the records."""

    def table(self, records: Sequence[Record]) -> Table:
        """The records on the screen."""
