"""Rejection sampling: what is kept, what is drawn again and from where, what it costs, and when it gives up."""

from typing import Any

import pytest
import torch
from labelled_mixture import copied, planted
from torch import Tensor

from lightning_mem.defenses import CPSample, NearestRejection, NoCopy, Undecided, final_confidence
from lightning_mem.diffusion import Target, sample
from lightning_mem.diffusion.additions import AbstractAddition, AllAccept, Judge, Together
from lightning_mem.evaluation import Accepted, rejection_sample
from lightning_mem.evaluation.blocks import draw_block
from lightning_mem.randomness import derive_seed


class Dark:
    """Accepts about half of all images, copies or not."""

    settings: dict[str, Any] = {"protection": "dark"}  # noqa: RUF012

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((1, 2, 3)) < 125


class Never:
    settings: dict[str, Any] = {"protection": "never"}  # noqa: RUF012

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), dtype=torch.bool)


def test_no_copy_leaves_and_what_was_none_is_the_unprotected_sample() -> None:
    members, target, _ = planted()
    plain = sample(target, range(40), seed=0, num_steps=20)
    found = rejection_sample(target, range(40), NoCopy(members), seed=0, num_steps=20)
    copies = copied(plain, members)
    assert 0.2 < copies.double().mean() < 0.7
    assert found.accepted.all()
    assert not copied(found.samples.images, members).any()
    assert torch.equal(found.samples.images[~copies], plain[~copies])
    assert torch.equal(found.tries > 1, copies)
    assert found.cost == found.tries.double().mean()
    # geometric: one over the share that is accepted, four standard errors of 40 addresses
    p = 1 - copies.double().mean()
    assert abs(found.cost - 1 / p) < 4 * (1 - p).sqrt() / p / 40**0.5
    assert found.samples.settings["protection"] == "rejection_nearest"


def test_a_try_depends_on_seed_attempt_and_address_alone() -> None:
    members, target, _ = planted()
    judge = NoCopy(members)
    whole = rejection_sample(target, range(20), judge, num_steps=5)
    row = int(whole.tries.argmax())
    assert whole.tries[row] > 1
    alone = rejection_sample(target, [row, 77], judge, num_steps=5)
    assert torch.equal(alone.samples.images[0], whole.samples.images[row])
    seed = derive_seed(0, "try", int(whole.tries[row]) - 1)
    assert torch.equal(sample(target, [row], seed=seed, num_steps=5)[0], whole.samples.images[row])


def test_what_the_classifier_is_sure_of_is_drawn_again() -> None:
    members, target, classifier = planted()
    judge = Undecided(classifier, 0.01)
    assert not judge(members).any()
    found = rejection_sample(target, range(30), judge, num_steps=20)
    assert found.accepted.all()
    assert (final_confidence(classifier, found.samples.images) <= 0.99).all()
    plain = sample(target, range(30), seed=0, num_steps=20)
    sure = final_confidence(classifier, plain) > 0.99
    assert torch.equal(found.tries > 1, sure)
    assert found.samples.settings["protection_tol"] == 0.01
    with pytest.raises(ValueError, match=r"tol 0.5 would accept only what is exactly undecided"):
        Undecided(classifier, 0.5)
    with pytest.raises(ValueError, match=r"tol must lie in \(0, 0.5\], .* got 0"):
        Undecided(classifier, 0.0)


def test_it_gives_up_and_says_so() -> None:
    _, target, _ = planted()
    found = rejection_sample(target, range(3), Never(), num_steps=2, max_tries=4)
    assert found.tries.tolist() == [4, 4, 4]
    assert not found.accepted.any()
    last = sample(target, range(3), seed=derive_seed(0, "try", 3), num_steps=2)
    assert torch.equal(found.samples.images, last)
    with pytest.raises(ValueError, match="max_tries must be at least 1, got 0"):
        rejection_sample(target, range(3), Never(), max_tries=0)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        rejection_sample(target, [], Never())


def test_mirror_images_are_copies_where_asked() -> None:
    members, _, _ = planted()
    mirrored = members[:3].flip(-1)
    assert NoCopy(members)(mirrored).all()
    assert not NoCopy(members, mirror=True)(mirrored).any()
    twice = torch.cat([members, members[:1]])
    assert not NoCopy(twice)(members[:1]).any()  # a duplicate in the bank hides no copy


