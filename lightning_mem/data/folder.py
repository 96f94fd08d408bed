"""A folder of image files as a source, and how one image file is read."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lightning_mem.data.sources import AbstractSource, fit_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Files with these endings (in any case) are images; a folder's other files are ignored."""


def read_image(path: str | Path) -> Image.Image:
    """Read one image file as 8-bit grey or colour.

    EXIF orientation is applied, transparency is composited on white, palettes, CMYK and the like become RGB. 16-bit
    grey is scaled, round(x / 257), not clipped. Of an animation the first frame is taken. (Of 16-bit *colour* Pillow
    keeps the high byte, which is at most one level off.)

    Args:
        path: The file.

    Returns:
        A Pillow image of mode ``L`` or ``RGB``.

    Raises:
        ValueError: If the file is truncated, not an image, or has no defined 8-bit scale (floats, values beyond 16
            bit); it names the file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
        if image.mode == "F" or image.mode.startswith("I"):
            return _from_deep_grey(image)
        if image.has_transparency_data:
            return _on_white(image)
        if image.mode in ("L", "RGB"):
            return image
        return image.convert("L" if image.mode == "1" else "RGB")
    except Exception as error:  # Pillow's decoders raise whatever they trip over, SyntaxError included
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error


def _from_deep_grey(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no fixed scale; 8 or 16 bit integers are legal")
    pixels = pixels.astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its values {pixels.min()} to {pixels.max()} are not 16-bit; 0 to 65535 is legal")
    scaled = (pixels + 128) // 257  # 257 is odd, so nothing lies half way between two levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[pixels == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGBA")).astype(np.int64)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    # Pillow's own compositing carries extra bits and differs by a level here and there; this is round() of the formula
    return Image.fromarray(((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8))


class FolderSource(AbstractSource):
    """Every image below a folder, in the order of their relative paths.

    When all images lie in subfolders, the first folder of an image's path is its true label, numbered in sorted order.
    Images of any size are legal: they are resized and cropped to ``image_size``.

    Args:
        path: The folder. Read are png, jpg, jpeg, webp, bmp, tif, tiff and gif (first frame), at any depth, links
            followed; other files, and files or folders whose name starts with a dot, are ignored. EXIF orientation is
            applied, transparency composited on white, 16-bit grey scaled to 8 bit.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """``folder:<last part of the path>``."""
        return f"folder:{Path(self.path).resolve().name}"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the subfolders that are labels, sorted; None when an image lies outside any subfolder."""
        if any("/" not in file for file in self._files):
            return None
        return tuple(sorted({file.split("/", 1)[0] for file in self._files}))

    @property
    def num_classes(self) -> int | None:
        """Number of subfolders; None when an image lies outside any subfolder."""
        return None if self.classes is None else len(self.classes)

    @cached_property
    def _files(self) -> list[str]:
        """Relative paths with forward slashes, sorted."""
        root = Path(self.path)
        if not root.is_dir():
            if not root.exists():
                raise FileNotFoundError(f"path must name a folder of images, but {root} does not exist")
            raise ValueError(
                f"path must name a folder of images, but {root} is a file (ArraySource reads .npz and .npy)"
            )
        files = list(_walk(root, "", (os.path.realpath(root),)))
        images = sorted(file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            counts = Counter(Path(file).suffix or "no suffix" for file in files)
            found = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8)) or "no files"
            raise ValueError(f"{root} holds no image: found {found}; legal are {' '.join(IMAGE_SUFFIXES)}")
        return images

    def path_of(self, index: int) -> Path:
        """The file that image ``index`` is read from."""
        return Path(self.path) / self._files[self._checked(index)]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """One image; see :meth:`AbstractSource.read`."""
        return fit_image(read_image(self.path_of(index)), image_size, channels)

    def labels(self) -> np.ndarray | None:
        """Number of each image's first subfolder, int64 [N]; None when an image lies outside any subfolder."""
        if self.classes is None:
            return None
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[file.split("/", 1)[0]] for file in self._files], dtype=np.int64)

    def describe(self) -> str:
        """One line: the folder, how many images, which labels, and why there are none where a user may expect some."""
        flat = sum("/" not in file for file in self._files)
        if self.classes is not None:
            shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
            labels = f"{len(self.classes)} true labels ({shown})"
        elif flat < len(self):
            labels = f"no true labels ({flat} images lie beside the subfolders)"
        else:
            labels = "no true labels (no subfolders)"
        return f"{self.name}: {len(self)} images, {labels}"


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Relative paths of all files that are not hidden. ``above``: the real folders on the way, to notice a loop."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in visible:
        if not entry.is_dir():
            yield prefix + entry.name
            continue
        real = os.path.realpath(entry.path)
        if real in above:
            raise ValueError(f"{entry.path} links to the folder {real} that contains it: remove the link")
        yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))
