import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from lightning_mem.data.sources import ArraySource, DigitsSource, fit_image
from lightning_mem.types import SampleSet


def test_digits_are_sklearns_values_scaled_once():
    source, truth = DigitsSource(), load_digits()
    assert len(source) == 1797
    assert source.num_classes == 10
    # the first row of the first digit is 0 0 5 13 9 1 0 0 of 16
    assert source.read(0, 8, 1)[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    scaled = {0: 0, 4: 64, 8: 128, 12: 191, 16: 255}  # by hand: 63.75, 127.5 (to even), 191.25
    for value, expected in scaled.items():
        index, row, column = np.argwhere(truth.images == value)[0]
        assert source.read(int(index), 8, 1)[0, row, column] == expected
    assert source.labels().dtype == np.int64
    assert source.labels().tolist() == truth.target.tolist()
    assert source.describe() == "digits: 1797 images, 10 true labels"


def test_a_changed_result_does_not_change_the_source():
    source = DigitsSource()
    before = source.read(3, 8, 1).copy()
    source.read(3, 8, 1)[:] = 7
    source.labels()[:] = 7
    assert (source.read(3, 8, 1) == before).all()
    assert source.labels()[0] == 0


@pytest.mark.parametrize("index", [-1, 1797])
def test_an_index_outside_is_an_error_and_not_another_image(index):
    with pytest.raises(IndexError, match=f"0 to 1796, got index {index}"):
        DigitsSource().read(index, 8, 1)


def test_a_source_sent_to_another_process_leaves_its_pixels_behind():
    source = DigitsSource()
    source.open()
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert (pickle.loads(sent).read(5, 8, 1) == source.read(5, 8, 1)).all()


# ---- fit_image


@given(st.integers(1, 12), st.sampled_from([1, 3]), st.randoms(use_true_random=False))
def test_an_image_of_the_right_size_is_not_touched(size, channels, random):
    pixels = np.array([random.randrange(256) for _ in range(size * size * channels)], dtype=np.uint8)
    pixels = pixels.reshape(size, size, channels)
    assert (fit_image(pixels, size, channels) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("upright", [True, False])
def test_the_centre_of_a_gradient_is_cut_without_resampling(upright):
    wide = np.tile(np.arange(11, dtype=np.uint8) * 20, (4, 1))  # 4 high, 11 wide
    image = wide.T if upright else wide
    result = fit_image(image, 4, 1)[0]
    expected = np.tile(np.arange(3, 7, dtype=np.uint8) * 20, (4, 1))  # (11 - 4) // 2 = 3
    assert (result == (expected.T if upright else expected)).all()


def test_resizing_is_pillows_antialiased_bicubic_of_the_short_side():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize((20, 12), Image.Resampling.BICUBIC))
    assert (fit_image(pixels, 12, 3) == whole[:, 4:16].transpose(2, 0, 1)).all()
    # antialiased: a checkerboard shrunk four times is grey, not black or white
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(fit_image(board, 8, 1)[0, 2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_a_constant_image_stays_constant_at_any_size():
    for size in (1, 7, 64):
        assert (fit_image(np.full((9, 13, 3), 201, np.uint8), size, 3) == 201).all()


def test_grey_is_itu_r_601_luma():
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)
    exact = colours @ np.array([0.299, 0.587, 0.114])  # 76.245 149.685 29.07 18.15
    assert (fit_image(colours, 2, 1)[0] == np.rint(exact)).all()


def test_grey_becomes_colour_by_repetition_and_comes_back_unchanged():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = fit_image(grey, 16, 3)
    assert (colour == grey).all()
    assert colour.shape == (3, 16, 16)
    assert (fit_image(colour.transpose(1, 2, 0), 16, 1)[0] == grey).all()


@pytest.mark.parametrize(
    ("image", "size", "channels", "message"),
    [
        (np.zeros((4, 4), np.uint8), 0, 1, "image_size must be at least 1, got 0"),
        (np.zeros((4, 4), np.uint8), 4, 2, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        (np.zeros((4, 4), np.float32), 4, 1, r"uint8 .*, got float32 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), 4, 1, r"got uint8 \[4, 4, 4\]"),
        (np.zeros((0, 4), np.uint8), 4, 1, "at least one pixel, got 4 x 0"),
        (Image.new("CMYK", (4, 4)), 4, 3, "mode L or RGB, got CMYK"),
    ],
)
def test_what_cannot_be_fitted_is_refused(image, size, channels, message):
    with pytest.raises(ValueError, match=message):
        fit_image(image, size, channels)


# ---- ArraySource


def images(n: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 6, 6, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_npy_stays_on_disk(tmp_path, channels):
    np.save(tmp_path / "a.npy", images(channels=channels))
    source = ArraySource(str(tmp_path / "a.npy"))
    assert isinstance(source._arrays[0], np.memmap)
    assert (source.read(4, 6, channels) == images(channels=channels)[4].transpose(2, 0, 1)).all()
    assert (len(source), source.labels(), source.num_classes, source.name) == (5, None, None, "array:a.npy")


@pytest.mark.parametrize("key", ["labels", "arr_1"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_brings_its_labels(tmp_path, key, save):
    save(tmp_path / "a.npz", arr_0=images(), **{key: np.array([0, 3, 3, 1, 0], np.int32)})
    source = ArraySource(str(tmp_path / "a.npz"))
    assert (source.read(2, 6, 3) == images()[2].transpose(2, 0, 1)).all()
    assert source.labels().tolist() == [0, 3, 3, 1, 0]
    assert source.labels().dtype == np.int64
    assert source.describe() == "array:a.npz: 5 images, 4 true labels"


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 0, 1, 1, 0])])
def test_a_sample_set_is_a_source(tmp_path, labels):
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    SampleSet(pixels, torch.arange(5), labels).save(tmp_path / "samples.npz")
    source = ArraySource(str(tmp_path / "samples.npz"))
    assert all((source.read(i, 6, 3) == pixels[i].numpy()).all() for i in range(5))
    assert source.num_classes == (None if labels is None else 2)


def spoilt(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[3, 2, 1, 0] = np.nan
    return array


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (images().astype(np.float32), r"float32 \[5, 6, 6, 3\]: quantise it first"),
        (spoilt(images()), r"float32 \[5, 6, 6, 3\] and holds NaN"),
        (images().astype(np.int64), r"int64 \[5, 6, 6, 3\]; legal is uint8 \[N, H, W, C\] with C 1 or 3"),
        (images().transpose(0, 3, 1, 2), r"uint8 \[5, 3, 6, 6\], which looks like \[N, C, H, W\]"),
        (images()[0], r"uint8 \[6, 6, 3\]; legal"),
        (images()[:0], r"uint8 \[0, 6, 6, 3\], no images"),
        (np.array([{"a": 1}, None]), r"object \[2\], pickled Python objects, which are not read"),
        (np.zeros(5, dtype=[("x", "u1")]), r"\[5\]; legal"),
    ],
)
def test_another_layout_is_named(tmp_path, suffix, array, message):
    path = tmp_path / f"other.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        np.savez(path, arr_0=array)
    with pytest.raises(ValueError, match=rf"other\.{suffix} holds .*{message}"):
        ArraySource(str(path)).open()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("kept", [0, 20, 300])
def test_a_truncated_file_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"cut.{suffix}"
    if suffix == "npy":
        np.save(path, images())
    else:
        np.savez(path, arr_0=images())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is truncated or not a numpy file"):
        ArraySource(str(path)).open()


def test_a_flipped_byte_in_an_archive_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=images())
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is truncated .*CRC"):
        ArraySource(str(path)).open()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images()}, r"holds no arr_0, only \{'images': 'uint8 \[5, 6, 6, 3\]'\}"),
        ({"arr_0": images(), "labels": np.zeros(4, int)}, r"labels as int64 \[4\], .* integers \[5\]"),
        ({"arr_0": images(), "arr_1": np.zeros(5)}, r"arr_1 as float64 \[5\]"),
        ({"arr_0": images(), "labels": np.array([0, 1, -2, 0, 0])}, "holds the label -2"),
    ],
)
def test_an_archive_without_images_or_with_other_labels_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        ArraySource(str(tmp_path / "a.npz")).open()


def test_nothing_in_a_pickle_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path(tmp_path / "sprung").touch, ()

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("trap", "bare"):
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            ArraySource(str(tmp_path / f"{name}.npy")).open()
    assert not (tmp_path / "sprung").exists()


def test_a_path_of_another_kind_is_refused_at_once_and_a_missing_one_when_opened(tmp_path):
    with pytest.raises(ValueError, match=r"\.npz or \.npy file, got 'photos/': use FolderSource"):
        ArraySource("photos/")
    source = ArraySource(str(tmp_path / "later.npz"))
    with pytest.raises(FileNotFoundError, match=r"later\.npz"):
        source.open()
