"""Members, held-out images and batches are what (seed, step) says, whatever else changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mem.data import ArraySource, DigitsSource, Duplicates, MemorizationDataModule
from lightning_mem.data.batches import AddressedOrder, EvaluationBlocks, TrainBatches
from lightning_mem.types import to_float


def module(**options) -> MemorizationDataModule:
    data = MemorizationDataModule(**{"num_members": 20, "num_heldout": 30, "batch_size": 8, **options})
    data.setup()
    return data


def test_members_and_heldout_are_disjoint_and_from_the_source() -> None:
    data = module()
    assert not set(data.members.indices.tolist()) & set(data.heldout.indices.tolist())
    source = DigitsSource()
    for part in (data.members, data.heldout):
        for index, image in zip(part.indices.tolist(), part.images, strict=True):
            assert np.array_equal(source.read(index, 8, 1), image.numpy())


def test_a_smaller_set_is_contained_in_a_larger_one() -> None:
    small, large = module(), module(num_members=40)
    assert large.members.indices[:20].tolist() == small.members.indices.tolist()
    assert module(seed=1).members.indices.tolist() != small.members.indices.tolist()


def test_null_takes_all_that_are_not_held_out() -> None:
    data = module(num_members=None, num_heldout=97)
    assert (len(data.members), len(data.heldout)) == (1700, 97)


def test_a_copy_of_a_member_cannot_be_held_out() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.save("images.npy", np.concatenate([images, images[:, :, ::-1]]))  # each image and its mirror
    plain = module(source=ArraySource("images.npy"), image_size=8, num_members=6, num_heldout=6)
    assert len(plain.heldout) == 6
    with pytest.raises(ValueError, match=r"6 held-out images were asked for, but .* has only \d that differ"):
        module(source=ArraySource("images.npy"), image_size=8, num_members=6, num_heldout=6, flip=True)


def test_members_file_of_a_run_gives_its_members_back(tmp_path: Path) -> None:
    data = module()
    data.write_members(tmp_path)
    saved = json.loads((tmp_path / "members.json").read_text())
    assert saved["members"]["digest"] == data.members.digest
    path = str(tmp_path / "members.json")
    again = module(num_members=None, members=path, heldout=path, seed=5)
    assert again.members.digest == data.members.digest
    assert again.heldout.indices.tolist() == data.heldout.indices.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n1\n", r"\[1\] more than once"),
        ("1\nx\n", "no list of indices"),
        ("5\n1797\n", r"members must lie in \[0, 1797\), got \[1797\]"),
    ],
)
def test_bad_index_files_are_refused(content: str, message: str) -> None:
    Path("members.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        module(num_members=None, members="members.txt")


def test_order_is_passes_without_gaps() -> None:
    order = AddressedOrder(length=7, batch_size=4, seed=3)
    rows = torch.cat([order.batch(step) for step in range(7)])  # 28 places: 4 passes
    for start in range(0, 28, 7):
        assert sorted(rows[start : start + 7].tolist()) == list(range(7))
    assert torch.equal(AddressedOrder(7, 4, 3).batch(5), order.batch(5))  # without having drawn 0 to 4
    assert not torch.equal(rows[:7], rows[7:14])


def loader(data: MemorizationDataModule, **options) -> TrainBatches:
    occurrences = torch.arange(len(data.members))
    given = {"batch_size": 8, "seed": 0, "flip": False, "length": 5, "progress": lambda: (0, 0), **options}
    return TrainBatches(data.members.images, data.members.labels, data.members.indices, occurrences, **given)


def test_two_processes_share_the_batch_of_one() -> None:
    data = module(labels="random", num_classes=4)
    whole = list(loader(data, flip=True))
    shares = [list(loader(data, flip=True, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name in ("image", "label", "index"):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]]))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide evenly over 3 processes, got 8"):
        loader(module(), rank=0, world_size=3)


def test_an_epoch_continues_where_progress_says() -> None:
    data = module()
    whole = [batch["index"].tolist() for batch in loader(data)]
    rest = [batch["index"].tolist() for batch in loader(data, progress=lambda: (3, 3))]
    assert rest == whole[3:]


def test_workers_stream_the_same_batches() -> None:
    data = module()
    for near, far in zip(loader(data, flip=True), loader(data, flip=True, num_workers=1), strict=True):
        assert torch.equal(near["image"], far["image"])


def test_flips_mirror_half_of_the_images_and_nothing_else() -> None:
    data = module(num_members=512)
    batch = next(iter(loader(data, batch_size=512, flip=True, length=1)))
    rows = {int(index): row for row, index in enumerate(data.members.indices)}
    flipped = 0
    for image, index in zip(batch["image"], batch["index"], strict=True):
        original = to_float(data.members.images[rows[int(index)]])
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
        flipped += not torch.equal(image, original)
    assert 256 - 4 * 11.3 < flipped < 256 + 4 * 11.3  # standard error sqrt(512)/2


def test_members_repeat_by_levels_in_the_order_they_were_drawn() -> None:
    data = module(duplicates=Duplicates(count=2, times=[2, 5]), batch_size=32)
    data.setup()
    assert data.repeats.tolist()[:5] == [2, 2, 5, 5, 1]
    assert data.repeats.sum() == len(data.occurrences) == len(data.members) + 2 * (1 + 4)
    with pytest.raises(ValueError, match=r"duplicates need count >= 0 and times >= 1, got 1 and \[\]"):
        Duplicates(count=1, times=[])


def test_duplicates_stand_several_times_in_a_pass() -> None:
    data = module(duplicates=Duplicates(count=3, times=5), batch_size=32)
    batch = next(iter(data.train_dataloader()))  # one pass: 20 + 3 * 4 places
    counts = torch.bincount(batch["index"])[data.members.indices]
    assert counts.tolist() == [5, 5, 5] + [1] * 17


def test_labels_stay_with_their_image() -> None:
    small = module(labels="random", num_classes=5)
    large = module(labels="random", num_classes=5, num_members=60)
    assert torch.equal(small.members.labels, large.members.labels[:20])
    assert module(labels="unique").members.labels.tolist() == list(range(20))
    assert int(module(labels="unique").heldout.labels.max()) < 20


def test_evaluation_blocks_have_one_shape_and_count_rows_once() -> None:
    data = module()
    both = [EvaluationBlocks(data.members.images, None, data.members.indices, block=8, rank=rank, world_size=2,
                             device=torch.device("cpu")) for rank in (0, 1)]  # fmt: skip
    assert len(both[0]) == len(both[1]) == 2
    blocks = [batch for part in both for batch in part]
    assert {tuple(batch["image"].shape) for batch in blocks} == {(8, 1, 8, 8)}
    assert {int(row) for batch in blocks for row in batch["row"]} == set(range(20))


def test_validation_holds_heldout_images_and_as_many_members() -> None:
    data = module(num_members=50)
    rows = {int(row): int(index) for batch in data.val_dataloader() for row, index in
            zip(batch["row"], batch["index"], strict=True)}  # fmt: skip
    assert len(rows) == 60
    assert [rows[i] for i in range(30)] == data.heldout.indices.tolist()
    assert {rows[i] for i in range(30, 60)} <= set(data.members.indices.tolist())


def test_bank_holds_both_orientations_where_training_flips() -> None:
    data = module(flip=True)
    bank, owners = data.bank()
    assert torch.equal(bank[20:], data.members.images.flip(-1))
    assert owners.tolist() == [*range(20), *range(20)]


def test_reading_before_setup_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call setup\(\)"):
        _ = MemorizationDataModule().members
