"""What a study is: rows to run, and what their records say together."""

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jsonargparse.typing import register_type

from lightning_mem.data.plan import Row, merge
from lightning_mem.records import Record

QUIET = {"trainer": {"enable_progress_bar": False, "enable_model_summary": False}}
"""Laid over every row: what a study runs shows no progress of its own."""


class ReadConfig(Protocol):
    """Options of a verb -> its complete configuration; ``ValueError`` where the verb would refuse them."""

    def __call__(self, options: Sequence[str], verb: str = "fit") -> dict[str, Any]:
        """As on the command line; a file may also be its own text."""


class Settings:
    """Settings of ``fit``, nested as in a YAML file; the study's own parser builds none of the classes they name.

    Args:
        values: The mapping.

    Raises:
        ValueError: If it is no mapping.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"settings of fit are a mapping, got {values!r}")
        self.values = dict(values)


register_type(Settings, serializer=lambda settings: settings.values, deserializer=Settings)


@dataclass(frozen=True)
class Run:
    """A finished row.

    Args:
        row: What was asked for.
        folder: Of the run; another study's, when it was reused.
        config: Complete configuration of its verb.
        records: Everything that was measured.
    """

    row: Row
    folder: Path
    config: Mapping[str, Any]
    records: list[Record] = field(repr=False)


class AbstractStudy(ABC):
    """A recipe, the rows it is run at, and the report.

    Args:
        config: Files of the recipe, as ``fit --config`` takes them; later ones lie over earlier ones.
        overrides: Further settings of ``fit`` for every row, nested as in a YAML file.

    Raises:
        ValueError: If there is no file, or one does not exist.
    """

    def __init__(self, config: list[str], overrides: Settings | None = None) -> None:
        missing = [file for file in config if not Path(file).is_file()]
        if missing or not config:
            raise ValueError(f"config must name at least one file of fit, and all must exist; missing: {missing}")
        self.config = config
        self.overrides = {} if overrides is None else overrides.values
        self._aside: Path | None = None

    def files(self, row: Row) -> list[str]:
        """The recipe of a row: files of its verb, later ones over earlier ones."""
        return self.config

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """What lies over the recipe's files for this row.

        Args:
            row: The row.
            folder: Where run folders go; this row's is ``folder/name``.
            needed: Folders of the rows it needs, by their names.
        """
        return merge(merge(QUIET, self.overrides), row.settings(folder))

    def place(self, folder: str | Path) -> Path:
        """Where files go that rows name, such as lists of images: the study's folder.

        Where there is none yet (a dry run makes none), a folder that goes with this object.
        """
        if Path(folder).is_dir():
            return Path(folder)
        if self._aside is None:
            self._aside = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._aside, ignore_errors=True)
        return self._aside

    @abstractmethod
    def rows(self) -> list[Row]:
        """Every run the study needs, the most telling first: a stopped study reports what it has.

        A row stands after those it needs.
        """

    @abstractmethod
    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool the finished runs.

        Args:
            runs: At least one; not necessarily all.
            folder: Where pictures and tables go.

        Returns:
            One record per claim.
        """
