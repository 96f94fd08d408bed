"""Of images that show the same one stays, whatever the order, the block, or the orientation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mem.data import ArraySource, Duplicates, MemorizationDataModule, deduplicate, duplicate_groups
from lightning_mem.data.split import ImageSet, image_digest


def part(images: np.ndarray, order: np.ndarray | None = None) -> ImageSet:
    rows = np.arange(len(images)) if order is None else order
    found = torch.from_numpy(images[rows])
    return ImageSet(found, torch.from_numpy(rows), tuple(image_digest(image) for image in found.numpy()))


def noisy(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Images around a few centres, some mirrored: distances of every size."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(40, 216, (6, *shape))
    images = centres[rng.integers(6, size=count)] + rng.integers(-30, 31, (count, *shape))
    images[::3] = images[::3, ..., ::-1]
    return images.astype(np.uint8)


def by_hand(images: np.ndarray, delta: float, mirror: bool) -> dict[int, list[tuple[int, float]]]:
    """The definition, one pair at a time, in float64."""
    kept: list[int] = []
    groups: dict[int, list[tuple[int, float]]] = {}
    for row, image in enumerate(images / 255):
        others = {}
        for other in kept:
            looks = [images[other] / 255, images[other, ..., ::-1] / 255][: 1 + mirror]
            others[other] = min(float(np.sqrt(np.mean((image - look) ** 2))) for look in looks)
        nearest = min(others, key=lambda other: others[other], default=None)
        if nearest is None or others[nearest] > delta:
            kept.append(row)
        else:
            groups.setdefault(nearest, []).append((row, others[nearest]))
    return groups


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("delta", [0.094, 0.098, 0.25])
def test_groups_are_those_of_the_definition_in_any_order_and_block(
    delta: float, mirror: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noisy(60, (2, 11, 9))
    expected = by_hand(images, delta, mirror)
    assert 0 < sum(map(len, expected.values())) < 60
    groups = duplicate_groups(part(images), delta, mirror)
    assert {g.kept: list(g.removed) for g in groups} == {k: [r for r, _ in v] for k, v in expected.items()}
    for group in groups:
        np.testing.assert_allclose(group.distances, [d for _, d in expected[group.kept]], rtol=1e-12)
    shuffled = part(images, np.random.default_rng(1).permutation(60))
    monkeypatch.setattr(deduplicate, "BYTES", 8 * 198 * 7)
    assert duplicate_groups(shuffled, delta, mirror) == groups


def test_a_sketch_never_puts_images_further_apart_than_they_are() -> None:
    images = noisy(30, (1, 20, 13))
    flat = images.reshape(30, -1).astype(np.float64)
    true = ((flat[:, None] - flat[None]) ** 2).sum(2)
    cells = deduplicate.sketch(torch.from_numpy(images)).numpy()
    below = ((cells[:, None] - cells[None]) ** 2).sum(2)
    assert (below <= true + 1e-6).all()
    assert below[true > 0].min() > 0
    plain = np.full((2, 1, 20, 13), 10, dtype=np.uint8)
    plain[1] += 5  # even pictures: the bound is met
    a, b = deduplicate.sketch(torch.from_numpy(plain))
    assert float((a - b).square().sum()) == pytest.approx(25 * 20 * 13, rel=1e-12)


def test_a_distance_that_equals_the_threshold_counts() -> None:
    images = np.zeros((2, 1, 4, 4), dtype=np.uint8)
    images[1] += 51  # 0.2 away
    assert [g.removed for g in duplicate_groups(part(images), 0.2, False)] == [(1,)]
    assert duplicate_groups(part(images), 0.1999, False) == []


def test_a_chain_is_no_group_unless_its_first_is_near_to_all() -> None:
    images = np.stack([np.full((1, 4, 4), level, dtype=np.uint8) for level in (100, 120, 140, 160)])
    groups = duplicate_groups(part(images), 20 / 255, False)
    assert [(g.kept, g.removed) for g in groups] == [(0, (1,)), (2, (3,))]


def source(copies: np.ndarray) -> ArraySource:
    np.save("images.npy", copies)
    return ArraySource("images.npy")


def copied(mirrored: bool = False) -> ArraySource:
    """40 images of 8 x 8, of which 30 to 39 equal 0 to 9, or are their mirror images."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    images[30:] = images[:10, :, ::-1] if mirrored else images[:10]
    return source(images)


def module(**options) -> MemorizationDataModule:
    given = {"image_size": 8, "num_members": 32, "num_heldout": 4, "batch_size": 8, **options}
    data = MemorizationDataModule(**given)
    data.setup()
    return data


