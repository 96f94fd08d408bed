"""Feature extractors: frozen maps from images to vectors, in which Fréchet distances are measured."""

import difflib
import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mem.metrics.neighbors import Rows, check_images
from lightning_mem.metrics.precision import full_precision
from lightning_mem.records import digest

InceptionFeatures = Literal["64", "192", "768", "2048"]
"""Layers of the reference Inception, named by their width."""

OFFICIAL_INCEPTION = "6726825d"
"""First digits of the SHA-256 of torch-fidelity's weight file, converted from the original TensorFlow graph."""

EXTRACTORS = ("pixels", "inception", "inception-64", "sscd", "timm/<model>")
"""Names that :func:`build_extractor` knows."""


class AbstractExtractor(ABC):
    """A frozen map from images to feature vectors.

    Not an ``nn.Module``, so what holds one gains no parameter; copies of it share its weights.

    Attributes:
        name: Short, as it stands in a logged key.
        dim: Width of a feature vector; null where it follows the image.
        digest: Of the weights.
        resize: What happens to the image before the network, in words; equal for both sides of a comparison.
        device: Where it computes and where its features are.
    """

    name: str
    dim: int | None
    digest: str
    resize: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: uint8 [B, C, H, W], any device.

        Returns:
            float32 [B, dim] on the extractor's device; in full float32, whatever autocast or TF32 is set outside.

        Raises:
            ValueError: If the images are of another kind or a feature is not finite.
        """
        check_images("images", images)
        with full_precision(self.device):
            features = self._features(images.to(self.device)).float()
        if not torch.isfinite(features).all():
            row = int((~torch.isfinite(features)).nonzero()[0, 0])
            raise ValueError(f"{self.name} gives image {row} a feature that is not finite: check its weights")
        return features

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """Features of uint8 images on the extractor's device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AbstractExtractor":
        return self  # it never changes


