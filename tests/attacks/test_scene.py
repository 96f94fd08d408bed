"""A scene's draws under a judge: what is kept, what is read again, and that no training image is needed too early."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import planted_mixture
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.diffusion import DiffusionProcess, sample
from lightning_mem.evaluation import Scene, rejection, rejection_sample

OPTIONS: dict[str, Any] = {"seed": 0, "num_steps": 5}


class Dark:
    """Accepts images whose mean is below a level."""

    def __init__(self, level: float) -> None:
        self.level, self.settings = level, {"protection": "dark", "protection_level": level}

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((1, 2, 3)) < self.level


def scene() -> tuple[Scene, Sequence[Any]]:
    members = patterns(6)
    target = planted_mixture(members, DiffusionProcess("linear"))
    return scene_of(target, members, patterns(6, seed=1)), members


def test_accepted_samples_are_those_of_rejection_sampling_and_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = scene()
    judge = Dark(128.0)
    found = own.draw_accepted("dark", 20, judge, **OPTIONS)
    expected = rejection_sample(own.target, range(20), judge, **OPTIONS)
    assert found.samples.digest == expected.samples.digest
    assert torch.equal(found.tries, expected.tries)
    assert 1 < found.cost < 5
    assert found.accepted.all()
    settings = found.samples.settings
    assert settings == own.draw("plain", 20, **OPTIONS).settings | judge.settings | {"protection_max_tries": 100}
    plain = sample(own.target, range(20), **OPTIONS)
    assert torch.equal(found.samples.images[found.tries == 1], plain[judge(plain)])
    assert sorted(path.name for path in Path("results/samples").iterdir()) == [
        "dark.json",
        "dark.npz",
        "dark_tries.csv",
    ]
    monkeypatch.setattr(rejection, "sample", None)
    again = own.draw_accepted("dark", 20, judge, **OPTIONS)
    assert again.samples.digest == found.samples.digest
    assert torch.equal(again.tries, found.tries)
    for other, count in ((Dark(127.0), 20), (judge, 19)):
        with pytest.raises(ValueError, match=r"dark.npz holds another draw \(20 samples, .* remove it"):
            own.draw_accepted("dark", count, other, **OPTIONS)


def test_a_draw_that_was_stopped_goes_on_with_the_try_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = scene()
    judge, original, seeds = Dark(124.0), rejection.sample, []
    whole = own.draw_accepted("whole", 8, judge, **OPTIONS)
    assert whole.tries.max() > 3

    def stop(*args: Any, **options: Any) -> Tensor:
        seeds.append(options["seed"])
        if len(seeds) == 3:
            raise RuntimeError("power cut")
        return original(*args, **options)

    monkeypatch.setattr(rejection, "sample", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        own.draw_accepted("stopped", 8, judge, **OPTIONS)
    found = own.draw_accepted("stopped", 8, judge, **OPTIONS)
    assert len(seeds) == whole.tries.max()  # the first try is drawn elsewhere, the fourth was begun twice
    assert seeds[2] == seeds[3]
    assert found.samples.digest == whole.samples.digest
    assert torch.equal(found.tries, whole.tries)
    assert not list(Path("results/samples").glob("*_part*"))


def test_nothing_is_accepted_once_the_training_images_were_read() -> None:
    own, _ = scene()
    own.reference()
    with pytest.raises(RuntimeError, match="draws all its samples before scoring"):
        own.draw_accepted("late", 2, Dark(128.0), **OPTIONS)
