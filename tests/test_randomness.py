import hashlib
import math

import numpy as np
import pytest
import torch

from lightning_mem.randomness import derive_seed, generator


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ((0,), 6034241650067879687),
        ((0, "sample", 17), 2857949106494059075),
        ((-5, "train", 3, 1), 3774799302372412636),
        ((2**70, "ä"), 4494414062800905739),
    ],
)
def test_seeds_are_fixed_forever(address, value):
    # a change here gives every user other samples under the same seed
    assert derive_seed(*address) == value


def test_a_seed_is_63_bits_of_sha256_over_the_written_address():
    text = "int:1:0/str:6:sample/int:2:17"
    assert derive_seed(0, "sample", 17) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_the_noise_of_a_sample_is_fixed():
    drawn = torch.randint(1000, (4,), generator=generator(0, "sample", 17))
    assert drawn.tolist() == [365, 139, 227, 278]


def test_addresses_that_look_alike_are_told_apart():
    addresses = [(1,), (0, 1), (1, 0), (0, "1"), (0, "1/1"), (0, "1", "1"), (0, 1, 1), (0, 11), (0, "11"), (0, "")]
    addresses += [(0, "a/str:1:b"), (0, "a", "b"), (0, "ab"), (10, 1), (1, 10), (0, -1)]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)


@pytest.mark.parametrize("part", [1.0, True, None, np.int64(3), torch.tensor(3), (1, 2), b"a"])
def test_parts_whose_text_could_change_are_refused(part):
    with pytest.raises(TypeError, match=type(part).__name__):
        derive_seed(0, "sample", part)
    with pytest.raises(TypeError, match=type(part).__name__):
        derive_seed(part)


def test_seeds_fill_their_range():
    seeds = [derive_seed(0, "sample", i) for i in range(4000)]
    assert len(set(seeds)) == 4000
    assert 0 <= min(seeds) < 2**63 / 100 < 2**63 - 2**63 / 100 < max(seeds) < 2**63
    odd = sum(seed % 2 for seed in seeds)
    assert odd == pytest.approx(2000, abs=4 * math.sqrt(4000) / 2)


def test_neighbouring_addresses_draw_independent_noise():
    noise = torch.stack([torch.randn(256, generator=generator(0, "sample", i)) for i in range(100)])
    correlation = torch.corrcoef(noise)[~torch.eye(100, dtype=torch.bool)]
    # 9900 correlations of standard error 1/16; the largest of so many stays under six
    assert correlation.abs().max() < 6 / 16
    assert correlation.square().mean().sqrt().item() == pytest.approx(1 / 16, rel=0.1)


def test_generators_move_nothing_but_themselves():
    before = torch.get_rng_state()
    first, second = generator(0, "a"), generator(0, "a")
    torch.randn(5, generator=first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.randn(3, generator=second), torch.randn(3, generator=generator(0, "a")))
