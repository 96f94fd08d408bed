"""Guidance by public images: which they are, which law they give, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import dense_class_log_probability

from lightning_mem.attacks import ClassGuidance, class_guidance
from lightning_mem.data import DigitsSource, MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Reference


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> MemorizationDataModule:
    """Of a run whose folder is not needed."""
    found = MemorizationDataModule(DigitsSource(), 20, 24, flip=True)
    found.setup()
    monkeypatch.setattr(class_guidance, "run_data", lambda path: found)
    return found


def target(data: MemorizationDataModule) -> Target:
    return EmpiricalDenoiser(data.members.images, DiffusionProcess("linear", num_timesteps=100)).target()


def test_fresh_images_are_neither_members_nor_held_out_and_the_same_in_every_draw(data: MemorizationDataModule) -> None:
    fresh = data.fresh(300)
    taken = {*data.members.indices.tolist(), *data.heldout.indices.tolist()}
    assert len(fresh) > 290
    assert not taken & set(fresh.indices.tolist())
    assert not {*data.members.digests, *data.heldout.digests} & set(fresh.digests)
    assert torch.equal(data.fresh(5).indices, fresh.indices[:5])
    reference = Reference.from_datamodule(data)
    assert reference.fresh is not None
    assert torch.equal(reference.fresh(5), fresh.images[:5])
    assert len(data.fresh(10_000)) <= 1797 - 44
    assert Reference.from_images(data.members.images).fresh is None


def test_it_raises_the_probability_of_the_drawn_class_among_public_images(data: MemorizationDataModule) -> None:
    addresses = torch.arange(3, 9)
    (term,) = ClassGuidance(guidance_scale=2.0, num_images=150).terms(target(data), "somewhere", addresses)
    public = data.fresh(150)
    images = torch.cat([public.images, public.images.flip(-1)]).numpy() / 127.5 - 1
    labels = np.tile(data.source.labels()[public.indices.numpy()], 2)  # type: ignore[index]
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(6, 1, 8, 8, generator=draw).double(), torch.full((6,), 60)
    alpha_bar = target(data).process.alpha_bar[t].numpy()
    wanted = term.labels_of(addresses).tolist()  # type: ignore[attr-defined]
    assert len(set(wanted)) > 1

    def log_p(x: np.ndarray) -> np.ndarray:
        return dense_class_log_probability(images, labels, x, alpha_bar)[np.arange(6), wanted]

    score = term(x_t, t, addresses)
    assert score is not None
    step = 1e-4 * torch.randn(6, 1, 8, 8, generator=draw).double()
    rise = log_p((x_t + step).numpy()) - log_p((x_t - step).numpy())
    np.testing.assert_allclose(rise, 2 * (score / 2 * step).flatten(1).sum(1).numpy(), rtol=1e-3, atol=1e-8)
    again = ClassGuidance(label=7).terms(target(data), "somewhere", addresses)[0]
    assert again.labels_of(addresses).tolist() == [7] * 6  # type: ignore[attr-defined]


def test_without_public_images_or_labels_it_refuses(data: MemorizationDataModule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        ClassGuidance(num_images=0)
    with pytest.raises(ValueError, match="have no image: renumber the labels or add images"):
        ClassGuidance(num_images=3).terms(target(data), "somewhere", torch.arange(2))
    data.source.labels = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="digits has none"):
        ClassGuidance(num_images=3).terms(target(data), "somewhere", torch.arange(2))
    data.source.__class__ = type("Few", (DigitsSource,), {"__len__": lambda self: 0})
    with pytest.raises(ValueError, match="digits has no image beside the members and held-out images of somewhere"):
        ClassGuidance().terms(target(data), "somewhere", torch.arange(2))
