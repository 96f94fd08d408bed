"""Attribution by leaving out: losses against their definition, samples against the landscape, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from closed_ensembles import closed_ensemble, random_images
from jsonargparse import ArgumentParser

from lightning_mem.attribution import (
    AbstractExplanation,
    EnsembleAblation,
    Queries,
    UnitCodes,
    ablation_losses,
    landscape,
)
from lightning_mem.attribution.losses import even_timesteps
from lightning_mem.diffusion import DiffusionProcess, Target, sample
from lightning_mem.evaluation import Reference, Scene
from lightning_mem.randomness import generator
from lightning_mem.types import to_float

PROCESS = DiffusionProcess(num_timesteps=30)
IMAGES = random_images(6)
CODES = UnitCodes.drawn([[0, 1], [2], [3], [4, 5]], 4, seed=1, kind="duplicates")
ENSEMBLE = closed_ensemble(IMAGES, CODES, PROCESS)
QUERIES = random_images(3, seed=4)


def method(**options: object) -> EnsembleAblation:
    own = EnsembleAblation("nowhere", **options)
    own._loaded = ENSEMBLE
    return own


def scene(reference: Reference | None = None) -> Scene:
    target = ENSEMBLE.target()
    own = Reference.from_images(IMAGES) if reference is None else reference
    return Scene(target, Path("run"), Path("out"), lambda *given: pytest.fail("nothing is drawn"), lambda: own)


def test_losses_without_a_unit_are_those_of_the_mean_of_the_members_that_are_left() -> None:
    found = ablation_losses(ENSEMBLE, QUERIES, num_timesteps=3, num_draws=2, seed=9, name="q")
    assert found.shape == (3, 5)
    for column, without in enumerate(((), (0,), (1,), (2,), (3,))):
        denoiser = ENSEMBLE.target(without).denoiser
        for row in range(3):
            total = []
            for at in (5, 15, 25):
                for number in (0, 1):
                    draw = generator(9, "ablation loss", "q", row, at, number)
                    eps, t = torch.randn(1, 1, 4, 4, generator=draw), torch.tensor([at])
                    x_t = PROCESS.add_noise(to_float(QUERIES[row : row + 1]), eps, t)
                    total.append(float((denoiser(x_t, t) - eps).double().square().mean()))
            assert float(found[row, column]) == pytest.approx(sum(total) / 6, rel=1e-5)
    assert even_timesteps(3, 30) == [5, 15, 25]


def test_an_image_that_the_ensemble_knows_is_helped_most_by_its_own_unit() -> None:
    queries = Queries(IMAGES, "given", torch.arange(6))
    own = method(num_timesteps=3, num_draws=2)
    found = own.scores(scene(), queries)
    assert found.shape == (6, 6)
    assert found.dtype == torch.float64
    units = CODES.unit_of(torch.arange(6))
    assert torch.equal(units[found.argmax(1)], units)
    assert (found.gather(1, torch.arange(6)[:, None]) > 0).all()
    assert torch.equal(found[:, 0], found[:, 1])  # one unit, one score
    assert dict(own.cost()) == {"trainings": 4, "evaluations": 6 * 3 * 2 * 4}


def test_scores_stand_in_the_order_of_the_reference_and_a_mirror_image_is_its_image() -> None:
    indices = torch.tensor([4, 2, 0, 5, 3, 1])
    flipped = replace(
        Reference.from_images(torch.cat([IMAGES[indices], IMAGES[indices].flip(-1)])),
        indices=indices, owners=torch.arange(6).repeat(2), mirror=True,
    )  # fmt: skip
    queries = Queries(QUERIES, "heldout", torch.arange(3))
    plain, other = (method(num_timesteps=2).scores(scene(one), queries) for one in (None, flipped))
    assert torch.equal(other, plain[:, indices])


def test_of_its_own_samples_displacement_and_moved_away_are_the_landscape() -> None:
    drawing = {"seed": 3, "num_steps": 2}
    addresses = torch.tensor([5, 8])
    units = CODES.unit_of(torch.arange(6))
    known = landscape(ENSEMBLE, IMAGES, units, addresses, **drawing)
    queries = Queries(sample(ENSEMBLE.target(), addresses, **drawing), "ensemble", addresses)
    for score, wanted in (("displacement", known.displacement), ("moved_away", known.moved_away)):
        own = method(score=score, **drawing)
        assert torch.equal(own.scores(scene(), queries), wanted[:, units])
        assert own.cost()["evaluations"] == 2 * 2 * (4 + 8)
    with pytest.raises(ValueError, match="the queries are not what the ensemble draws with .*'num_steps': 3"):
        method(score="moved_away", seed=3, num_steps=3).scores(scene(), queries)
    with pytest.raises(ValueError, match="is of samples that the ensemble drew .* got model: use score loss"):
        method(score="moved_away").scores(scene(), Queries(QUERIES, "model", torch.arange(3)))


def test_targets_and_images_of_another_ensemble_are_refused(tmp_path: Path) -> None:
    own, target = method(), ENSEMBLE.target()
    found = own.identity(target, "", tmp_path)
    assert found == method().identity(target, "", tmp_path)
    assert (
        len({found, *(method(**o).identity(target, "", tmp_path) for o in ({"num_draws": 2}, {"noise_seed": 1}))}) == 3
    )
    other = Target(target.denoiser, PROCESS, (3, 4, 4))
    with pytest.raises(ValueError, match=r"images \(1, 4, 4\) \(C, H, W\), but the target's are \(3, 4, 4\)"):
        own.identity(other, "", tmp_path)
    (tmp_path / "members.json").write_text(json.dumps({"members": {"indices": [0, 1, 2, 3, 4, 5, 60]}}))
    with pytest.raises(ValueError, match=r"do not cover the data: 1 images .* such as \[60\]"):
        own.identity(target, "", tmp_path)
    fewer = Reference.from_images(IMAGES[:4])
    with pytest.raises(ValueError, match="1 of the ensemble's 4 units have no image among the 4 training images"):
        own.scores(scene(fewer), Queries(QUERIES, "model", torch.arange(3)))
    with pytest.raises(ValueError, match=r"queries are \(1, 5, 5\) .* training images are \(1, 4, 4\)"):
        own.scores(scene(), Queries(random_images(2, 5), "model", torch.arange(2)))
    with pytest.raises(ValueError, match="score must be loss, displacement or moved_away, got 'distance'"):
        EnsembleAblation("x", score="distance")
    with pytest.raises(ValueError, match="num_timesteps and num_draws must be at least 1, got 0 and 4"):
        EnsembleAblation("x", num_timesteps=0)


def test_the_shipped_configuration_names_the_ensemble_that_the_shipped_study_trains() -> None:
    configs = Path(__file__).parent.parent.parent / "configs" / "digits"
    own = yaml.safe_load((configs / "attributions" / "ensemble.yaml").read_text())
    parser = ArgumentParser()
    parser.add_argument("--attribution", type=AbstractExplanation)
    found = parser.instantiate(parser.parse_object(own)).attribution
    assert isinstance(found.methods[0], EnsembleAblation)
    assert found.methods[0].path == yaml.safe_load((configs / "studies" / "ensembles.yaml").read_text())["folder"]
