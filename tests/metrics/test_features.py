import copy
import os
import pickle
import re
import urllib.error

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from lightning_mem.metrics import (
    InceptionExtractor,
    PixelsExtractor,
    TimmExtractor,
    build_extractor,
    extract_features,
)

TINY = "test_resnet.r160_in1k"  # timm's own test model: 0.5 M parameters, 160 px


def pictures(n, size=32, channels=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def test_pixels_are_x_over_255():
    images = pictures(5, channels=1, size=4)
    extractor = build_extractor("pixels")
    assert torch.equal(extractor(images), images.reshape(5, 16) / 255)
    assert extractor.dim is None
    assert extractor.digest == PixelsExtractor().digest


@pytest.fixture(scope="module")
def tiny():
    return TimmExtractor(TINY, pretrained=False)


def test_timm_features_are_those_of_the_model_behind_its_own_settings(tiny):
    images = pictures(3, size=160)  # its own size: no resize to disagree about
    network = timm.create_model(TINY, pretrained=False, num_classes=0).eval()
    network.load_state_dict(tiny._network.state_dict())
    config = timm.data.resolve_model_data_config(network)
    mean, std = (np.array(config[key], dtype=np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        truth = network(torch.from_numpy((images.numpy().astype(np.float32) / 255 - mean) / std))
    torch.testing.assert_close(tiny(images), truth, rtol=1e-5, atol=1e-6)
    assert tiny.dim == truth.shape[1]
    assert "160x160" in tiny.resize


@pytest.mark.parametrize("size", [32, 200])
def test_timm_resize_is_pillows_bicubic_up_to_quantisation(tiny, size):
    from PIL import Image

    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (size, size), mode="bilinear")
    images = (smooth * 255).round().to(torch.uint8)
    resized = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((160, 160), Image.Resampling.BICUBIC)
    by_pillow = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
    difference = (tiny(images) - tiny(by_pillow)).norm() / tiny(images).norm()
    assert difference < 0.01  # Pillow rounds to 1/255


def test_grey_images_are_three_equal_channels(tiny, inception_file):
    grey = pictures(2, channels=1)
    for extractor in (tiny, InceptionExtractor(inception_file, "64")):
        assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
        with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
            extractor(pictures(2, channels=4))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_reads_local_weights_with_their_classifier(tmp_path, suffix):
    torch.manual_seed(5)
    network = timm.create_model(TINY, pretrained=False).eval()  # with its 1000 classes
    path = tmp_path / f"weights{suffix}"
    save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
    extractor = TimmExtractor(TINY, weights=path)
    images = pictures(2, size=160)
    assert extractor.digest != TimmExtractor(TINY, pretrained=False).digest
    mean, std = extractor._mean, extractor._std
    with torch.no_grad():
        truth = network.forward_head(network.forward_features((images / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(extractor(images), truth, rtol=1e-5, atol=1e-6)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap-was-sprung",)


@pytest.mark.parametrize("build", [InceptionExtractor, lambda weights: TimmExtractor(TINY, weights)])
def test_weight_files_cannot_run_code(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Trap(), {"weight": Trap()}, {"weight": torch.ones(2)}):
        torch.save(content, tmp_path / "evil.pth")
        with pytest.raises(ValueError, match=r"evil\.pth does not hold weights of "):
            build(tmp_path / "evil.pth")
    assert not (tmp_path / "trap-was-sprung").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth, which is not there"):
        build(tmp_path / "absent.pth")


def test_missing_download_names_address_and_option(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=re.escape(URL_INCEPTION_V3) + ".*no route.*option weights"):
        InceptionExtractor()
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"https://huggingface\.co/timm/test_resnet\.r160_in1k.*no route.*option weights"):
        build_extractor(f"timm/{TINY}")


def test_inception_features_are_torch_fidelitys(inception_file):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    images = pictures(6, size=48)
    options = {"feature_extractor_weights_path": str(inception_file), "cuda": False, "verbose": False}
    theirs = create_feature_extractor("inception-v3-compat", ["64"], **options)
    truth = extract_featuresdict_from_input_id(
        1, theirs, input1=images_dataset(images), batch_size=6, save_cpu_ram=True, **options
    )["64"]
    ours = InceptionExtractor(inception_file, "64")
    torch.testing.assert_close(extract_features(images, ours, block=6), truth, rtol=1e-4, atol=1e-6)
    assert ours.dim == 64
    assert not ours.official


def images_dataset(images):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index]

    return Images()


def test_official_is_decided_by_the_digest_of_the_file(inception_file, monkeypatch):
    import hashlib

    from lightning_mem.metrics import features

    assert URL_INCEPTION_V3.endswith(f"-{features.OFFICIAL_INCEPTION}.pth")
    monkeypatch.setattr(features, "OFFICIAL_INCEPTION", hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8])
    assert InceptionExtractor(inception_file, "64").official


@pytest.mark.parametrize("n", [1, 7, 8, 21])
def test_feature_does_not_depend_on_its_batch(tiny, n):
    images = pictures(21)
    whole = extract_features(images, tiny, block=8)
    assert whole.shape == (21, tiny.dim)
    start = 21 - n
    assert torch.equal(extract_features(images[start:], tiny, block=8), whole[start:])
    assert torch.equal(extract_features(images.numpy()[start:], tiny, block=8), whole[start:])


def test_network_sees_blocks_of_one_size_only():
    sizes = []

    class Counting(PixelsExtractor):
        def _features(self, images):
            sizes.append(len(images))
            return super()._features(images)

    features = extract_features(pictures(21), Counting(), block=8)
    assert sizes == [8, 8, 8]
    assert torch.equal(features, pictures(21).flatten(1) / 255)


def test_extractor_is_frozen_and_belongs_to_no_parent(tiny):
    parent = torch.nn.Linear(2, 2)
    parent.extractor = tiny
    assert set(parent.state_dict()) == {"weight", "bias"}
    assert not tiny._network.training
    assert not any(p.requires_grad for p in tiny._network.parameters())
    parent.train()
    assert not tiny._network.training
    assert not tiny(pictures(1)).requires_grad
    assert copy.deepcopy(tiny) is tiny
    other = pickle.loads(pickle.dumps(tiny))
    assert torch.equal(other(pictures(2)), tiny(pictures(2)))


def test_outer_precision_settings_and_generators_are_left_alone(tiny, inception_file):
    images = pictures(2)
    truth = tiny(images)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny(images), truth)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(tiny(images), truth)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9; set it, and the older names raise
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert torch.equal(tiny(images), truth)
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    TimmExtractor(TINY, pretrained=False)
    InceptionExtractor(inception_file, "64")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("dino", None, "pixels, inception, inception-64, sscd, timm/<model>, got 'dino'"),
        ("timm/", None, "got 'timm/'"),
        ("timm/resnet5O", None, "no model 'resnet5O'.*'resnet50'"),
        ("pixels", "x.pth", "no weights, got x.pth"),
    ],
)
def test_unknown_names_are_refused(name, weights, message):
    with pytest.raises(ValueError, match=message):
        build_extractor(name, weights)


def test_wrong_images_are_refused(tiny, inception_file):
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 3, 32, 32\)"):
        tiny(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"at least one image, got shape \(0, 3, 32, 32\)"):
        extract_features(pictures(0), tiny)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        extract_features(pictures(2), tiny, block=0)
    with pytest.raises(ValueError, match="64, 192, 768, 2048, got '100'"):
        InceptionExtractor(inception_file, "100")


def test_feature_that_is_not_finite_is_refused():
    class Broken(PixelsExtractor):
        def _features(self, images):
            return super()._features(images).log()

    images = torch.full((3, 1, 2, 2), 7, dtype=torch.uint8)
    images[1, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="pixels gives image 1 a feature that is not finite"):
        Broken()(images)
