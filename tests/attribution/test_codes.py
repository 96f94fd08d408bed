"""Codes: balanced, unique, drawn without rejection, and the manifest that says who saw what."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_mem.attribution.codes import (
    UnitCodes,
    balanced_codes,
    minimum_members,
    units_of,
    unrank_combination,
)
from lightning_mem.data.split import ImageSet, image_digest


@pytest.mark.parametrize(("units", "members"), [(64, 8), (70, 8), (35, 7), (31, 7), (3, 3), (500, 13), (1, 2)])
def test_codes_are_balanced_and_unique_for_odd_and_even_sizes(units: int, members: int) -> None:
    codes = balanced_codes(units, members, seed=3)
    assert codes.shape == (units, members)
    assert codes.dtype == torch.bool
    assert set(codes.sum(1).tolist()) == {members // 2}
    assert len({tuple(code) for code in codes.tolist()}) == units


def test_of_any_other_unit_somebody_who_never_saw_the_one_left_out_remains() -> None:
    for units, members in ((70, 8), (35, 7)):
        codes = balanced_codes(units, members, seed=0).tolist()
        for left_out, other in itertools.permutations(codes, 2):
            assert any(seen and not gone for seen, gone in zip(other, left_out, strict=True))


def test_every_rank_is_a_combination_of_its_own() -> None:
    for length, weight in ((6, 3), (7, 3), (5, 1)):
        found = [tuple(sorted(unrank_combination(r, length, weight))) for r in range(math.comb(length, weight))]
        assert sorted(found) == list(itertools.combinations(range(length), weight))
        by_value = [sum(1 << place for place in places) for places in found]
        assert by_value == sorted(by_value)


def test_each_code_is_drawn_equally_often_for_the_first_unit_and_the_last() -> None:
    counts = torch.zeros(2, 6)
    for seed in range(240):
        codes = balanced_codes(5, 4, seed).long() @ torch.tensor([8, 4, 2, 1])
        for row, unit in enumerate((0, 4)):
            counts[row, sorted((3, 5, 6, 9, 10, 12)).index(int(codes[unit]))] += 1
    chi_square = ((counts - 40) ** 2 / 40).sum(1)
    assert chi_square.max() < 20.5  # 0.999 of its law with 5 degrees of freedom


def test_a_seed_decides_the_codes() -> None:
    assert torch.equal(balanced_codes(64, 8, 1), balanced_codes(64, 8, 1))
    assert not torch.equal(balanced_codes(64, 8, 1), balanced_codes(64, 8, 2))
    assert len(balanced_codes(300, 66, 1).unique(dim=0)) == 300  # 7e18 codes, none of them listed


def test_too_few_members_are_refused_with_the_least_number() -> None:
    with pytest.raises(ValueError, match="6 members have 20 balanced codes, fewer than the 64 units: use at least 8"):
        balanced_codes(64, 6, 0)
    with pytest.raises(ValueError, match=r"num_members must lie in \[2, 66\], got 67"):
        balanced_codes(64, 67, 0)
    with pytest.raises(ValueError, match="num_units must be at least 1, got 0"):
        minimum_members(0)
    for units in (1, 2, 3, 20, 21, 35, 36, 70, 71, 10_000, 60_000):
        found = minimum_members(units)
        assert math.comb(found, found // 2) >= units
        assert found == 2 or math.comb(found - 1, (found - 1) // 2) < units


def test_the_manifest_says_which_images_belong_to_which_unit_and_who_sees_them(tmp_path: Path) -> None:
    codes = UnitCodes.drawn([[7, 12], [3], [40], [41]], 4, seed=5, kind="duplicates")
    codes.save(tmp_path / "codes.json")
    found = UnitCodes.load(tmp_path / "codes.json")
    assert (found.digest, found.units, found.kind, found.seed) == (codes.digest, codes.units, "duplicates", 5)
    assert found.members == ("member00", "member01", "member02", "member03")
    assert torch.equal(found.codes, codes.codes)
    for member in range(4):
        seen = [i for unit, bit in zip(codes.units, codes.codes[:, member], strict=True) if bit for i in unit]
        assert codes.seen_by(member) == sorted(seen)
    assert found.unit_of(torch.tensor([41, 12, 3, 7])).tolist() == [3, 0, 1, 0]
    assert torch.equal(codes.active([2]), ~codes.codes[2])
    assert torch.equal(codes.active(), torch.ones(4, dtype=torch.bool))


def test_a_changed_or_foreign_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes.json"
    with pytest.raises(ValueError, match=r"there is no .*codes.json"):
        UnitCodes.load(path)
    UnitCodes.drawn([[1], [2], [3]], 4).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"indices": [[1], [2], [4]]}))
    with pytest.raises(ValueError, match=r"codes.json was changed: its digest is \w+, it says \w+"):
        UnitCodes.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"codes.json is no manifest of codes \(KeyError\('codes'\)\)"):
        UnitCodes.load(path)


def test_units_that_do_not_fit_the_data_or_the_codes_are_refused() -> None:
    bits = torch.tensor([[True, False], [False, True]])
    with pytest.raises(ValueError, match=r"units do not cover the data: 2 images .* of the 2 units, such as \[8, 9"):
        UnitCodes(((1,), (2,)), bits).unit_of(torch.tensor([1, 8, 9]))
    with pytest.raises(ValueError, match=r"the images \[2\] stand in two units"):
        UnitCodes(((1, 2), (2,)), bits)
    with pytest.raises(ValueError, match=r"the units \[1\] hold no image"):
        UnitCodes(((1,), ()), bits)
    with pytest.raises(ValueError, match="two units share a code"):
        UnitCodes(((1,), (2,)), bits[[0, 0]])
    with pytest.raises(ValueError, match=r"the members \[2\] see no unit: use fewer members for 2 units"):
        UnitCodes(((1,), (2,)), torch.cat([bits, torch.zeros(2, 1, dtype=torch.bool)], 1))
    with pytest.raises(ValueError, match=r"every member saw one of the units \[0, 1\]: leave out fewer"):
        UnitCodes(((1,), (2,)), bits).active([0, 1])
    with pytest.raises(ValueError, match=r"units must lie in \[0, 2\), got \[2\]"):
        UnitCodes(((1,), (2,)), bits).active([2])
    with pytest.raises(ValueError, match="members need one name each"):
        UnitCodes(((1,), (2,)), bits, members=("a", "a"))


def test_duplicates_and_classes_are_units_and_every_image_stands_in_one() -> None:
    images = torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 1, 2, 2)
    images[4] = images[1]
    images[5] = images[0].flip(-1)
    indices = torch.tensor([50, 30, 20, 10, 60, 40])
    part = ImageSet(images, indices, tuple(image_digest(image) for image in images.numpy()))
    assert units_of(part) == [[10], [20], [30], [40], [50], [60]]
    assert units_of(part, "duplicates") == [[10], [20], [30, 60], [40], [50]]
    assert units_of(part, "duplicates", mirror=True) == [[10], [20], [30, 60], [40, 50]]
    labels = torch.tensor([2, 0, 0, 1, 2, 1])
    assert units_of(part, "class", labels) == [[20, 30], [10, 40], [50, 60]]
    with pytest.raises(ValueError, match="units: class needs a label for every image"):
        units_of(part, "class")
    with pytest.raises(ValueError, match="units must be one of image, duplicates, class, got 'person'"):
        units_of(part, "person")
