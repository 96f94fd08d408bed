"""What a user hands over: samples and training images as files, folders or runs, read without changing a pixel."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from lightning_mem.data import GREY_RULE, RESIZE_RULE, ArraySource, CSVSource, FolderSource, fit_image, read_image
from lightning_mem.data.split import image_digest
from lightning_mem.records import digest
from lightning_mem.types import SampleSet

FIT_RULE = f"{RESIZE_RULE}; grey by {GREY_RULE}"
"""What ``resize`` does to images of another size or number of channels."""


def is_run(path: str | Path) -> bool:
    """Whether a folder is that of a run."""
    return (Path(path) / "config.yaml").is_file()


def samples_file(run: str | Path) -> Path:
    """The samples of a run folder: those of its last evaluation, else the newest it drew.

    Raises:
        ValueError: If it holds none.
    """
    folder = Path(run) / "samples"
    if (folder / "last.npz").is_file():
        return folder / "last.npz"
    drawn = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    if not drawn:
        raise ValueError(f"{run} is a run folder without samples: draw some with `lightning-mem sample`")
    return drawn[-1]


def read_samples(path: str | Path, shape: tuple[int, ...] | None = None) -> SampleSet:
    """Samples of a run folder, an ``.npz`` or ``.npy`` file, a folder of images, or a ``.csv`` that names images.

    Args:
        path: ``.npz`` with ``arr_0`` uint8 [N, H, W, C] (a manifest beside it is checked), ``.npy`` with that array,
            a folder of images at any depth (addressed in order of their relative paths), a ``.csv`` with a column
            ``file``, or a run folder.
        shape: Make images that are not (C, H, W) fit by ``FIT_RULE``, and say so in the settings; null: as they are.

    Raises:
        ValueError: If it is none of these, an image cannot be read, or sizes differ; it names the file.
        FileNotFoundError: If there is nothing at the path.
    """
    path = Path(path)
    if path.is_dir() and is_run(path):
        path = samples_file(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        samples = SampleSet.load(path)
        if len(samples) == 0:
            raise ValueError(f"{path} holds no samples")
        if shape is None or tuple(samples.images.shape[1:]) == shape:
            return samples
        settings = {**samples.settings, "samples_resize": FIT_RULE}
        return replace(samples, images=fit_stack(samples.images, shape), settings=settings)
    images = read_stack(path, shape)
    return SampleSet(images, torch.arange(len(images)), settings={} if shape is None else {"samples_resize": FIT_RULE})


def shape_of(path: str | Path) -> tuple[int, ...]:
    """(C, H, W) of samples; of a folder, that of its first image."""
    path = Path(path)
    if path.is_dir() and not is_run(path):
        image = read_image(FolderSource(str(path)).path_of(0))
        return (3 if image.mode == "RGB" else 1, image.height, image.width)
    return tuple(read_samples(path).images.shape[1:])


def read_stack(path: str | Path, shape: tuple[int, ...] | None = None) -> Tensor:
    """Images of a folder, a ``.csv``, or an ``.npz`` or ``.npy`` file as they are, uint8 [N, C, H, W].

    In a folder or ``.csv`` that mixes grey and colour images the grey ones are repeated to three channels.

    Args:
        path: Folder of images, or file; a ``.csv`` names image files (:class:`lightning_mem.data.CSVSource`).
        shape: Make them fit (C, H, W) by ``FIT_RULE``, whatever their size; null leaves them as they are.

    Raises:
        ValueError: If there are no images, one cannot be read, or sizes differ where no shape is given.
        FileNotFoundError: If there is nothing at the path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        return _files(FolderSource(str(path)), shape)
    if path.suffix.lower() == ".csv":
        return _files(CSVSource(str(path)), shape)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(f"{path} is neither an .npz, .npy or .csv file nor a folder of images")
    arrays = ArraySource(str(path))._arrays[0]
    stack = torch.from_numpy(np.array(arrays)).permute(0, 3, 1, 2).contiguous()
    return stack if shape is None else fit_stack(stack, shape)


def _files(source: FolderSource | CSVSource, shape: tuple[int, ...] | None) -> Tensor:
    def read(number: int) -> np.ndarray:
        image = read_image(source.path_of(number))
        if shape is not None:
            return fit_image(image, shape[1], shape[0])
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        numbers = range(len(source))
        found = list(tqdm(pool.map(read, numbers), f"reading {source.path}", len(source), leave=False, delay=2))
    sizes = {image.shape[1:] for image in found}
    if len(sizes) > 1:
        first = {size: next(n for n, image in enumerate(found) if image.shape[1:] == size) for size in sizes}
        shown = ", ".join(f"{source.path_of(n)} is {size[0]} x {size[1]}" for size, n in sorted(first.items())[:3])
        raise ValueError(
            f"{source.path} holds images of {len(sizes)} sizes ({shown}): make them equal, or let --resize true do so"
        )
    channels = max(image.shape[0] for image in found)
    return torch.from_numpy(np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in found]))


def fit_stack(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images uint8 [N, C, H, W] made to fit a square (C, H, W) by ``FIT_RULE``; those that fit stay as they are."""
    if tuple(images.shape[1:]) == tuple(shape):
        return images
    if shape[1] != shape[2]:
        raise ValueError(f"resize makes square images only, the training images are {shape[1]} x {shape[2]}")
    pixels = images.permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([fit_image(image, shape[1], shape[0]) for image in pixels]))


def check_shape(samples: Tensor, members: Tensor, what: str) -> None:
    """Refuse samples of another size or number of channels than the training images.

    Raises:
        ValueError: It names both, and what to do.
    """
    if samples.shape[1:] != members.shape[1:]:
        (c, h, w), (channels, height, width) = samples.shape[1:], members.shape[1:]
        raise ValueError(
            f"{what} holds images of {h} x {w} with {c} channel(s), the training images are {height} x {width} with "
            f"{channels}: draw samples at the size that was trained on, name the data at the samples' size, or let "
            "--resize true make the samples fit (it becomes part of every definition)"
        )


def count_duplicates(images: Tensor) -> int:
    """How many images repeat an earlier one pixel for pixel."""
    return len(images) - len({image_digest(image) for image in images.numpy()})


def content_digest(images: Tensor) -> str:
    """Of the images' contents, whatever their order: what ``members.json`` calls the digest of a set."""
    return digest(sorted(image_digest(image) for image in images.numpy()))


def read_run_config(path: str | Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run folder.

    Raises:
        ValueError: If it is not a configuration of ``fit``.
    """
    try:
        config = yaml.safe_load((Path(path) / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}/config.yaml cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{path}/config.yaml is no configuration of `fit`: it has no data section")
    return config


def written_digests(run: str | Path) -> dict[str, str]:
    """Digests of the sets ``members`` and ``heldout`` in a run's ``members.json``; empty where there is none."""
    file = Path(run) / "members.json"
    if not file.is_file():
        return {}
    written = json.loads(file.read_text())
    return {name: str(written[name]["digest"]) for name in ("members", "heldout")}


def check_members(run: str | Path, digests: Mapping[str, str]) -> None:
    """Refuse images that are not those a run wrote into its ``members.json``.

    Args:
        run: Run folder; without ``members.json`` nothing is checked.
        digests: Of the sets ``members`` and ``heldout`` as they were read now.

    Raises:
        ValueError: It names the set that changed.
    """
    written = written_digests(run)
    for name, found in digests.items():
        if written.get(name, found) != found:
            raise ValueError(
                f"{run}/members.json names {name} with the digest {written[name]}, but the data options lead to "
                f"{found}: the source has changed since, or an option is not the run's; other images need another "
                "run folder"
            )
