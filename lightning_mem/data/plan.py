"""The plan: a table of runs, some of which build on others, and how far each of them is."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mem.records import atomic_write

State = Literal["planned", "running", "done", "failed"]
"""``planned``: nothing to show, or stopped on the way; ``running``: a process trains it; ``done``; ``failed``: its
process ended with an error, which ``reason`` repeats."""

Verb = Literal["fit", "attack", "attribute"]
"""What a row runs: a training into a run folder, or an attack or attribution on one, whose results have a folder of
their own."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, the second over the first; lists are replaced as a whole, as on the command line."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True)
class Row:
    """One run of a plan.

    Args:
        name: Of its folder: letters, digits, ``.``, ``_`` and ``-``.
        seed: Of network, training and data draw alike.
        num_members: How many images are drawn; null with ``members``.
        members: File of source indices, as for ``data.members``; null with ``num_members``.
        overrides: Further settings of its verb, nested as in a YAML file.
        verb: See :data:`Verb`. An attack or attribution reads its settings over the configuration of the first row it
            needs.
        needs: Names of rows that must be done before: its settings name their folders. Such a row may leave out
            num_members and members: the recipe, or what it builds on, says them.
        kind: A word of the study's own, by which it tells its rows apart.

    Raises:
        ValueError: If the name cannot be a folder's, not exactly one of num_members and members is given, or an attack
            or attribution needs no row or names members.
    """

    name: str
    seed: int = 0
    num_members: int | None = None
    members: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    verb: Verb = "fit"
    needs: Sequence[str] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", tuple(self.needs))
        if not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise ValueError(f"a row's name holds letters, digits, '.', '_' and '-', got {self.name!r}")
        given = [part for part in (self.num_members, self.members) if part is not None]
        if len(given) > 1 or not (given or self.needs):
            raise ValueError(
                f"row {self.name} needs num_members or members, one of them, got {self.num_members} and {self.members}"
            )
        if self.verb != "fit" and (given or not self.needs):
            raise ValueError(
                f"row {self.name} is no training ({self.verb}): it needs the row that it acts on, which has the "
                f"members, got needs {list(self.needs)}, num_members {self.num_members} and members {self.members}"
            )

    def settings(self, folder: str | Path) -> dict[str, Any]:
        """What the row lays over its recipe, nested as in a YAML file of its verb.

        Args:
            folder: Where run folders go; this row's is ``folder/name``.
        """
        place = str(Path(folder) / self.name)
        own: dict[str, Any] = {"seed_everything": self.seed}
        if self.verb != "fit":
            return merge(self.overrides, {**own, "out": place})
        own["data"] = {"seed": self.seed}
        if self.num_members is not None or self.members is not None:
            own["data"] |= {"num_members": self.num_members, "members": self.members}
        return merge(self.overrides, {**own, "trainer": {"default_root_dir": place}})


@dataclass(frozen=True)
class Entry:
    """A row and its state: one line of ``plan.jsonl``.

    Args:
        row: What is run.
        digest: Of every setting that decides its numbers; empty until it is known.
        state: See :data:`State`.
        folder: The run folder: the row's own, or the one that was reused.
        data_digest: Of members and held-out images; empty until it is known.
        reason: Why it failed, in one line.
        seconds: What its processes took so far, together; 0 for a reused one.
    """

    row: Row
    digest: str = ""
    state: State = "planned"
    folder: str = ""
    data_digest: str = ""
    reason: str = ""
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line of JSON; the row's fields stand beside the others."""
        return json.dumps({**asdict(self.row), **{k: v for k, v in asdict(self).items() if k != "row"}})

    @classmethod
    def from_json(cls, line: str) -> "Entry":
        """The entry of one line.

        Raises:
            ValueError: If the line is not JSON, lacks the name, or names an unknown state.
        """
        found = json.loads(line)
        if not isinstance(found, dict) or "name" not in found:
            raise ValueError(f"a line of a plan is a JSON object with a name, got {line[:40]!r}")
        if found.get("state", "planned") not in get_args(State):
            raise ValueError(f"state must be one of {', '.join(get_args(State))}, got {found['state']!r}")
        own = {f.name for f in fields(cls)} - {"row"}
        row = Row(**{f.name: found[f.name] for f in fields(Row) if f.name in found})
        return cls(row, **{key: value for key, value in found.items() if key in own})


class Plan:
    """The entries of a study's folder, kept in ``plan.jsonl``.

    The file is replaced in one move at every change, so a reader or a crash never sees half of it.

    Args:
        folder: Of the study.
        rows: What the study consists of now; states of rows with the same name are read from the file. Rows that the
            study no longer names leave the plan; their run folders stay.

    Raises:
        ValueError: If there is no row, two share a name, one needs a row that does not stand before it, or the file
            cannot be read (it names the line).
    """

    def __init__(self, folder: str | Path, rows: Iterable[Row]) -> None:
        self.folder = Path(folder)
        known = {entry.row.name: entry for entry in read_plan(self.path)}
        self._entries: dict[str, Entry] = {}
        for row in rows:
            if row.name in self._entries:
                raise ValueError(f"two rows are called {row.name}: names are folders and must differ")
            missing = [name for name in row.needs if name not in self._entries]
            if missing:
                raise ValueError(f"row {row.name} needs {', '.join(missing)}: rows that it builds on stand before it")
            self._entries[row.name] = replace(known.get(row.name, Entry(row)), row=row)
        if not self._entries:
            raise ValueError("the plan has no rows: give the study at least one size and one seed")

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "plan.jsonl"

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def update(self, name: str, **changes: Any) -> Entry:
        """Change one entry, in memory; :meth:`save` writes."""
        self._entries[name] = replace(self._entries[name], **changes)
        return self._entries[name]

    def save(self) -> None:
        """Write the file."""
        with atomic_write(self.path) as file:
            file.writelines(entry.to_json() + "\n" for entry in self)


def read_plan(path: str | Path) -> list[Entry]:
    """All entries of a ``plan.jsonl``; an absent file has none.

    Raises:
        ValueError: If a line cannot be read; it names file and line.
    """
    path = Path(path)
    entries = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        if line.strip():
            try:
                entries.append(Entry.from_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return entries


@contextmanager
def claimed(folder: str | Path) -> Iterator[int]:
    """Hold a study's folder alone, until the block ends or the process does.

    Yields:
        The descriptor of the lock. A child process that inherits it holds the folder too, so a training that outlives
        a killed study keeps the next one out.

    Raises:
        ValueError: If another process holds it; it says which.
    """
    path = Path(folder) / "plan.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is being worked on by {holder}, or by a training it started: wait for it, or stop it first"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file.fileno()
