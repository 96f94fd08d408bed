"""CIFAR-10 and CelebA in the layout torchvision downloads them in, read lazily."""

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_mem.data.folder import read_image
from lightning_mem.data.sources import AbstractSource, fit_image


class CIFAR10Source(AbstractSource):
    """CIFAR-10: 50 000 training and 10 000 test images of 32 x 32, 10 classes.

    The binary version (folder ``cifar-10-batches-bin``) is read when it is there; it is plain bytes and stays on disk.
    Otherwise the python version (``cifar-10-batches-py``), which is pickled: only the published files are opened,
    recognised by their MD5.

    Args:
        root: The folder that holds ``cifar-10-batches-bin`` or ``cifar-10-batches-py``.
        split: ``train``, ``test``, or ``all`` (training images first).
        download: Download the python version with torchvision when neither folder is there (170 MB).
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def __init__(
        self, root: str = "data", split: Literal["train", "test", "all"] = "train", download: bool = False
    ) -> None:
        _check_split(split, ("train", "test", "all"))
        self.root = root
        self.split = split
        self.download = download

    @property
    def name(self) -> str:
        """``cifar10-<split>``."""
        return f"cifar10-{self.split}"

    @property
    def num_classes(self) -> int:
        """10."""
        return 10

    @property
    def _binary(self) -> Path:
        return Path(self.root) / "cifar-10-batches-bin"

    @property
    def _python(self) -> Path:
        return Path(self.root) / "cifar-10-batches-py"

    def prepare(self) -> None:
        """Download the python version when asked to and neither version is there."""
        if self.download and not self._binary.is_dir() and not self._python.is_dir():
            from torchvision.datasets import CIFAR10

            _download(lambda: CIFAR10(self.root, download=True), "CIFAR-10", self.url, self._python)

    @cached_property
    def _parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per file or half: labels [n] and pixels [n, 3, 32, 32], both uint8."""
        if self._binary.is_dir():
            return self._read_binary()
        if self._python.is_dir():
            return self._read_python()
        raise FileNotFoundError(
            f"{self.root} holds neither {self._binary.name} nor {self._python.name}: unpack the binary version from "
            f"{self.url} there, or set download: true"
        )

    def _read_binary(self) -> list[tuple[np.ndarray, np.ndarray]]:
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if self.split in ("train", "all") else []
        names += ["test_batch.bin"] if self.split in ("test", "all") else []
        parts = []
        for name in names:
            path = self._binary / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: unpack the binary version from {self.url} again")
            size = path.stat().st_size
            if size == 0 or size % 3073:
                raise ValueError(
                    f"{path} has {size} bytes, not a multiple of 3073 (1 label, 3072 pixels): it is truncated or not "
                    f"CIFAR-10; unpack the binary version from {self.url} again"
                )
            records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3073)
            if records[:, 0].max() > 9:
                raise ValueError(f"{path} holds the label {records[:, 0].max()}, legal are 0 to 9: it is not CIFAR-10")
            parts.append((np.asarray(records[:, 0]), records[:, 1:].reshape(-1, 3, 32, 32)))
        counts = {name: len(labels) for name, (labels, _) in zip(names, parts, strict=True)}
        if len(set(counts.values())) > 1:  # the published files hold 10 000 each; a cut one shows
            raise ValueError(f"{self._binary} holds files of unequal length {counts}: one is truncated")
        return parts

    def _read_python(self) -> list[tuple[np.ndarray, np.ndarray]]:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import check_integrity

        # Nothing we read may run code, and unpickling can. torchvision's constructor compares the MD5 of every batch
        # (_check_integrity) and of batches.meta (_load_meta) with the published one before it calls pickle.load, and
        # nobody knows how to make another file for a given MD5. Seen in torchvision 0.29; the test with a file that
        # would run code when unpickled holds it there. Here the same is asked first, to name the file.
        published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        wrong = [name for name, md5 in published if not check_integrity(self._python / name, md5)]
        if wrong:
            raise ValueError(
                f"{self._python}: {', '.join(wrong)} missing or not the published file (by MD5), so not unpickled: "
                f"remove the folder and set download: true, or unpack the binary version from {self.url} beside it"
            )
        halves = {"train": (True,), "test": (False,), "all": (True, False)}[self.split]
        parts = []
        with warnings.catch_warnings():
            # the published pickles are of 2009 and spell dtype's flags as integers
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            for train in halves:
                half = CIFAR10(self.root, train=train)
                parts.append((np.asarray(half.targets, dtype=np.uint8), half.data.transpose(0, 3, 1, 2)))
        return parts

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(labels) for labels, _ in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`."""
        part = int(np.searchsorted(self._starts, self._checked(index), side="right")) - 1
        pixels = self._parts[part][1][index - self._starts[part]]
        return fit_image(np.asarray(pixels).transpose(1, 2, 0), image_size, channels)

    def labels(self) -> np.ndarray:
        """Class of each image, int64 [N] in [0, 10)."""
        return np.concatenate([labels for labels, _ in self._parts]).astype(np.int64)


class CelebASource(AbstractSource):
    """CelebA, aligned and cropped: 202 599 faces of 178 x 218 with 40 attributes.

    Read from ``<root>/celeba``: the folder ``img_align_celeba``, ``list_eval_partition.txt`` and, for ``attribute``,
    ``list_attr_celeba.txt``.

    Args:
        root: The folder that holds ``celeba``.
        split: ``train``, ``valid``, ``test`` (by the published partition), or ``all``.
        attribute: The attribute that is the true label (0 without, 1 with it), e.g. ``Smiling``. None: no true labels.
        crop: Side of the square cut from the centre before resizing; null leaves the whole width (178). 140 is what
            the score-based SDE code uses for CelebA 64. The DDIM code cuts 128 x 128 around the point (89, 121),
            12 pixels below the centre: not offered here.
        download: Download with torchvision when files are missing (1.4 GB from Google Drive; needs ``pip install
            gdown``).
    """

    url = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"

    def __init__(
        self,
        root: str = "data",
        split: Literal["train", "valid", "test", "all"] = "train",
        attribute: str | None = None,
        crop: int | None = 140,
        download: bool = False,
    ) -> None:
        _check_split(split, ("train", "valid", "test", "all"))
        if crop is not None and crop < 1:
            raise ValueError(f"crop must be at least 1 pixel, or null for the whole width, got {crop}")
        self.root = root
        self.split = split
        self.attribute = attribute
        self.crop = crop
        self.download = download

    @property
    def name(self) -> str:
        """``celeba-<split>``."""
        return f"celeba-{self.split}"

    @property
    def num_classes(self) -> int | None:
        """2 with an attribute; None without."""
        return None if self.attribute is None else 2

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "celeba"

    @property
    def _needed(self) -> list[Path]:
        names = ["img_align_celeba", "list_eval_partition.txt"]
        return [self._folder / name for name in [*names, *(["list_attr_celeba.txt"] if self.attribute else [])]]

    def prepare(self) -> None:
        """Download when asked to and something is missing."""
        if self.download and not all(path.exists() for path in self._needed):
            from torchvision.datasets import CelebA

            _download(lambda: CelebA(self.root, split="all", download=True), "CelebA", self.url, self._folder)

    @cached_property
    def _files(self) -> list[str]:
        """File names of the split, in the partition's order."""
        missing = [str(path) for path in self._needed if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} missing: put the files from {self.url} into {self._folder} or set download: true"
            )
        wanted = {"train": ("0",), "valid": ("1",), "test": ("2",), "all": ("0", "1", "2")}[self.split]
        path = self._folder / "list_eval_partition.txt"
        files = []
        for number, fields in _rows(path):
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise ValueError(f"{path}, line {number}: {' '.join(fields)!r} is not a file name and 0, 1 or 2")
            if fields[1] in wanted:
                files.append(fields[0])
        if not files:
            raise ValueError(f"{path} lists no image of split {self.split}: the file is truncated")
        images = self._folder / "img_align_celeba"
        present = set(os.listdir(images))
        absent = [file for file in files if file not in present]
        if absent:
            raise ValueError(
                f"{images} lacks {len(absent)} of the {len(files)} images that {path.name} lists, first {absent[0]}: "
                "unpack img_align_celeba.zip again"
            )
        return files

    @cached_property
    def _labels(self) -> np.ndarray:
        files = self._files  # first: says which files are missing
        path = self._folder / "list_attr_celeba.txt"
        rows = _rows(path)
        _, count = next(rows, (1, []))
        _, names = next(rows, (2, []))
        if self.attribute not in names:
            raise ValueError(f"attribute must be one of {', '.join(names)}, got {self.attribute!r} ({path})")
        column = names.index(self.attribute) + 1
        values = {}
        for number, fields in rows:
            if len(fields) != len(names) + 1 or fields[column] not in ("-1", "1"):
                raise ValueError(f"{path}, line {number}: expected a file name and {len(names)} values of -1 or 1")
            values[fields[0]] = int(fields[column] == "1")
        if count != [str(len(values))]:
            raise ValueError(f"{path} announces {' '.join(count)} images and lists {len(values)}: it is truncated")
        absent = [file for file in files if file not in values]
        if absent:
            raise ValueError(f"{path} lacks {len(absent)} images of split {self.split}, first {absent[0]}")
        return np.array([values[file] for file in files], dtype=np.int64)

    def open(self) -> None:
        """Read the partition, and the attributes when one is asked for."""
        len(self)
        self.labels()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One face; see :meth:`AbstractSource.read`."""
        path = self._folder / "img_align_celeba" / self._files[self._checked(index)]
        image = read_image(path)
        if self.crop is not None:
            if self.crop > min(image.size):
                raise ValueError(f"crop must be at most {min(image.size)} for {path}, got {self.crop}")
            left, top = ((side - self.crop) // 2 for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return fit_image(image, image_size, channels)

    def labels(self) -> np.ndarray | None:
        """1 where the image has the attribute, else 0, int64 [N]; None without an attribute."""
        return None if self.attribute is None else self._labels.copy()

    def describe(self) -> str:
        """One line: split, number of images, crop, and the attribute that is the label."""
        labels = "no true labels" if self.attribute is None else f"true label {self.attribute}"
        crop = "not cropped" if self.crop is None else f"centre crop {self.crop}"
        return f"{self.name}: {len(self)} images, {crop}, {labels}"


def _check_split(split: str, legal: tuple[str, ...]) -> None:
    if split not in legal:
        raise ValueError(f"split must be one of {', '.join(legal)}, got {split!r}")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not empty; CelebA's lists pad with several blanks."""
    with path.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if fields := line.split():
                yield number, fields


def _download(fetch: Callable[[], object], what: str, url: str, folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            fetch()
    except Exception as error:  # no network, Google Drive's quota, gdown not installed: each its own type
        raise RuntimeError(
            f"{what} could not be downloaded ({error}): put the files from {url} into {folder} by hand"
        ) from error
