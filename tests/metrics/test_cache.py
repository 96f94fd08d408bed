import re
import threading

import pytest
import torch

from lightning_mem.metrics import (
    FeatureStatistics,
    PixelsExtractor,
    cached_features,
    cached_statistics,
)


def pictures(n, size=4, channels=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def test_cache_is_read_back_and_keyed_by_contents(tmp_path):
    class Counting(PixelsExtractor):
        calls = 0

        def _features(self, images):
            Counting.calls += 1
            return super()._features(images)

    images = pictures(100)
    truth = FeatureStatistics.from_features(images.flatten(1) / 255)
    for round_trip in range(2):
        found = cached_statistics(images, Counting(), tmp_path)
        torch.testing.assert_close(found.sigma, truth.sigma)
        assert found.n == 100
        assert torch.equal(cached_features(images.numpy(), Counting(), tmp_path), images.flatten(1) / 255)
        assert Counting.calls == 2, round_trip  # two blocks, once
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    cached_statistics(other, Counting(), tmp_path)
    assert Counting.calls == 4
    changed = Counting()
    changed.digest = "another"
    cached_statistics(images, changed, tmp_path)
    assert Counting.calls == 6
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_cache_file_is_computed_again_with_a_warning(tmp_path, damage):
    images, extractor = pictures(100), PixelsExtractor()
    truth = cached_features(images, extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-1] ^= 1
    else:
        content = b"not a cache file"
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=re.escape(str(path)) + " is computed again: it"):
        assert torch.equal(cached_features(images, extractor, tmp_path), truth)
    assert torch.equal(cached_features(images, extractor, tmp_path), truth)  # no warning: it was written anew


def test_file_of_other_images_under_a_name_is_computed_again(tmp_path):
    first, second = pictures(10, seed=0), pictures(10, seed=1)
    for images in (first, second):
        cached_features(images, PixelsExtractor(), tmp_path)
    one, two = sorted(tmp_path.iterdir())
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)  # each whole, and each under the other's name
    for images in (first, second):
        with pytest.warns(RuntimeWarning, match="its digest does not match its content"):
            assert torch.equal(cached_features(images, PixelsExtractor(), tmp_path), images.flatten(1) / 255)


def test_writers_of_one_key_at_once_do_no_harm(tmp_path):
    images = pictures(500)
    truth = images.flatten(1) / 255
    together = threading.Barrier(4)
    results = []

    class Waiting(PixelsExtractor):
        def _features(self, images):
            together.wait(timeout=30)  # all four found no file and compute at once
            return super()._features(images)

    def work():
        results.append(cached_features(images, Waiting(), tmp_path, block=500))
        together.wait(timeout=30)  # all four have written
        results.append(cached_features(images, PixelsExtractor(), tmp_path, block=500))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(found, truth) for found in results)
    assert len(list(tmp_path.iterdir())) == 1  # and no half-written neighbour


def test_readers_see_a_whole_file_while_it_is_replaced(tmp_path):
    images, stop = pictures(2000), threading.Event()
    truth = cached_features(images, PixelsExtractor(), tmp_path)
    (path,) = tmp_path.iterdir()

    def replace():
        from lightning_mem.records import atomic_write

        content = path.read_bytes()
        while not stop.is_set():
            with atomic_write(path, "wb") as file:
                file.write(content)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(20):  # a torn file would warn, which is an error here
            assert torch.equal(cached_features(images, PixelsExtractor(), tmp_path), truth)
    finally:
        stop.set()
        writer.join()


def test_folder_that_cannot_be_written_warns_and_gives_the_features(tmp_path):
    (tmp_path / "file").write_text("")
    images = pictures(5)
    with pytest.warns(RuntimeWarning, match="is not kept: it cannot be written"):
        found = cached_features(images, PixelsExtractor(), tmp_path / "file")
    assert torch.equal(found, images.flatten(1) / 255)


def test_features_from_the_cache_are_the_same_bits(tmp_path):
    images = pictures(130)
    for _ in range(2):
        assert torch.equal(
            cached_features(images, PixelsExtractor(), tmp_path), cached_features(images, PixelsExtractor())
        )
    assert isinstance(cached_statistics(images, PixelsExtractor(), tmp_path).n, int)
