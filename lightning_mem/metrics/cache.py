"""Reference features and statistics on disk, named after the contents they were computed from."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from lightning_mem.metrics.features import AbstractExtractor, extract_features
from lightning_mem.metrics.frechet import FeatureStatistics
from lightning_mem.metrics.neighbors import Rows
from lightning_mem.records import atomic_write, digest


def cached_features(
    images: Rows, extractor: AbstractExtractor, cache_dir: str | Path | None = None, *, block: int = 64
) -> Tensor:
    """Features of reference images, read from the cache where they are there: the same bits as without it.

    A file is named after the contents of images, weights, resize rule, block and kind of device, and carries the digest
    of its name and of what it holds: one that does not match is computed again with a warning. Writers replace it in
    one move, so two at once do no harm; where it cannot be written there is a warning, and the features.

    Args:
        images: uint8 [N, C, H, W].
        extractor: What to extract.
        cache_dir: Folder of the cache. Null: nothing is read or written.
        block: Images per call of the network.

    Returns:
        float32 [N, dim] on the extractor's device.

    Raises:
        ValueError: As :func:`extract_features`.
    """

    def compute() -> dict[str, np.ndarray]:
        return {"features": extract_features(images, extractor, block=block).cpu().numpy()}

    found = _cached("features", images, extractor, cache_dir, block, compute)
    return torch.from_numpy(found["features"]).to(extractor.device)


def cached_statistics(
    images: Rows, extractor: AbstractExtractor, cache_dir: str | Path | None = None, *, block: int = 64
) -> FeatureStatistics:
    """Mean and covariance of reference images, read from the cache where they are there.

    The cache is that of :func:`cached_features`, which it fills too.

    Args:
        images: uint8 [N, C, H, W], N >= 2, without augmentation.
        extractor: What to extract.
        cache_dir: Folder of the cache. Null: nothing is read or written.
        block: Images per call of the network.

    Returns:
        The statistics on the CPU.

    Raises:
        ValueError: As :func:`extract_features`, or for fewer than 2 images.
    """

    def compute() -> dict[str, np.ndarray]:
        statistics = FeatureStatistics.from_features(cached_features(images, extractor, cache_dir, block=block))
        return {
            "mu": statistics.mu.cpu().numpy(),
            "sigma": statistics.sigma.cpu().numpy(),
            "n": np.array(statistics.n),
        }

    found = _cached("statistics", images, extractor, cache_dir, block, compute)
    return FeatureStatistics(torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"]), int(found["n"]))


def _cached(
    kind: str,
    images: Rows,
    extractor: AbstractExtractor,
    cache_dir: str | Path | None,
    block: int,
    compute: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What ``compute`` gives, from ``<kind>-<extractor>-<digest>.safetensors`` if that file is there and whole."""
    if cache_dir is None:
        return compute()
    key = digest(images, extractor.name, extractor.digest, extractor.resize, block, extractor.device.type)
    path = Path(cache_dir) / f"{kind}-{re.sub('[^A-Za-z0-9.]+', '-', extractor.name)}-{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            stated = (file.metadata() or {}).get("digest")
        if stated == _content_digest(key, found):
            return found
        warnings.warn(f"{path} is computed again: its digest does not match its content", RuntimeWarning, stacklevel=3)
    except FileNotFoundError:
        pass  # the ordinary first time; also where another process has just cleared the cache
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is computed again: it cannot be read ({error})", RuntimeWarning, stacklevel=3)
    arrays = compute()
    try:
        with atomic_write(path, "wb") as target:
            target.write(save(arrays, metadata={"digest": _content_digest(key, arrays)}))
    except OSError as error:  # a full disk or a folder one may not write to: hours of extraction are not thrown away
        warnings.warn(f"{path} is not kept: it cannot be written ({error})", RuntimeWarning, stacklevel=3)
    return arrays


def _content_digest(key: str, arrays: dict[str, np.ndarray]) -> str:
    return digest(key, *(part for name in sorted(arrays) for part in (name, arrays[name])))
