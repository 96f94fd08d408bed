import os
import random
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mem.data.folder import FolderSource, read_image


def write(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8) if pixels is None else pixels).save(path, **options)
    return path


def png16(path: Path, pixels: np.ndarray, colour_type: int, transparent: int | None = None) -> Path:
    """A 16-bit PNG by the specification (Pillow writes only grey ones)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tif", "tiff", "gif", "webp"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    pixels = np.array([[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [255, 255, 255]]], np.uint8)
    write(tmp_path / f"a.{suffix}", pixels, **({"lossless": True} if suffix == "webp" else {}))
    assert (FolderSource(str(tmp_path)).read(0, 2, 3) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG"])
def test_an_exif_rotated_photograph_comes_out_upright(tmp_path, suffix):
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 240  # bright sky above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise to see it upright
    write(tmp_path / f"a.{suffix}", np.rot90(upright).copy(), quality=100, exif=exif)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.size == (8, 16)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 2  # JPEG's own rounding


@pytest.mark.parametrize(
    ("colour", "alpha", "expected"),
    [
        ((10, 20, 30), 255, [10, 20, 30]),
        ((10, 20, 30), 0, [255, 255, 255]),
        ((0, 100, 255), 51, [204, 224, 255]),  # one fifth: 204, 20 + 204, 255
    ],
)
def test_transparency_is_composited_on_white(tmp_path, colour, alpha, expected):
    write(tmp_path / "a.png", np.array([[[*colour, alpha]]], np.uint8))
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0].tolist() == expected


def test_compositing_is_the_rounded_formula_for_every_value():
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([colour, colour, colour, alpha], axis=-1).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        result = np.asarray(read_image(write(Path(folder) / "a.png", pixels)))[..., 0]
    assert (result == np.floor((colour * alpha + 255.0 * (255 - alpha)) / 255 + 0.5)).all()


def test_a_grey_image_with_alpha_and_a_palette_with_a_transparent_colour(tmp_path):
    write(tmp_path / "la.png", np.array([[[100, 0], [100, 255]]], np.uint8))
    assert np.asarray(read_image(tmp_path / "la.png"))[0].tolist() == [[255] * 3, [100] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 128, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "keyed.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "opaque.png"))[0].tolist() == [[255, 0, 0], [0, 128, 255]]
    assert np.asarray(read_image(tmp_path / "keyed.png"))[0].tolist() == [[255, 255, 255], [0, 128, 255]]


DEEP = {0: 0, 128: 0, 129: 1, 257: 1, 32895: 128, 32896: 128, 65406: 254, 65407: 255, 65535: 255}  # round(x / 257)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", np.array([list(DEEP)], np.uint16))
    assert np.asarray(read_image(tmp_path / f"a.{suffix}"))[0].tolist() == list(DEEP.values())


def test_a_32_bit_tiff_of_16_bit_values_is_scaled_and_others_are_refused(tmp_path):
    write(tmp_path / "a.tif", np.array([list(DEEP)], np.int32))
    assert np.asarray(read_image(tmp_path / "a.tif"))[0].tolist() == list(DEEP.values())
    write(tmp_path / "b.tif", np.array([[-5, 70000]], np.int32))
    with pytest.raises(ValueError, match=r"b\.tif .*values -5 to 70000 are not 16-bit"):
        read_image(tmp_path / "b.tif")
    write(tmp_path / "c.tif", np.array([[0.0, 1.0]], np.float32))
    with pytest.raises(ValueError, match=r"c\.tif .*floats"):
        read_image(tmp_path / "c.tif")


def test_16_bit_colour_and_transparency_keys(tmp_path):
    colour = np.array([[[0, 257, 32896], [65535, 32895, 200]]], np.uint16)
    found = np.asarray(read_image(png16(tmp_path / "rgb.png", colour, colour_type=2))).astype(int)
    assert np.abs(found - np.rint(colour / 257)).max() <= 1  # Pillow keeps the high byte
    grey = png16(tmp_path / "keyed.png", np.array([[0, 300, 65535]], np.uint16), colour_type=0, transparent=300)
    assert np.asarray(read_image(grey))[0].tolist() == [0, 255, 255]


def test_cmyk_and_bilevel_images_are_converted(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - [0, 255, 255]).max() <= 2
    bilevel = Image.new("1", (2, 1))
    bilevel.putpixel((1, 0), 1)
    bilevel.save(tmp_path / "b.png")
    assert np.asarray(read_image(tmp_path / "b.png")).tolist() == [[0, 255]]


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (FolderSource(str(tmp_path)).read(0, 4, 1) == 50).all()


def test_subfolders_are_labels_in_sorted_order(tmp_path):
    for file in ("dog/2.png", "cat/deep/er/9.png", "cat/1.png", "ant/5.png"):
        write(tmp_path / file)
    source = FolderSource(str(tmp_path))
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels().tolist() == [0, 1, 1, 2]
    assert source.labels().dtype == np.int64
    assert [source.path_of(i).relative_to(tmp_path).as_posix() for i in range(4)] == [
        "ant/5.png", "cat/1.png", "cat/deep/er/9.png", "dog/2.png",
    ]  # fmt: skip
    assert source.name == f"folder:{tmp_path.name}"
    assert source.describe().endswith("4 images, 3 true labels (ant, cat, dog)")


def test_without_subfolders_or_with_images_beside_them_there_are_no_labels(tmp_path):
    write(tmp_path / "1.png")
    flat = FolderSource(str(tmp_path))
    assert (flat.labels(), flat.num_classes, flat.classes) == (None, None, None)
    assert "no subfolders" in flat.describe()
    write(tmp_path / "cat/2.png")
    mixed = FolderSource(str(tmp_path))
    assert (len(mixed), mixed.labels(), mixed.num_classes) == (2, None, None)
    assert "1 images lie beside the subfolders" in mixed.describe()


NAMES = st.lists(st.text("abAB01.-", min_size=1, max_size=4), min_size=1, max_size=2).map("/".join)


@settings(max_examples=25)
@given(st.sets(NAMES.filter(lambda name: ".." not in name), min_size=1, max_size=6), st.integers(0, 2**32))
def test_order_and_labels_do_not_depend_on_the_order_of_creation(names, seed):
    seen = []
    for shuffle in (False, True):
        order = sorted(names)
        if shuffle:
            random.Random(seed).shuffle(order)
        with tempfile.TemporaryDirectory() as folder:
            for name in order:
                path = Path(folder, "root", *(f"x{part}" for part in name.split("/")))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(path.name + "_.png").touch()
            source = FolderSource(os.path.join(folder, "root"))
            labels = source.labels()
            files = [source.path_of(i).relative_to(folder).as_posix() for i in range(len(source))]
            seen.append((files, None if labels is None else labels.tolist()))
            assert files == sorted(files)
            assert len(files) == len(names)
    assert seen[0] == seen[1]


def test_hidden_and_other_files_are_ignored(tmp_path):
    for file in ("a.png", ".b.png", ".cache/c.png", "._d.jpg"):
        write(tmp_path / file)
    (tmp_path / "notes.txt").write_text("x")
    source = FolderSource(str(tmp_path))
    assert len(source) == 1
    assert source.path_of(0).name == "a.png"


def test_links_are_followed_and_a_loop_is_named(tmp_path):
    write(tmp_path / "elsewhere/a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert FolderSource(str(tmp_path / "root")).classes == ("cat",)
    (tmp_path / "root/again").symlink_to(tmp_path / "root", target_is_directory=True)
    with pytest.raises(ValueError, match=r"root/again links to the folder"):
        FolderSource(str(tmp_path / "root")).open()


def test_a_missing_folder_a_file_and_a_folder_without_images_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        FolderSource(str(tmp_path / "nowhere")).open()
    with pytest.raises(ValueError, match=r"a\.png is a file \(ArraySource"):
        FolderSource(str(write(tmp_path / "a.png"))).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image: found no files"):
        FolderSource(str(tmp_path / "empty")).open()
    for name in ("a.txt", "b.txt", "c.npz", "README"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ValueError, match=r"found 2 \.txt, 1 .*legal are \.png \.jpg"):
        FolderSource(str(tmp_path / "empty")).open()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
@pytest.mark.parametrize("share", [0, 0.02, 0.6])
def test_a_truncated_image_names_its_file(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = write(tmp_path / f"photo7.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"photo7\.{suffix} cannot be read as an image"):
        FolderSource(str(tmp_path)).read(0, 8, 3)


def test_a_text_file_with_an_image_suffix_and_a_file_that_went_away_are_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    write(tmp_path / "z.png")
    source = FolderSource(str(tmp_path))
    with pytest.raises(ValueError, match=r"page\.jpg cannot be read as an image"):
        source.read(0, 8, 3)
    source.path_of(1).unlink()
    with pytest.raises(ValueError, match=r"z\.png .*No such file"):
        source.read(1, 8, 3)
