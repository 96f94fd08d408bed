import copy
import pickle
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from lightning_mem.metrics import MemorizationScores, SSCDExtractor, build_extractor, extract_features
from lightning_mem.metrics.sscd import SSCD_ADDRESS, preprocess_sscd

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.s:FutureWarning")  # of script and save, here only


class Tiny(torch.nn.Module):
    """Channel means over a 4 x 4 grid, at length 1: a descriptor that shows every step before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.nn.functional.normalize(grid)


class Long(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :4]


class Picture(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Words(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(x, torch.ones(2, 2))


class Writing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "trap-was-sprung")
        return torch.nn.functional.normalize(x.flatten(1))


class WritingWhenLoaded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.flatten(1))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save(state[0], "trap-was-sprung")
        self.training = state[1]


def pictures(n, height=40, width=40, channels=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=draw, dtype=torch.uint8)


def scripted(module, path):
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return path


@pytest.fixture
def tiny_file(tmp_path):
    return scripted(Tiny(), tmp_path / "tiny.torchscript.pt")


def by_torchvision(images, resize, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    size = 288 if resize == "short_side" else (320, 320)
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Resize(size, antialias=True), v2.Normalize(mean, std)]
    return v2.Compose(steps)(images)


@pytest.mark.parametrize("resize", ["short_side", "square"])
@pytest.mark.parametrize("size", [(32, 32), (288, 288), (300, 450), (450, 301), (64, 97), (320, 320)])
def test_preprocessing_is_torchvisions(resize, size):
    images = pictures(2, *size)
    truth = by_torchvision(images, resize)
    torch.testing.assert_close(preprocess_sscd(images, resize), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", ["short_side", "square"])
def test_features_are_those_of_the_network_behind_the_official_preprocessing(tiny_file, resize):
    images = pictures(3, 40, 60)
    extractor = SSCDExtractor(tiny_file, resize)
    right = Tiny()(by_torchvision(images, resize))
    torch.testing.assert_close(extractor(images), right, rtol=0, atol=1e-5)
    # the mistakes of public codes move a feature by a hundred times what is allowed
    for wrong in (
        by_torchvision(images, resize, std=(0.485, 0.456, 0.406)),  # the mean passed as deviation
        by_torchvision(images, resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),  # no normalisation
        by_torchvision(images, resize, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ):
        assert (extractor(images) - Tiny()(wrong)).abs().max() > 1e-3
    assert extractor.dim == 48
    assert (
        extractor.resize == f"bilinear, antialiased, {'short side to 288' if resize == 'short_side' else 'to 320x320'}"
    )


def test_pillows_resize_agrees_up_to_its_rounding(tiny_file):
    from PIL import Image

    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (300, 400), mode="bilinear")
    images = (smooth * 255).round().to(torch.uint8)
    resized = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((384, 288), Image.Resampling.BILINEAR)
    by_pillow = (
        torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
        - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert (preprocess_sscd(images) - by_pillow).abs().max() < 1.01 / 255 / 0.224  # it rounds to 1/255, twice


def test_it_is_an_extractor_like_the_others(tiny_file):
    extractor = build_extractor("sscd", tiny_file)
    assert isinstance(extractor, SSCDExtractor)
    assert (extractor.name, extractor.official) == ("sscd", False)
    images = pictures(5)
    features = extract_features(images, extractor, block=2)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert torch.equal(extract_features(images[3:], extractor, block=2), features[3:])
    grey = pictures(2, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert copy.deepcopy(extractor) is extractor
    assert torch.equal(pickle.loads(pickle.dumps(extractor))(images), extractor(images))
    first = extractor(images)
    assert all(torch.equal(extractor(images), first) for _ in range(4))  # no fusing after the first calls
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        extractor(pictures(2, channels=4))


def test_its_cosines_feed_the_memorization_scores(tiny_file):
    bank = pictures(20, seed=0)
    metric = MemorizationScores(bank, {"copy": (0.999, 2.0)}, extractor=SSCDExtractor(tiny_file))
    metric.update(torch.cat([bank[:3], pictures(5, seed=1)]))
    assert metric.compute()["average/copy"] == metric.compute()["unique/copy"] == 3 / 8


def test_official_is_decided_by_the_digest_of_the_file(tiny_file, monkeypatch):
    import hashlib

    from lightning_mem.metrics import sscd

    found = hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    assert SSCDExtractor(tiny_file).digest == found[:16]
    monkeypatch.setattr(sscd, "OFFICIAL_SSCD", found)
    assert SSCDExtractor(tiny_file).official


@pytest.mark.parametrize("module", [Writing, WritingWhenLoaded])
def test_a_program_that_writes_files_is_refused_before_torch_opens_it(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = scripted(module(), tmp_path / "evil.pt")
    trap = tmp_path / "trap-was-sprung"
    trap.unlink(missing_ok=True)
    with pytest.warns(FutureWarning, match="jit.load"):
        torch.jit.load(str(path))(torch.rand(1, 3, 4, 4))
    assert trap.exists()  # it is a trap
    trap.unlink()
    with pytest.raises(ValueError, match=r"evil\.pt is refused: its program names (__setstate__, )?save"):
        SSCDExtractor(path)
    assert not trap.exists()


def test_an_archive_with_two_entries_of_one_name_is_refused(tiny_file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tiny_file, "a") as archive:
            name = next(name for name in archive.namelist() if name.endswith(".py"))
            archive.writestr(name.upper(), "another program")
    with pytest.raises(ValueError, match="does not hold a TorchScript model"):
        SSCDExtractor(tiny_file)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Long, "its descriptors have lengths"),
        (Picture, r"it gives no [B, d] descriptors"),
        (Words, "it cannot take images (RuntimeError: Expected tensor"),
    ],
)
def test_another_model_is_refused(module, message, tmp_path):
    path = scripted(module(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=re.escape(f"{path} does not hold an SSCD model: {message}")):
        SSCDExtractor(path)


def test_missing_and_foreign_files_say_where_the_official_one_is(tmp_path):
    for build in (SSCDExtractor, lambda: build_extractor("sscd")):
        with pytest.raises(ValueError, match=re.escape(SSCD_ADDRESS) + ".*sscd-copy-detection.*option weights"):
            build()
    with pytest.raises(FileNotFoundError, match=r"absent\.pt, which is not there"):
        SSCDExtractor(tmp_path / "absent.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("not a model")
    for name in ("state.pt", "text.pt"):
        with pytest.raises(ValueError, match=rf"{name} does not hold a TorchScript model.*{re.escape(SSCD_ADDRESS)}"):
            SSCDExtractor(tmp_path / name)
    with pytest.raises(ValueError, match="short_side, square, got 'crop'"):
        SSCDExtractor(tmp_path / "text.pt", "crop")


def test_other_warnings_of_loading_are_not_hidden(tiny_file, monkeypatch):
    original = torch.jit.load

    def load(*given, **options):
        warnings.warn("something else", FutureWarning, stacklevel=2)
        return original(*given, **options)

    monkeypatch.setattr(torch.jit, "load", load)
    with pytest.warns(FutureWarning, match="something else") as found:
        SSCDExtractor(tiny_file)
    assert len(found) == 1
