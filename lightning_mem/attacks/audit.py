"""Several attacks on one target, by one configuration."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.conditions import Captions
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.records import Record, digest, read_records, write_records


class Audit(AbstractAttack):
    """Every attack of a list on one target; each leaves what it leaves alone, in a folder of its own.

    All are checked against the target before the first one starts. A second run draws nothing again, and an attack
    whose records are there is not run again. No attack sees what another one read: those that draw do so before *they*
    read the training images.

    Args:
        attacks: By class_path; at least one.

    Raises:
        ValueError: If there is no attack, two are the same, or one does not fit the target (it says what is missing).
    """

    name = "audit"

    def __init__(self, attacks: list[AbstractAttack]) -> None:
        if not attacks:
            raise ValueError("attacks must name at least one attack, got none")
        self.attacks = attacks
        self.threat_model = "\n".join(attack.threat_model for attack in attacks)
        self._folders: list[str] = []
        self._counts: list[int] = []

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """Every attack's; see :class:`AbstractAttack`."""
        for attack in self.attacks:
            attack.prepare(target, captions)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of the attacks' own; see :class:`AbstractAttack`."""
        self._folders = [f"{attack.name}-{attack.identity(target, path, home)}" for attack in self.attacks]
        if len(set(self._folders)) < len(self._folders):
            raise ValueError(f"attacks must differ, got {', '.join(self._folders)}")
        return digest(self._folders)

    def run(self, scene: Scene) -> list[Record]:
        """One attack after the other; see :class:`AbstractAttack`."""
        read: list[Reference] = []

        def once() -> Reference:
            if not read:
                read.append(scene.read())
            return read[0]

        records: list[Record] = []
        self._counts = []
        for attack, name in zip(self.attacks, self._folders, strict=True):
            file = scene.folder / name / "results.jsonl"
            found = read_records(file)
            scene.first(lambda: None)  # all have looked before the first one writes
            if not found:
                found = attack.run(replace(scene, folder=file.parent, read=once, _read=[]))
                scene.first(lambda file=file, found=found: write_records(file, found))  # type: ignore[misc]
            records += found
            self._counts.append(len(found))
        return records

    def table(self, records: Sequence[Record]) -> Table:
        """The attacks' tables, one below the other."""
        whole, first = Table.grid(), 0
        for attack, count in zip(self.attacks, self._counts, strict=True):
            whole.add_row(attack.table(records[first : first + count]))
            first += count
        return whole
