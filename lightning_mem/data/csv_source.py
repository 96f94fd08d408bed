"""A CSV file that names image files, their captions and their labels, as a source."""

import csv
from functools import cached_property
from pathlib import Path

import numpy as np

from lightning_mem.data.folder import read_image
from lightning_mem.data.sources import AbstractSource, fit_image

FILE, CAPTION, LABEL = "file", "caption", "label"
"""Columns that are read; others are ignored."""


class CSVSource(AbstractSource):
    """The image files that a CSV names, in its order, with their captions and labels where it has them.

    Args:
        path: A ``.csv`` in UTF-8 with a header: ``file`` (relative to the folder of the CSV, or absolute; each file
            once), and optionally ``caption`` and ``label`` (an integer, 0 or more: the number that a class-conditional
            model knows the class by). Which image files are legal: :class:`FolderSource`.
    """

    def __init__(self, path: str) -> None:
        if Path(path).suffix.lower() != ".csv":
            raise ValueError(f"path must name a .csv file, got {path!r}")
        self.path = path

    @property
    def name(self) -> str:
        """``csv:<file name>``."""
        return f"csv:{Path(self.path).name}"

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        """The rows by column, checked: each names a file that is there, and no two the same."""
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"there is no file {self.path}: give the path of a .csv that names images")
        try:
            with Path(self.path).open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                columns = reader.fieldnames or []
                rows = [{key: (row[key] or "").strip() for key in columns} for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} cannot be read as CSV in UTF-8 ({error}): write it again") from error
        if FILE not in columns:
            raise ValueError(f"{self.path} must have a column {FILE}, got {', '.join(columns) or 'no header'}")
        if not rows:
            raise ValueError(f"{self.path} names no image: below its header it has no row")
        first: dict[Path, int] = {}
        for number, row in enumerate(rows):
            path = self._path(row)
            if not row[FILE] or not path.is_file():
                raise ValueError(
                    f"{self.path}, {_row(number)}: there is no file {row[FILE]!r} in {Path(self.path).parent.resolve()}"
                )
            if path in first:
                raise ValueError(
                    f"{self.path} names {row[FILE]} in {_row(first[path])} and {_row(number)}: an image has one row "
                    "and one caption"
                )
            first[path] = number
        return rows

    def _path(self, row: dict[str, str]) -> Path:
        return Path(self.path).parent / row[FILE]

    def path_of(self, index: int) -> Path:
        """The file that image ``index`` is read from."""
        return self._path(self._rows[self._checked(index)])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`."""
        return fit_image(read_image(self.path_of(index)), image_size, channels)

    @property
    def num_classes(self) -> int | None:
        """Largest label plus one; None without labels."""
        labels = self.labels()
        return None if labels is None else int(labels.max()) + 1

    def labels(self) -> np.ndarray | None:
        """The column ``label``, int64 [N]; None when there is none.

        Raises:
            ValueError: If one is no integer of 0 or more; it names the row.
        """
        if LABEL not in self._rows[0]:
            return None
        for number, row in enumerate(self._rows):
            if not row[LABEL].isdecimal():
                raise ValueError(f"{self.path}, {_row(number)}: a label is 0, 1, ..., got {row[LABEL]!r}")
        return np.array([int(row[LABEL]) for row in self._rows], dtype=np.int64)

    def captions(self) -> list[str] | None:
        """The column ``caption``; None when there is none.

        Raises:
            ValueError: If one is empty; it says how many, and names the first file and row.
        """
        if CAPTION not in self._rows[0]:
            return None
        missing = [number for number, row in enumerate(self._rows) if not row[CAPTION]]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self)} captions of {self.path} are missing, the first in {_row(missing[0])} "
                f"({self._rows[missing[0]][FILE]}): write them, or take these rows out"
            )
        return [row[CAPTION] for row in self._rows]

    def describe(self) -> str:
        """One line: the file, how many images, how many labels, whether there are captions."""
        return f"{super().describe()}, {'with' if CAPTION in self._rows[0] else 'no'} captions"


def _row(number: int) -> str:
    return f"row {number + 1}"