@pytest.mark.parametrize("rule", ["exact", 0.01])
def test_members_are_drawn_first_and_heldout_images_stay_the_same(rule: str | float) -> None:
    plain, data = module(source=copied()), module(source=copied(), deduplicate=rule)
    drawn = set(plain.members.indices.tolist())
    twice = {index for index in drawn if index >= 30 and index - 30 in drawn}
    assert len(twice) > 3
    assert set(data.members.indices.tolist()) == drawn - twice
    assert data.removed is not None
    assert set(data.removed.indices.tolist()) == twice
    assert data.heldout.digest == plain.heldout.digest
    assert plain.removed is None
    order = [index for index in plain.members.indices.tolist() if index not in twice]
    assert data.members.indices.tolist() == order


def test_mirror_images_count_where_training_flips_and_only_there() -> None:
    for rule in ("exact", 0.01):
        assert len(module(source=copied(mirrored=True), deduplicate=rule).members) == 32
        data = module(source=copied(mirrored=True), deduplicate=rule, flip=True)
        assert len(data.members) == 32 - len(data.duplicate_groups) < 30


def test_a_run_folder_says_which_images_went_for_which(tmp_path: Path) -> None:
    data = module(source=copied(), deduplicate="exact")
    data.write_members(tmp_path)
    written = json.loads((tmp_path / "duplicates.json").read_text())
    assert written["settings"]["deduplicate"] == "exact"
    assert all(group["removed"] == [group["kept"] + 30] for group in written["groups"])
    assert all(group["distances"] == [0.0] for group in written["groups"])
    members = json.loads((tmp_path / "members.json").read_text())
    assert members["removed"]["indices"] == data.removed.indices.tolist()
    again = module(source=copied(), num_members=None, members=str(tmp_path / "members.json"))
    assert again.members.digest == data.members.digest
    (other := tmp_path / "plain").mkdir()
    module(source=copied()).write_members(other)
    assert not (other / "duplicates.json").exists()
    assert "removed" not in json.loads((other / "members.json").read_text())


@pytest.mark.parametrize("flip", [False, True])
def test_fresh_images_are_none_that_was_trained_on_taken_out_or_held_out(flip: bool) -> None:
    options = {
        "source": copied(mirrored=flip),
        "flip": flip,
        "deduplicate": "exact",
        "num_members": 25,
        "num_heldout": 3,
    }
    data = module(**options, labels="random", num_classes=5)
    fresh = data.fresh(100)
    known = torch.cat([data.members.indices, data.heldout.indices, data.removed.indices])
    assert len(data.removed) > 0
    assert len(data.removed) + len(data.members) == 25
    # 0 to 9 equal 30 to 39, or are their mirror images: known where the other one is
    pictures = {index % 30 for index in known.tolist()}
    expected = {index for index in range(40) if index % 30 not in pictures}
    assert set(fresh.indices.tolist()) == expected
    assert 0 < len(expected) < 12 == 40 - 25 - 3
    assert set(data.fresh(4).indices.tolist()) <= expected
    assert fresh.labels is not None
    assert len(fresh.labels) == len(fresh)


def test_labels_stay_with_their_images() -> None:
    options = {"source": copied(), "labels": "random", "num_classes": 5}
    plain, data = module(**options), module(**options, deduplicate="exact")
    labels = dict(zip(plain.members.indices.tolist(), plain.members.labels.tolist(), strict=True))
    assert [labels[index] for index in data.members.indices.tolist()] == data.members.labels.tolist()


def test_repeats_that_were_put_in_are_taken_out_too() -> None:
    repeats = Duplicates(count=3, times=5)
    data = module(source=copied(), duplicates=repeats, deduplicate="exact")
    n = len(data.members)
    data.batch_size = n
    batch = next(iter(data.train_dataloader()))  # one pass
    assert sorted(batch["index"].tolist()) == sorted(data.members.indices.tolist())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("near", "must be exact, a distance"),
        (1.0, r"must lie in \(0, 1\) .*, got 1.0"),
        (0.0, r"or be exact, got 0.0"),
        (float("nan"), "got nan"),
    ],
)
def test_what_is_no_rule_is_refused(rule: str | float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorizationDataModule(deduplicate=rule)


def test_a_class_of_its_own_for_each_member_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unique .* deduplicate takes some out"):
        MemorizationDataModule(labels="unique", deduplicate="exact")


def test_digits_hold_the_near_duplicates_that_the_manual_says() -> None:
    for delta, gone in ((0.08, 6), (0.1, 52)):
        data = MemorizationDataModule(num_members=1024, num_heldout=0, deduplicate=delta)
        data.setup()
        assert 1024 - len(data.members) == gone
