"""SSCD, a descriptor made to find copies of images; its cosine is what SIDE and others call a copy by."""

import hashlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_mem.metrics.features import AbstractExtractor, existing_file, three_channels

SSCD_ADDRESS = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
"""Where the official file comes from (facebookresearch/sscd-copy-detection, MIT licence, 94 MiB)."""

OFFICIAL_SSCD = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
"""SHA-256 of sscd_disc_mixup.torchscript.pt."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Resize = Literal["short_side", "square"]
"""Short side to 288, or both to 320; the two official rules."""

_SIZE = {"short_side": 288, "square": 320}
# what a TorchScript program may not name: operators that touch files or other processes, and code that runs at loading
_FORBIDDEN = re.compile(r"\b(?:save|from_file|rpc_\w+|__setstate__|ops\.(?!aten\b|prim\b)\w+)\b")


class SSCDExtractor(AbstractExtractor):
    """SSCD descriptors (512 unit-length features), from a local TorchScript file.

    A TorchScript file is a program of torch operators. It cannot call Python, but torch's operators can write files,
    and a program may run while it is loaded. The official file is told by its SHA-256; another one is searched, before
    torch opens it, for operators that touch files or processes and for code that runs at loading, and refused where it
    has any. What this cannot exclude is a fault in torch's own reader: take files from people you trust.

    Args:
        weights: Local copy of ``sscd_disc_mixup.torchscript.pt`` (or another SSCD model as TorchScript).
        resize: ``short_side`` brings the short side to 288, ``square`` both sides to 320; both are official, and one
            must be used on both sides of a comparison.
        device: Where to compute.

    Attributes:
        official: True only for the official ``sscd_disc_mixup`` file; thresholds in the literature refer to it.

    Raises:
        ValueError: If no file is given, the file is not such a model, or its descriptors do not have length 1.
        FileNotFoundError: If ``weights`` names no file.

    Undefined when:
        Images are tiny: at 32x32 it measures blur. Use the ratio or normalized L2 there. A cosine above 0.75 is a copy
        with 90 % precision on the authors' benchmark; memorization papers use 0.5.

    Source:
        Pizzi et al., A Self-Supervised Descriptor for Image Copy Detection, arXiv:2202.10261.
    """

    official: bool

    def __init__(
        self,
        weights: str | Path | None = None,
        resize: Resize = "short_side",
        device: torch.device | str = "cpu",
    ) -> None:
        if resize not in get_args(Resize):
            raise ValueError(f"resize must be one of {', '.join(get_args(Resize))}, got {resize!r}")
        if weights is None:
            raise ValueError(
                f"sscd needs a local weight file: fetch {SSCD_ADDRESS} (facebookresearch/sscd-copy-detection) and give "
                "its path as the option weights"
            )
        path = existing_file(weights)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.official = sha256 == OFFICIAL_SSCD
        if not self.official:
            _check_program(path)
        self.device = torch.device(device)
        self.name = "sscd"
        self.digest = sha256[:16]
        self.weights, self._resize = path, resize
        side = _SIZE[resize]
        self.resize = "bilinear, antialiased, " + (
            f"short side to {side}" if resize == "short_side" else f"to {side}x{side}"
        )
        self._network = _loaded(path, self.device)
        ramp = torch.arange(3 * 32 * 32, device=self.device).reshape(1, 3, 32, 32).remainder(251).to(torch.uint8)
        try:
            self.dim = self(ramp).shape[1]
        except RuntimeError as error:  # of torch's interpreter: the program does not take images
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} does not hold an SSCD model: it cannot take images ({reason})") from error

    def _features(self, images: Tensor) -> Tensor:
        x = preprocess_sscd(images, self._resize)
        with torch.jit.optimized_execution(False):  # no fusing after the first calls: a feature stays the same
            features = self._network(x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{self.weights} does not hold an SSCD model: it gives no [B, d] descriptors")
        lengths = features.float().norm(dim=1)
        if ((lengths - 1).abs() > 1e-3).any():
            raise ValueError(
                f"{self.weights} does not hold an SSCD model: its descriptors have lengths "
                f"{lengths.min():.3g} .. {lengths.max():.3g}, not 1"
            )
        return features

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights, self._resize, self.device)  # a script cannot be pickled: it is read again


def preprocess_sscd(images: Tensor, resize: Resize = "short_side") -> Tensor:
    """What SSCD's network sees: x/255, resized with antialiasing, ImageNet's mean taken off, divided by its deviation.

    Not rounded to 1/255 between resizing and normalising, unlike images resized as files.

    Args:
        images: uint8 [B, 1 or 3, H, W].
        resize: Short side to 288 (the longer in proportion, rounded down), or both sides to 320.

    Returns:
        float32 [B, 3, h, w].

    Raises:
        ValueError: If there are neither 1 nor 3 channels.
    """
    x = three_channels(images).float() / 255
    height, width = x.shape[2:]
    side = _SIZE[resize]
    size = (side, side)
    if resize == "short_side":
        short = min(height, width)
        size = (height * side // short, width * side // short)
    if (height, width) != size:
        x = nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _check_program(path: Path) -> None:
    """Refuse a file that is no TorchScript archive, or whose program does more than compute."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            code = [name for name in names if "/code/" in name and name.endswith(".py")]
            # two readers may take two entries of one name, or spelt in another case, for different files
            if not code or len({name.lower() for name in names}) < len(names):
                raise ValueError(f"{path} does not hold a TorchScript model: fetch {SSCD_ADDRESS}")
            found = {match for name in code for match in _FORBIDDEN.findall(archive.read(name).decode())}
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a TorchScript model ({error}): fetch {SSCD_ADDRESS}") from error
    if found:
        raise ValueError(
            f"{path} is refused: its program names {', '.join(sorted(found))}, which can do more than compute; fetch "
            f"the official file, {SSCD_ADDRESS}"
        )


def _loaded(path: Path, device: torch.device) -> Any:
    with warnings.catch_warnings():
        # the official file comes as TorchScript only, whatever torch would rather be given
        warnings.filterwarnings("ignore", message="`torch.jit.load` is (deprecated|not supported)")
        try:
            network = torch.jit.load(str(path), map_location=device)
        except Exception as error:  # of torch's reader, by what went wrong: the file is not a model
            raise ValueError(f"{path} does not hold a TorchScript model ({error}): fetch {SSCD_ADDRESS}") from error
    for parameter in network.parameters():  # a script has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return network.eval()
