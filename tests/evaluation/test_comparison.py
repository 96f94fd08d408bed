"""Features of reference images: kept on disk to the bit, and shared by any number of processes."""

from pathlib import Path

import pytest
import torch
from planting import patterns, side_by_side
from torch import Tensor

from lightning_mem.evaluation import Banks, Comparison, Reference, Rules, Workers, cache_folder
from lightning_mem.evaluation.bands import scores
from lightning_mem.metrics import (
    SSCD_BANDS,
    AbstractExtractor,
    average_memorization_score,
    nearest_neighbors,
    unique_memorization_score,
)
from lightning_mem.types import SampleSet


class Counted(AbstractExtractor):
    """A fixed linear map that counts the images it saw."""

    def __init__(self) -> None:
        self.name, self.dim, self.digest, self.resize = "counted", 5, "0", "none"
        self.device, self.seen = torch.device("cpu"), 0
        self._map = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))

    def _features(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1).float() @ self._map


def banks(cache_dir: str | None, workers: Workers | None = None, count: int = 150) -> tuple[Banks, Counted]:
    extractor = Counted()
    reference = Reference.from_images(patterns(count), patterns(70, 1))
    return Banks(reference, [extractor], workers or Workers(), cache_dir), extractor


def test_cached_features_equal_uncached_ones_to_the_bit() -> None:
    plain, _ = banks(None)
    first, wrote = banks("cache")
    again, read = banks("cache")
    for bank in ("members", "heldout"):
        expected = plain.features(bank, plain.extractors[0])
        assert torch.equal(first.features(bank, wrote), expected)
        assert torch.equal(again.features(bank, read), expected)
    assert wrote.seen > 0
    assert read.seen == 0
    assert len(list(Path("cache").iterdir())) == 2


def test_a_damaged_cache_warns_and_is_computed_again() -> None:
    first, extractor = banks("cache")
    expected = first.features("members", extractor)
    file = next(Path("cache").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    second, again = banks("cache")
    with pytest.warns(RuntimeWarning, match="computed again: its digest does not match"):
        assert torch.equal(second.features("members", again), expected)
    third, unused = banks("cache")
    assert torch.equal(third.features("members", unused), expected)
    assert unused.seen == 0


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_extraction_and_get_what_one_gets(world: int) -> None:
    plain, extractor = banks(None)
    expected = plain.features("members", extractor)

    def work(workers: Workers) -> tuple[Tensor, int]:
        own, counted = banks("cache", workers)
        return own.features("members", counted), counted.seen

    first, second = side_by_side(world, work), side_by_side(world, work)
    for features, _ in (*first, *second):
        assert torch.equal(features, expected)
    assert [seen for _, seen in first] == [64 * (2 if world == 2 else 1)] * world  # three blocks
    assert [seen for _, seen in second] == [0] * world  # each found its own part


def test_one_search_feeds_every_rule_and_equals_searches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = banks(None)
    samples = SampleSet(patterns(20, 3), torch.arange(20))
    comparison = Comparison(samples, own, Rules(), wide=50)
    whole = comparison.nearest("members")
    rows = own.rows("members")
    assert len(rows) == 70  # the smaller bank's size
    cut = comparison.nearest("members", 50, cut=True)
    assert torch.equal(whole[0], nearest_neighbors(samples.images, own.images("members"), 2)[0])
    distances, indices = nearest_neighbors(samples.images, own.images("members")[rows], 50)
    assert torch.equal(cut[0], distances)
    assert torch.equal(cut[1], rows[indices])
    monkeypatch.setattr(own, "search", None)  # nothing is searched twice
    assert torch.equal(comparison.nearest("members", 1, cut=True)[0], distances[:, :1])


def test_the_cache_folder_follows_option_environment_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("LIGHTNING_MEM_CACHE", raising=False)
    assert cache_folder("auto") == Path("/somewhere/.cache/lightning_mem")
    monkeypatch.setenv("LIGHTNING_MEM_CACHE", "/elsewhere")
    assert cache_folder("auto") == Path("/elsewhere")
    assert cache_folder("mine") == Path("mine")
    assert cache_folder(None) is None


@pytest.mark.parametrize(("threshold", "delta"), [(0.0, 0.15), (1.0, 0.15), (0.3, 0.0), (0.3, 1.0)])
def test_rules_outside_their_range_are_refused(threshold: float, delta: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        Rules(threshold, delta)


@pytest.mark.parametrize("world", [1, 3])
def test_sscd_scores_are_those_of_the_whole_matrix_of_cosines(world: int) -> None:
    """A stand-in of SSCD's name; its features are dealt out, and the matrix is never held by the code under test."""
    members, samples = patterns(30), patterns(50, 3)
    samples[:9] = members[:9] // 2 + samples[:9] // 2  # near in direction
    reference = Reference.from_images(members, patterns(40, 1))

    def work(workers: Workers) -> dict[str, float | None]:
        extractor = Counted()
        extractor.name = "sscd"
        comparison = Comparison(SampleSet(samples, torch.arange(50)), Banks(reference, [extractor], workers), Rules())
        return {number.name: number.value for number in scores(comparison)}

    centred = [Counted()._features(images).double() for images in (samples, members)]
    cosines = torch.nn.functional.normalize(centred[0]) @ torch.nn.functional.normalize(centred[1]).T
    expected = {
        kind: score(cosines.float(), SSCD_BANDS)
        for kind, score in (("ams", average_memorization_score), ("ums", unique_memorization_score))
    }
    assert sum(expected["ams"].values()) > 0
    for found in side_by_side(world, work):
        for kind, values in expected.items():
            for band, value in values.items():
                assert found[f"memorization/{kind}/sscd/{band}"] == pytest.approx(value, abs=1e-12)
