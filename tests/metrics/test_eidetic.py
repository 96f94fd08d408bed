import math
import pickle
import re

import numpy as np
import pytest
import torch

from lightning_mem.metrics import EideticMemorization, eidetic_count, tiled_l2


def pictures(n, seed, size=8, channels=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


def noisy(images, seed, amount=3):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def rms(a, b):
    a, b = (np.asarray(x, dtype=np.float64) / (255 if x.dtype == torch.uint8 else 1) for x in (a, b))
    return math.sqrt(((a - b) ** 2).mean())


def test_an_image_present_three_times_counts_three_itself_included():
    bank = torch.cat([pictures(20, seed=0), pictures(1, seed=9).repeat(2, 1, 1, 1), pictures(1, seed=9)])
    for delta in (0.0, 0.05):
        assert eidetic_count(bank[-1], bank, delta) == 3
        assert isinstance(eidetic_count(bank[-1], bank, delta), int)
    assert eidetic_count(pictures(1, seed=10)[0], bank, 0.0) == 0
    assert eidetic_count(pictures(1, seed=10)[0], bank, 1.0) == 23


@pytest.mark.parametrize("chunk_bytes", [None, 1, 20000])
def test_count_is_that_of_a_float64_loop_for_pixels_and_floats_one_or_several_images(chunk_bytes):
    bank = pictures(30, seed=0)
    images = torch.cat([noisy(bank[:4], seed=1, amount=30), pictures(2, seed=2)])
    options = {"chunk_bytes": chunk_bytes}
    for delta in (0.05, 0.1, 0.41):
        truth = [sum(rms(image, row) <= delta for row in bank) for image in images]
        assert eidetic_count(images, bank, delta, **options).tolist() == truth
        assert [eidetic_count(image.numpy(), bank.numpy(), delta, **options) for image in images] == truth
        for pair in ((images / 255, bank / 255), (images, bank / 255), (images.double() / 255, bank)):
            assert eidetic_count(*pair, delta, **options).tolist() == truth
    assert 0 < sum(truth) < 6 * 30


def test_a_distance_of_exactly_delta_counts_in_integers_and_in_rounded_floats():
    image, bank = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    assert eidetic_count(image, bank, 0.2) == 1  # 51 / 255
    assert eidetic_count(image, bank + 1, 0.2) == 0
    tenth = torch.full((1, 3, 4, 4), 0.1)
    assert float(tenth[0, 0, 0, 0]) > 0.1  # as a float32
    assert eidetic_count(image, tenth, 0.1) == 1
    assert eidetic_count(image, tenth + 1e-5, 0.1) == 0


def test_copy_of_a_large_image_is_within_zero():
    bank = pictures(3, seed=0, size=64)
    assert eidetic_count(bank[1], bank, 0.0) == 1
    assert eidetic_count(bank[1] / 255, bank / 255, 0.0) == 1
    assert eidetic_count(bank[1], bank / 255, 0.0) == 1  # the same float32 rounding of x / 255 is forgiven


def test_memory_mapped_bank_is_read_chunk_by_chunk(tmp_path):
    bank = pictures(50, seed=0)
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert eidetic_count(bank[7], mapped, 0.01, chunk_bytes=5000) == 1
    metric = EideticMemorization(mapped, 0.01, chunk_bytes=5000)
    metric.update(bank[5:8])
    assert metric.indices().tolist() == [5, 6, 7]


def test_images_equal_but_for_one_tile_are_as_far_as_that_tile():
    a = pictures(1, seed=0, size=512)[0]
    b = a.clone()
    b[:, 128:256, 384:512] = pictures(1, seed=1, size=128)[0]
    wanted = rms(a[:, 128:256, 384:512], b[:, 128:256, 384:512])
    assert tiled_l2(a, b) == pytest.approx(wanted, rel=1e-12)
    assert tiled_l2(a.numpy(), b.numpy()) == tiled_l2(b, a)
    assert tiled_l2(a, b, tiles=1) == pytest.approx(wanted / 4, rel=1e-12) == pytest.approx(rms(a, b), rel=1e-12)
    assert tiled_l2(a / 255, b / 255) == pytest.approx(wanted, rel=1e-6)


def test_different_objects_on_one_background_are_close_as_a_whole_and_far_in_a_tile():
    background = torch.full((3, 64, 64), 0.9)
    first, second = background.clone(), background.clone()
    first[:, 20:28, 20:28], second[:, 20:28, 20:28] = 0.0, 0.5
    assert tiled_l2(first, second, tiles=1) < 0.1 < 0.2 < tiled_l2(first, second)


def test_tiles_are_compared_at_the_same_place():
    # two different halves, exchanged: some tile of one equals some tile of the other, no tile its own
    picture = torch.cat([torch.zeros(1, 8, 4), torch.ones(1, 8, 4)], dim=2)
    assert tiled_l2(picture, picture.flip(2), tiles=2) == 1.0


def test_many_pairs_at_once_and_one_image_against_many():
    a, b = pictures(5, seed=0), pictures(5, seed=1)
    assert tiled_l2(a, b).tolist() == [tiled_l2(x, y) for x, y in zip(a, b, strict=True)]
    assert tiled_l2(a, b[2], tiles=2).tolist() == [tiled_l2(x, b[2], tiles=2) for x in a]


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("chunk_bytes", [None, 30000])
def test_metric_counts_distinct_training_images_once(tiles, chunk_bytes):
    bank = torch.cat([pictures(40, seed=0), pictures(40, seed=0)[:5]])  # the first five twice
    samples = torch.cat([noisy(bank[:10], seed=1), noisy(bank[:10], seed=2), pictures(7, seed=3)])
    metric = EideticMemorization(bank, 0.05, tiles=tiles, chunk_bytes=chunk_bytes)
    for part in samples.split([1, 19, 7]):
        metric.update(part)
    assert metric.compute() == 15
    unique = EideticMemorization(bank, 0.05, k=1, tiles=tiles, chunk_bytes=chunk_bytes)
    unique.update(samples)
    assert unique.indices().tolist() == [5, 6, 7, 8, 9]
    assert unique.compute() == 5
    assert len(EideticMemorization(bank, 0.05, k=2).indices()) == 0


def test_tiled_metric_is_stricter_than_the_plain_one():
    bank = pictures(3, seed=0, size=16)
    sample = bank[:1].clone()
    sample[..., :4, :4] = 255 - sample[..., :4, :4]
    assert rms(sample[0], bank[0]) < 0.16 < 0.2 < tiled_l2(sample[0], bank[0])
    plain, tiled = (EideticMemorization(bank, 0.16, tiles=tiles) for tiles in (1, 4))
    plain.update(sample)
    tiled.update(sample)
    assert (plain.compute(), tiled.compute()) == (1, 0)


def test_ranks_with_unequal_batches_equal_one_process():
    bank = pictures(60, seed=0)
    samples = torch.cat([noisy(bank[:30], seed=1), noisy(bank[10:20], seed=2), pictures(3, seed=3)])
    whole = EideticMemorization(bank, 0.05)
    whole.update(samples, torch.arange(43))
    ranks = [EideticMemorization(bank, 0.05) for _ in range(3)]
    for rank, rows in zip(ranks, torch.randperm(43).split([20, 22, 1]), strict=True):
        rank.update(samples[rows], rows)
    merged = EideticMemorization(bank, 0.05)
    for name, reduction in merged._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    assert merged.compute() == whole.compute() == 30
    assert merged.interval() == whole.interval()
    assert merged.interval()[0] < 30 < merged.interval()[1]
    assert pickle.loads(pickle.dumps(whole)).compute() == 30
    assert whole.state_dict() == {}


def test_interval_covers_the_expected_number_at_its_n():
    members, n = 60, 120
    bank = pictures(members, seed=0, size=2, channels=1)
    bank[:, 0, 0, 0] = torch.arange(members) * 4  # all at least 4/255 apart
    truth = members * (1 - (1 - 1 / members) ** n)
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        metric = EideticMemorization(bank, 0.0)
        metric.update(bank[torch.randint(members, (n,), generator=draw)])
        low, high = metric.interval()
        covered += low <= truth <= high
    assert covered >= 180


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: eidetic_count(b[0] / 127.5 - 1, b, 0.1), "outside [0, 1]: images in [-1, 1] become x / 2 + 0.5"),
        (lambda b: eidetic_count(b[0], torch.full(b.shape, math.nan), 0.1), "bank row 0 holds nan"),
        (lambda b: eidetic_count(b[0], b / 200, 0.1, chunk_bytes=1), "bank row "),
        (lambda b: eidetic_count(b[0, :1], b, 0.1), "bank's shape (3, 8, 8), one or several, got (1, 8, 8)"),
        (lambda b: eidetic_count(b[:0], b, 0.1), "got (0, 3, 8, 8)"),
        (lambda b: eidetic_count(b[0], b[:0], 0.1), "at least one image, got shape (0, 3, 8, 8)"),
        (lambda b: eidetic_count(b[0], b, -0.1), "delta must be at least 0, got -0.1"),
        (lambda b: eidetic_count(b[0], b, math.nan), "got nan"),
        (lambda b: eidetic_count(b[0], b, 0.1, chunk_bytes=0), "chunk_bytes must be positive, got 0"),
        (lambda b: tiled_l2(b[0], b[1], tiles=16), "images of 8x8 are smaller than one tile of a 16x16 grid"),
        (lambda b: tiled_l2(b[0], b[1], tiles=3), "images of 8x8 cannot be cut into 3x3 equal tiles"),
        (lambda b: tiled_l2(b[0], b[1], tiles=0), "tiles must be at least 1, got 0"),
        (lambda b: tiled_l2(b[0], b[1, :, :4]), "of one size, got (3, 8, 8) and (3, 4, 8)"),
        (lambda b: tiled_l2(b[:3], b[:2]), "equally many images, or one of them a single one"),
        (lambda b: tiled_l2(b[0], b[1] / 127.5), "b row 0 holds "),
        (lambda b: EideticMemorization(b, k=0), "k must be at least 1 (an image is within delta of itself), got 0"),
        (lambda b: EideticMemorization(b, -1.0), "got -1.0"),
        (lambda b: EideticMemorization(b, tiles=5), "cannot be cut into 5x5"),
        (lambda b: EideticMemorization(b, blocks=1), "blocks must be at least 2, got 1"),
        (lambda b: EideticMemorization(b[:0]), "at least one image"),
        (lambda b: EideticMemorization(b / 255), "bank must be uint8"),
        (lambda b: EideticMemorization(b).update(b[..., :4]), "bank's shape (3, 8, 8), got (3, 8, 4)"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pictures(4, seed=0))


def test_wrong_types_and_empty_states_are_refused():
    bank = pictures(4, seed=0)
    with pytest.raises(TypeError, match=r"image must be uint8 or floats in \[0, 1\], got torch.int64"):
        eidetic_count(bank[0].long(), bank, 0.1)
    with pytest.raises(ValueError, match="0 images"), pytest.warns(UserWarning, match="before the ``update``"):
        EideticMemorization(bank).compute()
