"""What attacks share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from lightning_mem.attacks.conditions import Captions
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.evaluation.table import records_table
from lightning_mem.records import Record


class AbstractAttack(ABC):
    """An attack: says what it assumes, draws what it needs, then scores.

    Attributes:
        name: Short, as in the logged keys ``attack/<name>/...``.
        threat_model: What the attacker knows and may do, in a sentence; printed before anything is drawn.
    """

    name: str
    threat_model: str

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:  # noqa: B027  most need none
        """Take the captions of the data, before anything is drawn; called before :meth:`identity`.

        Args:
            target: What will be attacked.
            captions: Reads those of members and held-out images; null where the data have none.

        Raises:
            ValueError: If captions are needed, and there are none, or one is missing.
        """

    @abstractmethod
    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of everything that decides the result; names the folder of the results.

        Args:
            target: What will be attacked.
            path: Where it came from: a checkpoint or a diffusers folder.
            home: Its run folder.

        Raises:
            ValueError: If something the attack was given does not fit the target.
        """

    @abstractmethod
    def run(self, scene: Scene) -> list[Record]:
        """Attack; every process gets the records.

        Tables and pictures go into ``scene.folder``; the records are written by the caller.
        """

    def table(self, records: Sequence[Record]) -> Table:
        """The records on the screen."""
        return records_table(records, f"attack {self.name}")
