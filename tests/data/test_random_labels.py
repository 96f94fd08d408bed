"""Balanced bits: half and half whatever the set, fixed to the content of an image in both orientations."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mem.data import RandomLabels, balanced_bits
from lightning_mem.data.split import ImageSet, image_digest

KEYS = st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), unique=True, min_size=1, max_size=30)


def image_set(images: torch.Tensor) -> ImageSet:
    """Images at odd places of a source."""
    return ImageSet(images, 2 * torch.arange(len(images)) + 1, tuple(image_digest(image) for image in images.numpy()))


def pictures(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=draw)


@settings(max_examples=40)
@given(KEYS, st.randoms())
def test_half_are_one_whatever_the_order_and_a_further_key_moves_at_most_one(keys: list[str], random) -> None:
    bits = dict(zip(keys, balanced_bits(keys, 3, "a").tolist(), strict=True))
    assert sum(bits.values()) == len(keys) // 2
    shuffled = random.sample(keys, len(keys))
    assert dict(zip(shuffled, balanced_bits(shuffled, 3, "a").tolist(), strict=True)) == bits
    more = balanced_bits([*keys, "further"], 3, "a").tolist()[:-1]
    assert sum(new != old for new, old in zip(more, bits.values(), strict=True)) <= 1


def test_labelings_and_seeds_know_nothing_of_each_other() -> None:
    keys = [str(i) for i in range(4000)]
    columns = torch.stack([balanced_bits(keys, seed, n) for seed, n in ((0, 0), (0, 1), (1, 0))]).double()
    # of two balanced labelings the hypergeometric law: standard deviation of the agreement 1 / (2 sqrt(n - 1))
    found = torch.corrcoef(columns)[torch.triu(torch.ones(3, 3), 1).bool()]
    assert found.abs().max() < 4 / 4000**0.5


def test_an_image_its_copy_and_its_mirror_image_have_one_bit() -> None:
    images = pictures(21)
    labels = RandomLabels.draw(image_set(images), 3, 5)
    assert torch.equal(RandomLabels.draw(image_set(images.flip(-1)), 3, 5).bits, labels.bits)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    assert torch.equal(RandomLabels.draw(image_set(images).part(order), 3, 5).bits, labels.bits[order])
    twice = RandomLabels.draw(image_set(torch.cat([images, images[:4], images[4:9].flip(-1)])), 3, 5)
    assert torch.equal(twice.bits, torch.cat([labels.bits, labels.bits[:9]]))
    assert labels.bits.sum(0).tolist() == [10, 10, 10]


def test_labels_are_found_by_index_and_survive_a_file(tmp_path: Path) -> None:
    labels = RandomLabels.draw(image_set(pictures(7)), 2, 0)
    torch.save(labels.to_dict(), tmp_path / "labels.pt")
    read = RandomLabels.from_dict(torch.load(tmp_path / "labels.pt", weights_only=True))
    none = torch.full((2,), -1)
    expected = torch.stack([labels.bits[2], labels.bits[6], none, none, labels.bits[0]])
    assert torch.equal(read.of(torch.tensor([5, 13, 4, 99, 1])), expected)
    assert (read.digests, read.digest, read.num_labelings) == (labels.digests, labels.digest, 2)
    order = torch.arange(6, -1, -1)
    assert RandomLabels.draw(image_set(pictures(7)).part(order), 2, 0).digest == labels.digest
    assert RandomLabels.draw(image_set(pictures(7)), 2, 1).digest != labels.digest


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([0, 1, 2, 1], r"binary, 0 or 1, got \[0, 1, 2\]"),
        ([0, 1, 1, 1], "balanced up to one, but 3 of 4 different images have the label 1: set data.labels none"),
        ([0, 1, 0], r"must be \[images, labelings\], got \(3, 1\) for 4 images"),
    ],
)
def test_labels_that_are_not_balanced_bits_are_refused(bits: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomLabels.given(image_set(pictures(4)), torch.tensor(bits)[:, None])


def test_balance_is_over_different_images_and_equal_ones_must_agree() -> None:
    images = pictures(3)
    part = image_set(torch.cat([images, images[:1].flip(-1), images[:1]]))
    bits = torch.tensor([1, 0, 0, 1, 1])[:, None]
    labels = RandomLabels.given(part, bits)
    assert torch.equal(labels.of(part.indices), bits)
    with pytest.raises(ValueError, match=r"the images \[1, 7\] are equal or mirror images, but their labels differ"):
        dataclasses.replace(labels, bits=torch.tensor([1, 0, 0, 0, 1])[:, None])
