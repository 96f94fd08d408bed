"""Counterfactuals: against samples drawn anew one by one, on digits, and on sets with a known cause."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_ensembles import closed_ensemble, random_images

from lightning_mem.attribution import Landscape, UnitCodes, false_attribution_rate, geometric_mean, landscape
from lightning_mem.attribution.counterfactual import at_convention, evaluations, unit_distances
from lightning_mem.attribution.counterfactual_report import radius_numbers, source_numbers
from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target, sample
from lightning_mem.evaluation import Workers

PROCESS = DiffusionProcess(num_timesteps=50)


def test_a_landscape_equals_its_definition_sample_by_sample() -> None:
    codes = UnitCodes.drawn([[0, 1], [2], [3], [4, 5]], 4, seed=1, kind="duplicates")
    images, units = random_images(6), torch.tensor([0, 0, 1, 2, 3, 3])
    ensemble = closed_ensemble(images, codes, PROCESS)
    drawing = {"seed": 5, "num_steps": 3}
    found = landscape(ensemble, images, units, [7, 1, 4], **drawing)
    pixels = images.double() / 255

    def mean(active: list[int]) -> Target:
        known = [EmpiricalDenoiser(images[codes.seen_by(k)], PROCESS) for k in active]

        def call(x_t: torch.Tensor, t: torch.Tensor, condition: Any = None) -> torch.Tensor:
            return torch.stack([one(x_t, t) for one in known]).mean(0)

        call.prediction = "eps"
        return Target(call, PROCESS, (1, 4, 4))

    def to_unit(x: torch.Tensor, unit: int) -> float:
        return min(float((x - y).norm()) for y in pixels[units == unit])

    for row, address in enumerate((7, 1, 4)):
        x = sample(mean([0, 1, 2, 3]), [address], **drawing)[0].double() / 255
        assert (found.factual[row].double() / 255 - x).abs().max() <= 1 / 255  # another sum, rounded otherwise
        for unit in range(4):
            assert float(found.to_units[row, unit]) == pytest.approx(to_unit(x, unit), abs=0.02)
            left = [k for k in range(4) if not codes.codes[unit, k]]
            moved = sample(mean(left), [address], **drawing)[0].double() / 255
            assert float(found.displacement[row, unit]) == pytest.approx(float((moved - x).norm()), abs=0.02)
            away = to_unit(moved, unit) - to_unit(x, unit)
            assert float(found.moved_away[row, unit]) == pytest.approx(away, abs=0.02)
            nearest = min(range(4), key=lambda other: to_unit(moved, other))
            assert int(found.nearest_after[row, unit]) == nearest
    assert found.displacement.max() > 0.2
    assert evaluations(ensemble, 3, 3) == 3 * 3 * (4 + 4 * 2)


def test_the_ensemble_names_the_source_of_its_own_digits() -> None:
    data = MemorizationDataModule(num_members=64, num_heldout=0)
    data.setup()
    codes = UnitCodes.drawn([[i] for i in range(64)], 8)
    ensemble = closed_ensemble(data.members.images, codes, DiffusionProcess())
    found = landscape(ensemble, data.members.images, torch.arange(64), range(64), seed=0, num_steps=4)
    numbers = {(n.name, n.definition["score"]): n for n in source_numbers(found, {})}
    first = numbers["source_first", "moved_away"]
    assert first.value is not None
    assert first.value >= 0.6
    assert (first.n, first.definition["chance"]) == (64, 1 / 64)
    assert numbers["source_first_five", "moved_away"].value > 0.9


def test_a_unit_whose_image_stands_in_the_set_many_times_moves_the_samples_most() -> None:
    images = random_images(13)
    images[6:] = images[5]
    units = [[i] for i in range(5)] + [[5, *range(6, 13)]]
    codes = UnitCodes.drawn(units, 4)
    found = landscape(
        closed_ensemble(images, codes, PROCESS), images, codes.unit_of(torch.arange(13)), range(60), seed=0, num_steps=5
    )
    near = found.nearest == 5
    assert near.sum() >= 5
    assert found.displacement[near].mean(0).argmax() == 5
    assert (found.source_rank("moved_away")[near] == 1).double().mean() > 0.9


def test_processes_share_the_counterfactuals_and_find_the_same() -> None:
    images, codes = random_images(5), UnitCodes.drawn([[i] for i in range(5)], 4)
    ensemble = closed_ensemble(images, codes, PROCESS)
    options: dict[str, Any] = {"seed": 0, "num_steps": 1}
    alone = landscape(ensemble, images, torch.arange(5), range(3), **options)
    shares: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):  # each process's part; what it gathers is only noted
        landscape(ensemble, images, torch.arange(5), range(3), workers=_noting(rank, shares[rank]), **options)
    turn = [0]

    def gather(rows: torch.Tensor) -> torch.Tensor:
        turn[0] += 1
        return torch.stack([shares[rank][turn[0] - 1] for rank in (0, 1)])

    both = landscape(ensemble, images, torch.arange(5), range(3), workers=Workers(0, 2, gather), **options)
    for name in ("factual", "displacement", "moved_away", "to_units", "nearest_after"):
        assert torch.equal(getattr(both, name), getattr(alone, name))


def _noting(rank: int, noted: list[torch.Tensor]) -> Workers:
    def gather(rows: torch.Tensor) -> torch.Tensor:
        noted.append(rows)
        return torch.stack([rows, rows])

    return Workers(rank, 2, gather)


def made_up() -> Landscape:
    """Four samples over five units; the nearest units are 1, 0, 4, 2."""
    to_units = torch.tensor(
        [[3.0, 1, 2, 4, 5], [0.5, 1, 2, 4, 5], [9, 8, 7, 6, 5], [3, 3, 1, 3, 3]], dtype=torch.float64
    )
    displacement = torch.tensor(
        [[0.1, 0.9, 0.2, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0], [4, 4, 1, 4, 4]], dtype=torch.float64
    )
    after = torch.tensor([[1, 2, 1, 1, 1], [0, 0, 0, 0, 1], [4, 4, 4, 0, 4], [0, 0, 0, 0, 0]])
    return Landscape(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), displacement, displacement - 1, to_units, after)


def test_a_rank_counts_everyone_who_is_not_behind() -> None:
    assert made_up().source_rank("displacement").tolist() == [1, 2, 5, 5]
    found = {n.name: n for n in source_numbers(made_up(), {"a": 1}) if n.definition["score"] == "displacement"}
    assert (found["source_first"].value, found["source_first"].n) == (0.25, 4)
    assert found["source_first"].definition["chance"] == 0.2
    assert found["source_first_five"].value == 1.0
    assert found["source_rank"].value == 3.5


def test_a_sample_that_nothing_moves_has_no_radius_and_is_told_apart() -> None:
    found = made_up()
    assert found.radius.tolist() == [0.9, 0.5, 0, 4]
    mean, zeros = geometric_mean(found.radius)
    assert mean == pytest.approx((0.9 * 0.5 * 4) ** (1 / 3))
    assert zeros == 1
    assert geometric_mean(torch.zeros(3)) == (None, 3)
    assert at_convention(1.0, (1, 8, 8)) == pytest.approx(32 * math.sqrt(3))
    assert at_convention(2.0, (3, 256, 256)) == 2.0
    numbers = {n.name: n for n in radius_numbers(found, {})}
    assert numbers["radius_zero"].value == 0.25
    assert numbers["radius"].value == pytest.approx(mean)
    assert numbers["radius"].n == 3
    assert numbers["radius_256"].value == pytest.approx(mean * 32 * math.sqrt(3))
    low, high = numbers["radius"].interval
    assert 0.5 <= low < mean < high <= 4


def test_attributions_that_outlive_their_unit_are_false() -> None:
    assert false_attribution_rate(0.1, 0.5) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"control in \(0, 1\], got 0.1 and 0"):
        false_attribution_rate(0.1, 0)
    own, others = made_up().false_attribution()
    assert own.tolist() == [False, True, True, False]
    assert others.tolist() == [1.0, 0.75, 0.75, 0.0]
    numbers = {n.name: n.value for n in radius_numbers(made_up(), {})}
    assert numbers["false_attribution_rate"] == pytest.approx(0.5 / 0.625)


def test_distances_to_a_unit_are_those_to_its_nearest_image() -> None:
    images = random_images(5)
    drawn = random_images(2, seed=1)
    found = unit_distances(drawn, images, torch.tensor([1, 0, 1, 2, 0]), 3)
    each = ((drawn[:, None].double() - images.double()) / 255).flatten(2).norm(dim=2)
    known = torch.stack([each[:, [1, 4]].amin(1), each[:, [0, 2]].amin(1), each[:, 3]], 1)
    torch.testing.assert_close(found, known)


def test_a_landscape_is_kept_for_what_it_was_made_of(tmp_path: Path) -> None:
    made_up().save(tmp_path / "one.npz", "this", seconds=2.5)
    known = Landscape.load(tmp_path / "one.npz", "this")
    assert known is not None
    assert known[1] == {"seconds": 2.5}
    assert torch.equal(known[0].displacement, made_up().displacement)
    assert Landscape.load(tmp_path / "one.npz", "another") is None
    assert Landscape.load(tmp_path / "none.npz", "this") is None


def test_units_that_are_not_those_of_the_images_are_refused() -> None:
    images, codes = random_images(3), UnitCodes.drawn([[0], [1], [2]], 3)
    ensemble = closed_ensemble(images, codes, PROCESS)
    with pytest.raises(ValueError, match=r"do not cover the data: .* each of 3 units .* got 2 units"):
        landscape(ensemble, images, torch.tensor([0, 1, 1]), [0], seed=0, num_steps=1)
