import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CelebA

from lightning_mem.data.torchvision_sources import CelebASource, CIFAR10Source

PER_FILE = 3
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and pixels [n, 3, 32, 32] of one file."""
    rng = np.random.default_rng(sum(name.encode()))
    labels = rng.integers(0, 10, PER_FILE, dtype=np.uint8)
    return labels, rng.integers(0, 256, (PER_FILE, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """The binary version: per record one label, then 1024 red, 1024 green, 1024 blue, row by row."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*TRAIN, "test_batch"]:
        labels, pixels = batch(name)
        records = b"".join(
            bytes([label]) + r.tobytes() + g.tobytes() + b.tobytes()
            for label, (r, g, b) in zip(labels, pixels, strict=True)
        )
        (folder / f"{name}.bin").write_bytes(records)
    return folder


class OldDtype:
    """Pickles as the published files do: numpy of 2009 wrote dtype flags as integers."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The python version, with torchvision's list of MD5s set to these tiny files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name in [*TRAIN, "test_batch"]:
        labels, pixels = batch(name)
        content = pickle.dumps({"data": pixels.reshape(PER_FILE, -1), "labels": labels.tolist(), "dtype": OldDtype()})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in TRAIN])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize(
    ("split", "names"), [("train", TRAIN), ("test", ["test_batch"]), ("all", [*TRAIN, "test_batch"])]
)
def test_both_versions_of_cifar_come_back_with_their_channels_in_order(request, version, split, names):
    root = request.getfixturevalue(version).parent
    source = CIFAR10Source(str(root), split)
    source.open()
    pixels = np.concatenate([batch(name)[1] for name in names])
    assert len(source) == len(pixels)
    assert all((source.read(i, 32, 3) == image).all() for i, image in enumerate(pixels))
    assert source.labels().tolist() == np.concatenate([batch(name)[0] for name in names]).tolist()
    assert source.labels().dtype == np.int64
    assert (source.name, source.num_classes) == (f"cifar10-{split}", 10)
    assert source.describe() == f"cifar10-{split}: {len(pixels)} images, 10 true labels"


def test_the_binary_version_stays_on_disk(binary):
    source = CIFAR10Source(str(binary.parent))
    assert all(isinstance(pixels.base, np.memmap) for _, pixels in source._parts)


def test_missing_cifar_names_the_folder_the_address_and_both_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds neither .*kriz/cifar\.html.*download: true"):
        CIFAR10Source(str(tmp_path)).open()


def test_a_spoilt_binary_file_is_named(binary):
    file = binary / "data_batch_4.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"data_batch_4\.bin has {len(content) - 1} bytes"):
        CIFAR10Source(str(binary.parent)).open()
    file.write_bytes(content[:-3073])  # a whole record less
    with pytest.raises(ValueError, match=r"unequal length .*'data_batch_4.bin': 2"):
        CIFAR10Source(str(binary.parent)).open()
    file.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(ValueError, match=r"data_batch_4\.bin holds the label 10"):
        CIFAR10Source(str(binary.parent)).open()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin is missing"):
        CIFAR10Source(str(binary.parent)).open()


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_pickle_that_is_not_the_published_one_is_not_run(python, name):
    class Trap:
        def __reduce__(self):
            return (python / "sprung").touch, ()

    (python / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=rf"cifar-10-batches-py: {name} missing or not the published file"):
        CIFAR10Source(str(python.parent)).open()
    # and torchvision itself asks first, which is what the comment in the source relies on
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        CIFAR10(python.parent)
    assert not (python / "sprung").exists()


def refuse(*args: object) -> None:
    raise OSError("no network here")


def test_a_failed_download_says_where_to_put_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", refuse)
    monkeypatch.setattr(CelebA, "download", refuse)
    with pytest.raises(
        RuntimeError, match=r"CIFAR-10 .*no network here.*cifar\.html into .*cifar-10-batches-py by hand"
    ):
        CIFAR10Source(str(tmp_path), download=True).prepare()
    with pytest.raises(RuntimeError, match=r"CelebA .*no network here.*CelebA\.html into .*celeba by hand"):
        CelebASource(str(tmp_path), download=True).prepare()


def test_nothing_is_downloaded_when_not_asked_or_already_there(tmp_path, binary, celeba, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", refuse)
    monkeypatch.setattr(CelebA, "download", refuse)
    CIFAR10Source(str(tmp_path / "other")).prepare()
    CelebASource(str(tmp_path / "other")).prepare()
    CIFAR10Source(str(binary.parent), download=True).prepare()
    CelebASource(str(celeba.parent), attribute="Smiling", download=True).prepare()


# ---- CelebA

ATTRIBUTES = ["5_o_Clock_Shadow", "Smiling", "Young"]
FACES = [  # file, partition, attributes
    ("000001.jpg", 0, (-1, 1, 1)),
    ("000002.jpg", 0, (-1, -1, 1)),
    ("000003.jpg", 1, (1, 1, -1)),
    ("000004.jpg", 2, (-1, -1, -1)),
    ("000005.jpg", 0, (1, 1, 1)),
]


def face(number: int) -> np.ndarray:
    """178 wide, 218 high; red grows to the right, green downwards, blue says who it is."""
    y, x = np.indices((218, 178))
    return np.stack([x, y, np.full_like(x, 40 * number)], axis=-1).astype(np.uint8)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    for number, (file, _, _) in enumerate(FACES, start=1):
        Image.fromarray(face(number)).save(folder / "img_align_celeba" / file, quality=100, subsampling=0)
    (folder / "list_eval_partition.txt").write_text("".join(f"{file} {part}\n" for file, part, _ in FACES))
    rows = "".join(f"{file} {' '.join(f'{value:2d}' for value in values)}\n" for file, _, values in FACES)
    (folder / "list_attr_celeba.txt").write_text(f"{len(FACES)}\n{' '.join(ATTRIBUTES)} \n{rows}")
    return folder


@pytest.mark.parametrize(
    ("split", "who", "smiling"),
    [
        ("train", [1, 2, 5], [1, 0, 1]),
        ("valid", [3], [1]),
        ("test", [4], [0]),
        ("all", [1, 2, 3, 4, 5], [1, 0, 1, 0, 1]),
    ],
)
def test_celeba_is_split_by_its_partition_and_labelled_by_one_attribute(celeba, split, who, smiling):
    source = CelebASource(str(celeba.parent), split, attribute="Smiling")
    source.open()
    assert len(source) == len(who)
    assert [round(source.read(i, 8, 3)[2].mean() / 40) for i in range(len(who))] == who
    assert source.labels().tolist() == smiling
    assert source.labels().dtype == np.int64
    assert (source.name, source.num_classes) == (f"celeba-{split}", 2)


def test_the_crop_is_taken_from_the_centre_before_resizing(celeba):
    whole, cut = (CelebASource(str(celeba.parent), crop=crop).read(0, 140, 3) for crop in (None, 140))
    stored = np.asarray(Image.open(celeba / "img_align_celeba/000001.jpg"))
    assert (cut == stored[39:179, 19:159].transpose(2, 0, 1)).all()  # (218 - 140) / 2 and (178 - 140) / 2
    assert whole[0].min() < 5  # the whole width of the red ramp is in it, 0 to 177
    assert whole[0].max() > 172


def test_celeba_without_an_attribute_needs_no_list_of_them(celeba):
    (celeba / "list_attr_celeba.txt").unlink()
    source = CelebASource(str(celeba.parent))
    source.open()
    assert (source.labels(), source.num_classes) == (None, None)
    assert source.describe() == "celeba-train: 3 images, centre crop 140, no true labels"
    with pytest.raises(
        FileNotFoundError, match=rf"{celeba}/list_attr_celeba\.txt missing: .*CelebA\.html.*download: true"
    ):
        CelebASource(str(celeba.parent), attribute="Young").open()


def test_missing_celeba_names_every_missing_part(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba, .*list_eval_partition\.txt missing"):
        CelebASource(str(tmp_path)).open()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("list_eval_partition.txt", "000003.jpg 1", "000003.jpg 7", "line 3: '000003.jpg 7'"),
        ("list_eval_partition.txt", "000003.jpg 1", "000003.jpg", "line 3: '000003.jpg'"),
        ("list_eval_partition.txt", " 0", " 1", "lists no image of split train"),
        ("list_eval_partition.txt", "000002", "000099", r"lacks 1 of the 3 images .*first 000099\.jpg"),
        ("list_attr_celeba.txt", "Smiling", "Frowning", "one of 5_o_Clock_Shadow, Frowning, Young, got 'Smiling'"),
        ("list_attr_celeba.txt", "000002.jpg -1 -1  1", "000002.jpg -1", "line 4: expected .* 3 values"),
        ("list_attr_celeba.txt", "000002.jpg -1 -1  1", "000002.jpg -1 0 1", "line 4: expected"),
        ("list_attr_celeba.txt", "000005.jpg  1  1  1\n", "", "announces 5 images and lists 4"),
        ("list_attr_celeba.txt", "000005.jpg", "000006.jpg", r"lacks 1 images of split train, first 000005\.jpg"),
    ],
)
def test_a_spoilt_list_is_named_with_its_line(celeba, file, old, new, message):
    text = (celeba / file).read_text()
    assert old in text
    (celeba / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        CelebASource(str(celeba.parent), attribute="Smiling").open()


def test_an_empty_attribute_list_is_an_error_and_not_a_crash(celeba):
    (celeba / "list_attr_celeba.txt").write_text("")
    with pytest.raises(ValueError, match="got 'Smiling'"):
        CelebASource(str(celeba.parent), attribute="Smiling").open()


def test_settings_that_are_not_legal_are_refused_at_once(celeba):
    with pytest.raises(ValueError, match="one of train, test, all, got 'valid'"):
        CIFAR10Source(split="valid")
    with pytest.raises(ValueError, match="one of train, valid, test, all, got 'val'"):
        CelebASource(split="val")
    with pytest.raises(ValueError, match=r"at least 1 pixel.*got 0"):
        CelebASource(crop=0)
    with pytest.raises(ValueError, match=r"at most 178 for .*000001\.jpg, got 200"):
        CelebASource(str(celeba.parent), crop=200).read(0, 64, 3)
