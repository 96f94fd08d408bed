"""Sources: collections of images that examples are taken from, every one read as uint8 at the size asked for."""

import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

RESIZE_RULE = "short side to image_size by Pillow bicubic (antialiased), then centre crop"
"""How :func:`fit_image` makes an image square; an image whose short side fits is only cropped."""

GREY_RULE = "ITU-R 601 luma, rounded"
"""How colour becomes grey; grey becomes colour by repetition, which this rule undoes exactly."""


def fit_image(image: Image.Image | np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """Make an image square, of one size and number of channels.

    The short side is resized to ``image_size`` (antialiased bicubic) and the centre is cut out. Nothing is resampled
    when the short side has that size already. Colour becomes grey by ITU-R 601 luma, grey becomes colour by repetition.

    Args:
        image: A Pillow image of mode ``L`` or ``RGB``, or uint8 [H, W] or [H, W, C] with C 1 or 3.
        image_size: Side of the result in pixels, at least 1.
        channels: 1 or 3.

    Returns:
        uint8 [channels, image_size, image_size], an array of its own.

    Raises:
        ValueError: If the image is empty or of another type or layout, or a number is not legal.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    picture = image if isinstance(image, Image.Image) else _to_pillow(image)
    if picture.mode not in ("L", "RGB"):
        raise ValueError(f"an image must have mode L or RGB, got {picture.mode}: convert it first")
    if min(picture.size) < 1:
        raise ValueError(f"an image needs at least one pixel, got {picture.width} x {picture.height}")
    if channels == 1 and picture.mode == "RGB":
        picture = picture.convert("L")
    short = min(picture.size)
    if short != image_size:
        width, height = (max(image_size, round(side * image_size / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    pixels = pixels[top : top + image_size, left : left + image_size]
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return pixels.transpose(2, 0, 1).copy()


def _to_pillow(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))):
        raise ValueError(f"an image must be uint8 [H, W] or [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


class AbstractSource(ABC):
    """A collection of images that examples are taken from.

    A source is cheap to make: nothing is read before :meth:`open`, or the first call that needs it. What was read is
    dropped when the source is sent to another process, which reads it again.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for records and messages, e.g. ``digits``."""

    @property
    def num_classes(self) -> int | None:
        """Number of true labels; None when there are none."""
        return None

    def prepare(self) -> None:  # noqa: B027  most sources have nothing to download
        """Download what is missing, where that is possible. Called once, on one process."""

    def open(self) -> None:
        """Read what must be read before images can be counted. Called on each process; a second call does nothing."""
        len(self)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image.

        Args:
            index: In [0, len(self)).
            image_size: Side in pixels, see :func:`fit_image`.
            channels: 1 or 3.

        Returns:
            uint8 [channels, image_size, image_size].

        Raises:
            IndexError: If there is no such image.
            ValueError: If the file cannot be read as an image; it names the file.
        """

    def labels(self) -> np.ndarray | None:
        """True labels, int64 [N] in [0, num_classes); None when there are none."""
        return None

    def whole(self, indices: np.ndarray) -> tuple["AbstractSource", np.ndarray]:
        """The source that this one is a part of, and where these images, int64 [n], stand there; itself for no part."""
        return self, indices

    def captions(self) -> list[str] | None:
        """What each image is captioned; None when there are no captions."""
        return None

    def path_of(self, index: int) -> Path | None:
        """The file that image ``index`` is read from; None when images are no files."""
        return None

    def size(self, index: int) -> tuple[int, int] | None:
        """Short and long side of an image as it is stored; of a file only the header is read. None where unknown."""
        file = self.path_of(index)
        if file is None:
            return None
        with Image.open(file) as image:
            return min(image.size), max(image.size)

    def where(self, index: int) -> str:
        """What a message calls an image: its file, or its place."""
        return str(self.path_of(index) or f"image {index} of {self.name}")

    def describe(self) -> str:
        """One line for the start of a run: what it is, how many images, how many true labels."""
        classes = "no true labels" if self.num_classes is None else f"{self.num_classes} true labels"
        return f"{self.name}: {len(self)} images, {classes}"

    def provenance(self) -> dict[str, Any]:
        """Where generated images and their labels came from, plain values; empty for images that were not generated."""
        return {}

    def _checked(self, index: int) -> int:
        """The index, if there is such an image; a negative one would quietly be another image."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} holds images 0 to {len(self) - 1}, got index {index}")
        return int(index)

    def __getstate__(self) -> dict[str, Any]:
        # a memory-mapped array would be pickled as its whole content
        cls = type(self)
        return {k: v for k, v in self.__dict__.items() if not isinstance(getattr(cls, k, None), cached_property)}


class DigitsSource(AbstractSource):
    """Handwritten digits that ship with scikit-learn: 1797 grey images of 8 x 8, 10 classes, no download.

    The stored values 0 to 16 become uint8 = round(x * 255 / 16), once, half to even (8 becomes 128).
    """

    @property
    def name(self) -> str:
        """``digits``."""
        return "digits"

    @property
    def num_classes(self) -> int:
        """10."""
        return 10

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits  # takes a second to import; other sources do not need it

        images, labels = load_digits(return_X_y=True)
        return np.rint(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._digits[0])

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One digit; see :meth:`AbstractSource.read`."""
        return fit_image(self._digits[0][self._checked(index)], image_size, channels)

    def labels(self) -> np.ndarray:
        """The digit shown, int64 [1797] in [0, 10)."""
        return self._digits[1].copy()


class ArraySource(AbstractSource):
    """Images in one numpy file: ``.npz`` as the field writes samples, or ``.npy``.

    Args:
        path: A ``.npz`` with ``arr_0`` uint8 [N, H, W, C] and, optionally, integer labels [N] as ``labels`` or
            ``arr_1`` (what ``lightning-mem sample`` writes is such a file), or a ``.npy`` with that array alone.
            C is 1 or 3. An ``.npz`` is read into memory as a whole; a ``.npy`` stays on disk and is memory-mapped, so
            use it for arrays larger than memory. Files holding pickled Python objects are refused.
    """

    def __init__(self, path: str) -> None:
        if Path(path).suffix.lower() not in (".npz", ".npy"):
            raise ValueError(
                f"path must name an .npz or .npy file, got {path!r}: use FolderSource for a folder of images"
            )
        self.path = path

    @property
    def name(self) -> str:
        """``array:<file name>``."""
        return f"array:{Path(self.path).name}"

    @property
    def num_classes(self) -> int | None:
        """Largest label plus one; None without labels."""
        labels = self._arrays[1]
        return None if labels is None else int(labels.max()) + 1

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Images [N, H, W, C] and labels [N]."""
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}: give the path of an .npz or .npy file of images")
        try:
            return _read_npy(path) if path.suffix.lower() == ".npy" else _read_npz(path)
        except _LayoutError as error:
            raise ValueError(f"{path} {error}; legal is uint8 [N, H, W, C] with C 1 or 3") from None
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a numpy file ({error}): write it again") from error

    def __len__(self) -> int:
        return len(self._arrays[0])

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`."""
        return fit_image(self._arrays[0][self._checked(index)], image_size, channels)

    def size(self, index: int) -> tuple[int, int]:
        """Of the array: all images have one."""
        sides = self._arrays[0].shape[1:3]
        return min(sides), max(sides)

    def labels(self) -> np.ndarray | None:
        """The labels in the file, int64 [N]; None when it holds none."""
        labels = self._arrays[1]
        return None if labels is None else labels.copy()

    def provenance(self) -> dict[str, Any]:
        """What the manifest beside the file says, where there is one: settings, ``images_digest``, ``target_digest``.

        Raises:
            ValueError: If the manifest cannot be read.
        """
        manifest = Path(self.path).with_suffix(".json")
        if not manifest.is_file():
            return {}
        try:
            written = json.loads(manifest.read_text())
            settings = dict(written["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is no manifest of a SampleSet ({error}): write the samples again") from error
        target = {"target_digest": settings["target"]} if "target" in settings else {}
        return {**settings, **target, "images_digest": written.get("digest", "")}


class _LayoutError(ValueError):
    """The file is sound but holds something else; the message continues the file's name."""


def _read_npy(path: Path) -> tuple[np.ndarray, None]:
    with path.open("rb") as file:
        _check_images("holds", *_array_header(file), lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for member in archive.namelist():
            with archive.open(member) as file:
                headers[member.removesuffix(".npy")] = _array_header(file)
    if "arr_0" not in headers:
        found = {name: f"{dtype} {list(shape)}" for name, (shape, dtype) in headers.items()}
        raise _LayoutError(f"holds no arr_0, only {found}")
    with np.load(path, allow_pickle=False) as arrays:
        _check_images("holds arr_0 as", *headers["arr_0"], lambda: arrays["arr_0"])
        images = arrays["arr_0"]
        key = next((key for key in ("labels", "arr_1") if key in headers), None)
        return images, None if key is None else _checked_labels(key, *headers[key], arrays, len(images))


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, before a byte of it is read (and before numpy would say only 'pickled')."""
    major, _ = np.lib.format.read_magic(file)
    if major == 1:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif major == 2:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise _LayoutError("holds a structured array")  # the only reason numpy writes version 3
    return shape, dtype


def _check_images(verb: str, shape: tuple[int, ...], dtype: np.dtype, load: Any) -> None:
    found = f"{verb} {dtype} {list(shape)}"
    if dtype.hasobject:
        raise _LayoutError(f"{found}, pickled Python objects, which are not read because they can run code")
    if dtype.kind == "f" and any(np.isnan(rows).any() for rows in _chunks(load())):
        raise _LayoutError(f"{found} and holds NaN: the generator that wrote it failed")
    if dtype.kind == "f":
        raise _LayoutError(f"{found}: quantise it first, round((x + 1) * 127.5) for x in [-1, 1]")
    if dtype == np.uint8 and len(shape) == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
        raise _LayoutError(f"{found}, which looks like [N, C, H, W]: transpose it with (0, 2, 3, 1)")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise _LayoutError(found)
    if 0 in shape:
        raise _LayoutError(f"{found}, no images")


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    array = np.atleast_1d(array)
    return (array[start : start + 1024] for start in range(0, len(array), 1024))


def _checked_labels(key: str, shape: tuple[int, ...], dtype: np.dtype, arrays: Any, num_images: int) -> np.ndarray:
    if dtype.kind not in "iu" or shape != (num_images,):
        raise _LayoutError(
            f"holds {key} as {dtype} {list(shape)}, but labels must be integers [{num_images}], one per image"
        )
    labels = arrays[key].astype(np.int64)
    if labels.min() < 0:
        raise _LayoutError(f"holds the label {labels.min()}, but labels must not be negative")
    return labels