def test_a_first_try_that_was_drawn_already_is_not_drawn_again() -> None:
    members, target, _ = planted()
    judge, settings = NoCopy(members), {"sample_seed": 3, "num_steps": 5, "sampler": "ddim", "eta": 0.0, "block": 64}
    first = draw_block(target, torch.arange(20), settings)
    whole = rejection_sample(target, range(20), judge, seed=3, num_steps=5)
    found = rejection_sample(target, range(20), judge, seed=3, num_steps=5, begun=first)
    assert torch.equal(found.samples.images, whole.samples.images)
    assert torch.equal(found.tries, whole.tries)
    assert not torch.equal(first.images, found.samples.images)  # it is left as it was
    assert torch.equal(first.images, draw_block(target, torch.arange(20), settings).images)
    with pytest.raises(ValueError, match="the first try holds 20 samples of other addresses than the 19 asked for"):
        rejection_sample(target, range(19), judge, begun=first)


def test_under_a_protection_the_gate_rate_is_that_of_the_try_that_left() -> None:
    _, target, classifier = planted()
    term = CPSample(classifier, 0.1, 0.05)
    found = rejection_sample(target, range(12), Dark(), num_steps=8, guidance=[term])
    assert found.tries.max() > 1
    assert found.samples.gate_rate is not None
    for row, (tries, rate) in enumerate(zip(found.tries.tolist(), found.samples.gate_rate.tolist(), strict=True)):
        own, seed = CPSample(classifier, 0.1, 0.05), derive_seed(0, "try", tries - 1) if tries > 1 else 0
        image = sample(target, [row], seed=seed, num_steps=8, guidance=[own])[0]
        assert torch.equal(image, found.samples.images[row])
        assert own.certificates([row]).gate_rate.item() == rate
    assert found.samples.gate_rate.unique().numel() > 2
    about = found.samples.settings
    assert (about["protection"], about["protection_2"], about["protection_max_tries"]) == (
        "cpsample", "dark", 100
    )  # fmt: skip


def test_what_is_kept_in_files_is_what_was_drawn() -> None:
    _, target, _ = planted()
    found = rejection_sample(target, [4, 2, 7], Never(), num_steps=2, max_tries=2)
    found.save("kept.npz")
    again = Accepted.load("kept.npz")
    assert again.samples.digest == found.samples.digest
    assert again.samples.settings == found.samples.settings
    assert torch.equal(again.accepted, found.accepted)
    assert torch.equal(again.tries, found.tries)
    kept: list[Accepted] = []
    whole = rejection_sample(target, [4, 2, 7], Never(), num_steps=2, max_tries=5, keep=kept.append)
    assert kept[0].tries.tolist() == [2, 2, 2] == again.tries.tolist()
    more = rejection_sample(target, [4, 2, 7], Never(), num_steps=2, max_tries=5, begun=again)
    assert more.samples.digest == whole.samples.digest != found.samples.digest
    assert more.tries.tolist() == [5, 5, 5]
    rejection_sample(target, [4, 2], Never(), num_steps=2, max_tries=2).samples.save("kept.npz")
    with pytest.raises(ValueError, match=r"kept_tries.csv tells other addresses than kept.npz holds: remove both"):
        Accepted.load("kept.npz")


def test_of_several_judges_all_must_accept() -> None:
    members, _, _ = planted()

    class Add(AbstractAddition):
        def __init__(self, judge: Judge | None) -> None:
            self.own = judge

        def terms(self, target: Target, path: str, addresses: Tensor) -> tuple[()]:
            return ()

        def judge(self, target: Target, path: str) -> Judge | None:
            return self.own

    target, one, other = planted()[1], NoCopy(members[:6]), NoCopy(members[6:], 0.25)
    assert Together([Add(None), Add(None)]).judge(target, "") is None
    assert Together([Add(None), Add(one)]).judge(target, "") is one
    assert NearestRejection().terms(target, "", torch.arange(2)) == ()
    both = Together([Add(one), Add(None), Add(other)]).judge(target, "")
    assert isinstance(both, AllAccept)
    images = torch.cat([members, sample(target, range(30), seed=0, num_steps=20)])
    assert torch.equal(both(images), one(images) & other(images))
    assert one(images).sum() > both(images).sum() > 0
    assert other(images).sum() > both(images).sum()
    assert both.settings["protection_threshold"] == f"{1 / 3} and 0.25"
    assert both.settings["protection"] == "rejection_nearest and rejection_nearest"