class PixelsExtractor(AbstractExtractor):
    """The pixels themselves, x/255: needs no weights, means nothing to the eye; right for tests and tiny images.

    Args:
        device: Where to compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.name = "pixels"
        self.dim = None
        self.digest = digest("pixels")
        self.resize = "none"
        self.device = torch.device(device)

    def _features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


class TimmExtractor(AbstractExtractor):
    """Pooled features of any backbone of ``timm`` (DINOv2, ViT, ResNet ...), with that model's own input settings.

    Args:
        model_name: As ``timm.list_models()`` knows it, e.g. ``vit_small_patch14_dinov2.lvd142m``.
        weights: Local ``.safetensors`` or ``.pth`` file in place of the download; the whole model, classifier included.
        pretrained: Whether to load weights at all; false gives the same random ones each time.
        device: Where to compute.

    Raises:
        ValueError: If timm has no such model, or the file does not fit it.
        FileNotFoundError: If ``weights`` names no file.
        OSError: If the weights cannot be downloaded.
    """

    def __init__(
        self,
        model_name: str,
        weights: str | Path | None = None,
        pretrained: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        import timm  # 1.5 s: only where it is used

        if not timm.is_model(model_name):
            known = timm.list_models()
            near = difflib.get_close_matches(model_name.split(".")[0], known, n=3, cutoff=0.4)
            raise ValueError(f"timm has no model {model_name!r}: use one of its {len(known)} models, e.g. {near}")
        overlay: dict[str, Any] | None = None
        if weights is not None:
            overlay = {"file": str(existing_file(weights)), "custom_load": Path(weights).suffix == ".npz"}
        loaded = pretrained or weights is not None
        with torch.random.fork_rng(devices=[]):  # building a network draws initial weights
            torch.manual_seed(0)
            try:
                # with its classifier: only then does timm insist that every weight is in the file
                network = timm.create_model(model_name, pretrained=loaded, pretrained_cfg_overlay=overlay)
            except Exception as error:  # of timm, torch, safetensors or huggingface_hub, by what went wrong
                if not loaded:
                    raise
                if weights is not None:
                    raise ValueError(f"{weights} does not hold weights of timm/{model_name}: {error}") from error
                raise OSError(_no_download(f"timm/{model_name}", _timm_address(model_name), error)) from error
        reset_classifier: Any = network.reset_classifier
        reset_classifier(0)
        config = timm.data.resolve_model_data_config(network)
        self.name = f"timm/{model_name}"
        width: Any = getattr(network, "head_hidden_size", None) or network.num_features
        self.dim = int(width)
        self.digest = _weights_digest(network)
        self.device = torch.device(device)
        self._size: tuple[int, int] = tuple(config["input_size"][1:])
        self.resize = f"bicubic, antialiased, to {self._size[0]}x{self._size[1]} without crop, clamped to [0, 1]"
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._mean, self._std = (
            torch.tensor(config[key], device=self.device).view(1, -1, 1, 1) for key in ("mean", "std")
        )

    def _features(self, images: Tensor) -> Tensor:
        x = three_channels(images).float() / 255
        if tuple(x.shape[2:]) != self._size:
            x = nn.functional.interpolate(x, self._size, mode="bicubic", antialias=True, align_corners=False)
        return self._network((x.clamp(0, 1) - self._mean) / self._std)


class InceptionExtractor(AbstractExtractor):
    """The Inception of the Fréchet Inception Distance, as torch-fidelity carries it, with its TF1-compatible resize.

    Args:
        weights: Local copy of the weight file. Null: the original one, from torch's cache or downloaded.
        features: Layer: 64, 192, 768 or 2048 (the distance's own).
        device: Where to compute.

    Attributes:
        official: True only for the original weights; only then may a distance be called FID.

    Raises:
        ValueError: If the layer is unknown or the file does not hold this network.
        FileNotFoundError: If ``weights`` names no file.
        OSError: If the weights cannot be downloaded.

    Source:
        Heusel et al., arXiv:1706.08500; torch-fidelity 0.4, FeatureExtractorInceptionV3.
    """

    official: bool

    def __init__(
        self,
        weights: str | Path | None = None,
        features: InceptionFeatures = "2048",
        device: torch.device | str = "cpu",
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if features not in ("64", "192", "768", "2048"):
            raise ValueError(f"features must be one of 64, 192, 768, 2048, got {features!r}")
        path = _downloaded_inception() if weights is None else existing_file(weights)
        try:
            # torch-fidelity opens the file with a reader that can run code: only what the safe reader took goes there
            torch.load(path, map_location="cpu", weights_only=True)
            with torch.random.fork_rng(devices=[]):
                network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", [features], feature_extractor_weights_path=str(path)
                )
        except Exception as error:  # unpickling, zip and key errors alike: the file is not this network
            raise ValueError(f"{path} does not hold weights of torch-fidelity's Inception: {error}") from error
        with path.open("rb") as file:
            self.official = hashlib.file_digest(file, "sha256").hexdigest().startswith(OFFICIAL_INCEPTION)
        self.name = "inception" if features == "2048" else f"inception-{features}"
        self.dim = int(features)
        self.digest = _weights_digest(network)
        self.resize = "bilinear as in TensorFlow 1, to 299x299"
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    def _features(self, images: Tensor) -> Tensor:
        return self._network(three_channels(images))[0]


def build_extractor(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> AbstractExtractor:
    """The extractor of a name.

    Args:
        name: ``pixels``, ``inception`` (2048 features), ``inception-64`` (its 64-feature layer), ``sscd`` or
            ``timm/<model>``.
        weights: Local weight file. Null: the original weights, downloaded once; ``sscd`` always needs a local file.
        device: Where to compute.

    Returns:
        The extractor, frozen.

    Raises:
        ValueError: If the name is unknown, weights are given to ``pixels``, or none to ``sscd``.
    """
    if name == "pixels":
        if weights is not None:
            raise ValueError(f"pixels has no weights, got {weights}: leave the option out")
        return PixelsExtractor(device)
    if name in ("inception", "inception-64"):
        return InceptionExtractor(weights, "64" if name == "inception-64" else "2048", device)
    if name == "sscd":
        from lightning_mem.metrics.sscd import SSCDExtractor  # it builds on this file

        return SSCDExtractor(weights, device=device)
    if name.startswith("timm/") and name != "timm/":
        return TimmExtractor(name.removeprefix("timm/"), weights, device=device)
    raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}")


def extract_features(images: Rows, extractor: AbstractExtractor, *, block: int = 64) -> Tensor:
    """Features of many images, drawn through the network in blocks of one size.

    The last block is padded by repetition and cut, so a feature never depends on the batch its image came in.

    Args:
        images: uint8 [N, C, H, W], N >= 1; tensor or (memory-mapped) array.
        extractor: What to extract.
        block: Images per call. Another block size agrees up to rounding only.

    Returns:
        float32 [N, dim] on the extractor's device.

    Raises:
        ValueError: If there are no images, they are of another kind, or block is not positive.
    """
    check_images("images", images)
    if len(images) == 0:
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    parts = []
    for start in range(0, len(images), block):
        # indices beyond the end wrap round: the padding repeats images of this block
        size = min(block, len(images) - start)
        index = start + torch.arange(block) % size
        part = (
            images[index.to(images.device)] if isinstance(images, Tensor) else torch.from_numpy(images[index.numpy()])
        )
        parts.append(extractor(part)[:size])
    return torch.cat(parts)


def three_channels(images: Tensor) -> Tensor:
    """Images with three channels, grey ones repeated; another number is refused."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


def _weights_digest(network: nn.Module) -> str:
    return digest(*(part for name, value in network.state_dict().items() for part in (name, value.float())))


def existing_file(weights: str | Path) -> Path:
    """The path of a weight file, refused where it names none."""
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights must name a local file, got {path}, which is not there")
    return path


def _downloaded_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), OFFICIAL_INCEPTION, progress=False)
        except (OSError, RuntimeError) as error:  # no network, or another file than the digest names
            raise OSError(_no_download("the Inception", URL_INCEPTION_V3, error)) from error
    return path


def _no_download(what: str, address: str, error: Exception) -> str:
    return (
        f"the weights of {what} could not be downloaded from {address} ({error}): "
        "fetch the file on a machine with network and give its path as the option weights"
    )


def _timm_address(model_name: str) -> str:
    import timm

    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url):
        return "anywhere (timm knows no weights of it)"
    hub = config.hf_hub_id
    return f"https://huggingface.co/{hub}{model_name if hub.endswith('/') else ''}" if hub else str(config.url)
