"""A pool: the same images for every half split of it, each with half of them held out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mem.data import CSVSource, DigitsSource, MemorizationDataModule, PoolSource


def test_half_splits_of_a_pool_are_drawn_by_the_seed_of_the_data_and_cover_it() -> None:
    halves = []
    for seed in (0, 1):
        data = MemorizationDataModule(PoolSource(DigitsSource(), 60, seed=5), 30, 30, image_size=8, seed=seed)
        data.setup()
        members, heldout = (set(part.indices.tolist()) for part in (data.members, data.heldout))
        assert members | heldout == set(range(60))
        assert not members & heldout
        halves.append((members, {*data.members.digests, *data.heldout.digests}))
    assert halves[0][0] != halves[1][0]
    assert halves[0][1] == halves[1][1]


def test_a_pool_shows_the_images_and_labels_of_its_source() -> None:
    source = DigitsSource()
    pool, other = PoolSource(source, 40, seed=0), PoolSource(source, 40, seed=1)
    assert len(pool) == 40
    assert sorted(set(pool.places.tolist())) == pool.places.tolist()
    assert pool.places.tolist() != other.places.tolist()
    place = int(pool.places[7])
    np.testing.assert_array_equal(pool.read(7, 8, 1), source.read(place, 8, 1))
    labels, all_labels = pool.labels(), source.labels()
    assert labels is not None
    assert all_labels is not None
    np.testing.assert_array_equal(labels, all_labels[pool.places])
    assert pool.num_classes == source.num_classes == 10
    assert "pool of 40" in pool.name
    with pytest.raises(IndexError, match="got index 40"):
        pool.read(40, 8, 1)


def test_a_pool_of_files_knows_their_captions_and_paths() -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save("a.png")
    Image.fromarray(np.ones((4, 4), np.uint8)).save("b.png")
    Image.fromarray(np.full((4, 4), 2, np.uint8)).save("c.png")
    Path("list.csv").write_text("file,caption\nc.png,see\na.png,eh\nb.png,be\n")
    pool = PoolSource(CSVSource("list.csv"), 2, seed=0)
    spoken = {"a.png": "eh", "b.png": "be", "c.png": "see"}
    assert pool.captions() == [spoken[str(pool.path_of(place))] for place in range(2)]
    assert pool.size(0) == (4, 4)
    assert PoolSource(DigitsSource(), 4).captions() is None


def test_a_pool_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got count 1"):
        PoolSource(DigitsSource(), 1)
    with pytest.raises(ValueError, match="a pool of 1798 was asked for, but digits has 1797 images"):
        len(PoolSource(DigitsSource(), 1798))
