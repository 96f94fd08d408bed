"""Two lists: the split is exactly what the user listed, and what cannot be one is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mem.data import CSVSource, FolderSource, ListedSource, MemorizationDataModule
from lightning_mem.data.split import image_digest


def pictures(count: int, seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def folder(name: str, images: np.ndarray, subfolders: tuple[str, ...] = ("",)) -> str:
    for number, image in enumerate(images):
        file = Path(name) / subfolders[number % len(subfolders)] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    return name


def table(name: str, images: np.ndarray, **columns: list[str]) -> str:
    """A CSV beside a folder of its images, which it names in reverse."""
    folder(f"{Path(name).stem}_images", images)
    lines = [",".join(["file", *columns])]
    for row, number in enumerate(reversed(range(len(images)))):
        lines.append(",".join([f"{Path(name).stem}_images/{number:02d}.png", *(c[row] for c in columns.values())]))
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def module(members: str, heldout: str, **options: object) -> MemorizationDataModule:
    given = {"num_members": None, "num_heldout": None, "image_size": 8, **options}
    data = MemorizationDataModule(ListedSource(members, heldout), **given)
    data.setup()
    return data


def digests(images: np.ndarray) -> list[str]:
    return [image_digest(image.transpose(2, 0, 1)) for image in images]


MEMBERS, HELDOUT = pictures(7, 0), pictures(5, 1)


def listed(kind: str, name: str, images: np.ndarray) -> str:
    if kind == "array":
        np.save(f"{name}.npy", images)
        return f"{name}.npy"
    return folder(name, images) if kind == "folder" else table(f"{name}.csv", images)


@pytest.mark.parametrize("kinds", [("folder", "array"), ("array", "csv"), ("csv", "folder")])
def test_members_are_the_first_list_and_heldout_images_the_second(kinds: tuple[str, str]) -> None:
    own, other = listed(kinds[0], "own", MEMBERS), listed(kinds[1], "other", HELDOUT)
    data = module(own, other, seed=3)
    orders = [slice(None, None, -1 if kind == "csv" else 1) for kind in kinds]
    assert list(data.members.digests) == digests(MEMBERS[orders[0]])
    assert list(data.heldout.digests) == digests(HELDOUT[orders[1]])
    assert data.members.indices.tolist() == list(range(7))
    assert data.heldout.indices.tolist() == list(range(7, 12))
    data.write_members(Path())
    written = json.loads(Path("members.json").read_text())
    assert [len(written[side]["indices"]) for side in ("members", "heldout")] == [len(MEMBERS), len(HELDOUT)]
    assert data.settings()["source"] == data.source.name
    assert data.source.describe().count("images") == 2


def test_numbers_draw_so_many_of_each_list_and_a_smaller_draw_is_part_of_a_larger() -> None:
    own, other = listed("array", "own", MEMBERS), listed("array", "other", HELDOUT)
    small, large = module(own, other, num_members=2, num_heldout=3), module(own, other, num_members=4, num_heldout=4)
    assert (len(small.members), len(small.heldout), len(large.members)) == (2, 3, 4)
    assert set(small.members.digests) < set(large.members.digests) < set(digests(MEMBERS))
    assert set(small.heldout.digests) < set(large.heldout.digests) < set(digests(HELDOUT))
    assert module(own, other, num_members=4, seed=1).members.digest != large.members.digest
    with pytest.raises(ValueError, match=r"num_heldout is 6, but the list other.npy has 5 images"):
        module(own, other, num_heldout=6)


def test_an_image_in_both_lists_is_refused_by_count_and_file() -> None:
    own = folder("own", MEMBERS)
    other = listed("array", "other", np.concatenate([HELDOUT, MEMBERS[[6, 2]]]))
    with pytest.raises(
        ValueError, match=r"2 of 7 held-out images .*image 5 of array:other.npy equals own/06.png, image 6"
    ):
        module(own, other)
    mirrored = listed("array", "mirrored", np.concatenate([HELDOUT, MEMBERS[:1, :, ::-1]]))
    assert len(module(own, mirrored).heldout) == 6
    with pytest.raises(ValueError, match=r"1 of 6 held-out images equal a member.*equals own/00.png"):
        module(own, mirrored, flip=True)


def test_images_of_other_sizes_are_warned_of_and_of_the_same_sizes_not() -> None:
    own, other = folder("own", pictures(20, 0, 12)), folder("other", pictures(20, 1, 12))
    module(own, other)
    large = listed("array", "large", pictures(20, 2, 32))
    with pytest.warns(UserWarning, match=r"different sizes \(medians 12 x 12 and 32 x 32 pixels, two-sample test p = "):
        module(own, large)


def test_captions_and_labels_follow_their_images() -> None:
    own = table("own.csv", MEMBERS, caption=[f"member {row}" for row in range(7)], label=list("0123120"))
    other = table("other.csv", HELDOUT, caption=[f"other {row}" for row in range(5)], label=list("33210"))
    data = module(own, other, num_members=3, labels="true", num_classes=10)
    captions = data.captions()
    assert captions is not None
    assert captions[0] == [f"member {row}" for row in data.members.indices.tolist()]
    assert captions[1] == [f"other {row}" for row in range(5)]
    assert data.members.labels is not None
    assert data.heldout.labels is not None
    assert data.members.labels.tolist() == [int("0123120"[row]) for row in data.members.indices.tolist()]
    assert data.heldout.labels.tolist() == [3, 3, 2, 1, 0]
    assert data.source.num_classes == 4
    assert module(listed("array", "plain", MEMBERS), folder("bare", HELDOUT)).captions() is None


def test_subfolders_of_heldout_images_are_the_classes_of_the_members() -> None:
    own = folder("own", MEMBERS, ("ant", "bee", "cat"))
    data = module(own, folder("other", HELDOUT, ("cat", "bee")), labels="true")
    assert data.heldout.labels is not None
    names = [path.parent.name for path in (data.source.path_of(i) for i in data.heldout.indices.tolist()) if path]
    assert [("ant", "bee", "cat")[label] for label in data.heldout.labels.tolist()] == names
    assert data.source.num_classes == 3
    with pytest.raises(ValueError, match=r"subfolders dog, which own has not \(ant, bee, cat\)"):
        module(own, folder("foreign", HELDOUT, ("dog",)), labels="true")
    np.savez("numbers.npz", HELDOUT, np.arange(5))
    with pytest.raises(ValueError, match="subfolders in one list and numbers in the other"):
        module(own, "numbers.npz", labels="true")


def test_missing_captions_are_named_by_file_and_row() -> None:
    own = table("own.csv", MEMBERS, caption=["a", "b", "", "d", " ", "f", "g"])
    other = table("other.csv", HELDOUT)
    with pytest.raises(
        ValueError, match=r"2 of 7 captions of own.csv are missing, the first in row 3 \(own_images/04.png"
    ):
        module(own, other).captions()
    whole = table("whole.csv", pictures(3, 9), caption=["a", "b", "c"])
    with pytest.raises(ValueError, match="whole.csv has captions and other.csv has none"):
        module(whole, other).captions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\na.png,x\n", r"bad.csv must have a column file, got path, caption"),
        ("file\n", "bad.csv names no image"),
        ("file\na.png\nb.png\n", r"bad.csv, row 2: there is no file 'b.png' in "),
        ("file\na.png\n./a.png\n", r"names ./a.png in row 1 and row 2"),
        ("file,label\na.png,-1\n", r"row 1: a label is 0, 1, ..., got '-1'"),
        ("file\n\x00\xff", "cannot be read as CSV in UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused_by_row(text: str, message: str) -> None:
    Image.fromarray(MEMBERS[0, :, :, 0]).save("a.png")
    Path("bad.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        CSVSource("bad.csv").labels()


def test_what_is_no_list_is_refused() -> None:
    folder("own", MEMBERS)
    with pytest.raises(ValueError, match=r"a folder, an .npz or .npy file or a .csv, and 'other.zip' is none"):
        module("own", "other.zip")
    with pytest.raises(FileNotFoundError, match="there is no file other.csv"):
        module("own", "other.csv")
    with pytest.raises(ValueError, match=r"the source lists both sides itself: leave them null, got None and 'x.json'"):
        MemorizationDataModule(ListedSource("own", "own"), image_size=8, heldout="x.json")
    with pytest.raises(ValueError, match="a FolderSource lists none: say how many"):
        MemorizationDataModule(FolderSource("own"), image_size=8, num_heldout=None)
    with pytest.raises(ValueError, match="path must name a .csv file, got 'own'"):
        CSVSource("own")


def test_lists_hold_the_same_pixels_in_colour_and_the_files_they_came_from() -> None:
    source = ListedSource(table("own.csv", MEMBERS), listed("array", "other", HELDOUT))
    np.testing.assert_array_equal(source.read(0, 8, 3), MEMBERS[6].repeat(3, 2).transpose(2, 0, 1))
    assert source.path_of(0) == Path("own_images/06.png")
    assert source.path_of(8) is None
    with pytest.raises(IndexError, match="got index 12"):
        source.read(12, 8, 1)
