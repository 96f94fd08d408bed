"""Types that every room shares: the image scales, the names of predictions and weights, the SampleSet."""

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mem.records import atomic_write, digest

Prediction = Literal["eps", "v", "x0"]
"""What a denoiser's output is: the noise, the velocity, or the clean image."""

Weights = Literal["raw", "ema"]
"""Which weights a sample came from: the optimizer's own or their exponential moving average."""


def to_uint8(x: Tensor) -> Tensor:
    """Quantise an image: ``round((x + 1) * 127.5)``, clamped to [0, 255].

    Args:
        x: Floats of any shape, nominally in [-1, 1].

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: If a value is not finite (it would become a plausible pixel).
    """
    if not torch.isfinite(x).all():
        raise ValueError(f"{int((~torch.isfinite(x)).sum())} of {x.numel()} pixel values are not finite")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Inverse of :func:`to_uint8` on its range: ``x / 127.5 - 1`` as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


@dataclass
class SampleSet:
    """Generated images with everything that says where they came from.

    On disk: ``.npz`` with ``arr_0`` uint8 [N, H, W, C] (the field's convention), ``addresses``, ``labels`` and
    ``gate_rate`` when there are any, and the manifest in a ``.json`` file beside it.

    Args:
        images: uint8 [N, C, H, W].
        addresses: int64 [N]; sample ``i`` is the one drawn at address ``addresses[i]``.
        labels: int64 [N] condition each sample was drawn under; null for unconditional ones.
        weights: ``raw`` or ``ema``.
        settings: Flat: seed, sampler, num_steps, eta, block, target digest ...
        gate_rate: float64 [N] in [0, 1], share of the steps at which a protection acted on the sample; null where none
            tells.
    """

    images: Tensor
    addresses: Tensor
    labels: Tensor | None = None
    weights: Weights = "raw"
    settings: dict[str, Any] = field(default_factory=dict)
    gate_rate: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        for name in ("addresses", "labels", "gate_rate"):
            rows = getattr(self, name)
            if rows is not None and rows.shape != (len(self.images),):
                raise ValueError(f"{name} must have one entry per image ({len(self.images)}), got {tuple(rows.shape)}")
        if len(self.addresses.unique()) != len(self.addresses):
            raise ValueError("an address occurs twice: each sample may be counted once")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Digest of pixels, addresses and labels."""
        labels = self.labels if self.labels is not None else torch.empty(0)
        return digest(self.images, self.addresses, labels)

    def save(self, path: str | Path) -> None:
        """Write ``path`` (``.npz``) and its manifest ``<stem>.json``; both replaced in one move each."""
        path = Path(path)
        if path.suffix != ".npz":  # not with_suffix: a name may hold a dot
            path = path.with_name(path.name + ".npz")
        arrays = {"arr_0": self.images.permute(0, 2, 3, 1).numpy(), "addresses": self.addresses.numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        if self.gate_rate is not None:
            arrays["gate_rate"] = self.gate_rate.numpy()
        with atomic_write(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        manifest = {"digest": self.digest, "n": len(self), "weights": self.weights, "settings": self.settings}
        with atomic_write(path.with_suffix(".json")) as file:
            json.dump(manifest, file, indent=1)

    @classmethod
    def load(cls, path: str | Path) -> "SampleSet":
        """Read what :meth:`save` wrote, or any ``.npz`` of the field with a uint8 ``arr_0`` [N, H, W, C].

        Raises:
            ValueError: If the file is not such an archive, holds another layout, or does not match its manifest.
        """
        path = Path(path)
        try:
            # a handle of our own: numpy leaves its open when the archive is cut off
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array, not an archive")
                arrays = {name: archive[name] for name in archive.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a readable .npz archive: {error}") from error
        images = arrays.get("arr_0")
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            found = {name: f"{a.dtype} {a.shape}" for name, a in arrays.items()}
            raise ValueError(f"{path} must hold arr_0 as uint8 [N, H, W, C] with C 1 or 3, found {found}")
        manifest_path = path.with_suffix(".json")
        manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
        samples = cls(
            images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            addresses=torch.from_numpy(arrays.get("addresses", np.arange(len(images)))).to(torch.int64),
            labels=torch.from_numpy(arrays["labels"]).to(torch.int64) if "labels" in arrays else None,
            weights=manifest.get("weights", "raw"),
            settings=manifest.get("settings", {}),
            gate_rate=torch.from_numpy(arrays["gate_rate"]).double() if "gate_rate" in arrays else None,
        )
        if "digest" in manifest and manifest["digest"] != samples.digest:
            raise ValueError(f"{path} holds other samples than its manifest {manifest_path.name}: draw them again")
        return samples
