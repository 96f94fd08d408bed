"""Rejection sampling: what is kept, what is drawn again and from where, what it costs, and when it gives up."""

from typing import Any

import pytest
import torch
from labelled_mixture import copied, planted
from torch import Tensor

from lightning_mem.defenses import NoCopy, Undecided, final_confidence
from lightning_mem.diffusion import sample
from lightning_mem.evaluation import rejection_sample
from lightning_mem.randomness import derive_seed


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
