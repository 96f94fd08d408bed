"""Copies are counted beside their control; numbers do not depend on how the work is dealt out."""

import pytest
import torch
from planting import Planted, patterns, side_by_side

from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import Measure, Reference, Workers, draw_samples
from lightning_mem.evaluation.measure import EVERY
from lightning_mem.metrics import PixelsExtractor, wilson_interval
from lightning_mem.types import SampleSet, to_uint8


@pytest.fixture(scope="module")
def data() -> MemorizationDataModule:
    module = MemorizationDataModule(num_members=30, num_heldout=40, batch_size=10)
    module.setup()
    return module


def planted_copies(data: MemorizationDataModule, copies: int, total: int) -> SampleSet:
    """A known share of copies (one pixel a level off); the others average two members, so they are near neither."""
    bank = data.members.images.clone()
    fresh = ((bank[:total].float() + bank.roll(1, 0)[:total].float()) / 2).to(torch.uint8)
    fresh[:copies] = bank[:copies]
    fresh[:copies, 0, 0, 0] += 1
    return SampleSet(fresh, torch.arange(total))


def test_planted_copies_are_found_with_their_control(data) -> None:
    reference = Reference.from_datamodule(data)
    measurement = Measure(reference)(planted_copies(data, 12, 30), step=7)
    values = measurement.values()
    assert values["memorization/ratio"] == 12 / 30
    assert (values["memorization/ratio_low"], values["memorization/ratio_high"]) == wilson_interval(12, 30)
    assert values["memorization/ratio_heldout"] == 0.0
    assert measurement.nearest[:12].tolist() == list(range(12))
    assert measurement.memorized.tolist() == [True] * 12 + [False] * 18
    by_name = {r.name: r for r in measurement.records}
    # statistics that depend on the size of the bank use equally large banks; the ratio uses all of both
    assert by_name["memorization/normalized_l2"].definition["bank_size"] == 30
    assert by_name["memorization/normalized_l2_heldout"].definition["bank_size"] == 30
    assert by_name["memorization/ratio_heldout"].definition["bank_size"] == 40
    assert by_name["memorization/ratio_heldout"].data_digest == data.heldout.digest


def test_nearest_mean_is_rms_on_the_unit_scale(data) -> None:
    reference = Reference.from_images(data.members.images[:20], data.heldout.images[:20])
    samples = SampleSet(data.heldout.images[20:30], torch.arange(10))
    difference = samples.images[:, None].double() - reference.members[None].double()
    expected = (difference / 255).square().flatten(2).mean(2).sqrt().amin(1).mean()
    found = Measure(reference)(samples).values()["memorization/nearest_mean"]
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_mirrored_copies_count_where_training_flips() -> None:
    data = MemorizationDataModule(num_members=30, num_heldout=40, flip=True)
    data.setup()
    mirrored = SampleSet(data.members.images.flip(-1), torch.arange(30))
    assert Measure(Reference.from_datamodule(data))(mirrored).values()["memorization/ratio"] == 1.0
    plain = Reference.from_images(data.members.images, data.heldout.images)
    assert Measure(plain)(mirrored).values()["memorization/ratio"] < 0.2


def test_without_heldout_images_the_control_is_null(data) -> None:
    measurement = Measure(Reference.from_images(data.members.images))(planted_copies(data, 3, 30))
    by_name = {r.name: r for r in measurement.records}
    assert by_name["memorization/ratio_heldout"].value is None
    assert by_name["frechet/pixels/heldout"].value is None
    assert "memorization/ratio_heldout" not in measurement.values()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_dealing_out_blocks_changes_nothing(world: int) -> None:
    rows = torch.arange(150.0)
    found = side_by_side(world, lambda workers: workers.in_blocks(150, lambda places: rows[places] * 2, block=64))
    assert all(torch.equal(one, rows * 2) for one in found)


def test_padding_rows_do_not_reach_the_samples(data) -> None:
    target = EmpiricalDenoiser(data.members.images, DiffusionProcess()).target()
    small, large = draw_samples(target, 3, num_steps=5), draw_samples(target, 65, num_steps=5)
    assert len(small) == 3
    assert torch.equal(small.images, large.images[:3])


def test_wrong_shapes_are_named(data) -> None:
    samples = SampleSet(to_uint8(torch.zeros(2, 3, 8, 8)), torch.arange(2))
    with pytest.raises(ValueError, match=r"samples are \(3, 8, 8\), the training images \(1, 8, 8\)"):
        Measure(Reference.from_datamodule(data))(samples)


def test_one_training_image_has_no_ratio(data) -> None:
    same = data.members.images[:1].expand(5, -1, -1, -1)
    with pytest.raises(ValueError, match="two different training images, got 1"):
        Measure(Reference.from_images(same, data.heldout.images))(planted_copies(data, 3, 30))


@pytest.mark.parametrize("world", [2, 3])
def test_every_metric_is_the_same_on_several_processes(planted: Planted, world: int) -> None:
    reference = Reference.from_images(planted.members, planted.heldout)

    def work(workers: Workers) -> list[tuple]:
        records = Measure(reference, workers=workers, metrics=EVERY)(planted.samples).records
        return [(r.name, r.value, r.low, r.high, r.definition) for r in records]

    alone = work(Workers())
    assert len(alone) > 40
    assert side_by_side(world, work) == [alone] * world


def test_side_scores_agree_with_the_rule_they_are_made_of(planted: Planted) -> None:
    reference = Reference.from_images(planted.members, planted.heldout)
    values = Measure(reference, metrics=["normalized_l2", "scores"])(planted.samples).values()
    for ending in ("", "_heldout"):
        for end in ("", "_low", "_high"):
            high, share = f"memorization/ams/pixels/high{ending}{end}", f"memorization/normalized_l2{ending}{end}"
            assert values[high] == values[share]


def test_phases_tell_a_crowd_that_no_training_image_explains() -> None:
    members, heldout, samples = patterns(120), patterns(120, 1), patterns(120, 2)
    samples[:30] = members[:30]
    samples[60:90] = samples[60:61]  # thirty of a picture that nobody trained on
    values = Measure(Reference.from_images(members, heldout), metrics=["phases"])(
        SampleSet(samples, torch.arange(120))
    ).values()
    assert values["memorization/phase/memorized"] == pytest.approx(30 / 120, abs=3 / 120)
    assert values["memorization/phase/spurious"] == pytest.approx(30 / 120, abs=3 / 120)
    assert values["memorization/phase/memorized_heldout"] <= 3 / 120


def test_eidetic_counts_see_duplicates_in_the_training_set(planted: Planted) -> None:
    """Twelve near copies of member 4 in the training set: its extraction is no sign of one picture learned by heart."""
    near = planted.members[4:5].repeat(12, 1, 1, 1)
    near[torch.arange(12), 0, 1, torch.arange(12) % 8] ^= 1
    near[8:, 0, 2, 2] ^= 2
    values = Measure(Reference.from_images(torch.cat([planted.members, near])), metrics=["extracted"])(
        SampleSet(planted.samples.images[[0, 2]], torch.arange(2))
    ).values()
    assert values["memorization/extracted"] == 1.0
    assert values["memorization/eidetic_k"] == 13.0


def test_copies_are_not_authentic_and_unseen_images_are_half_the_time(data: MemorizationDataModule) -> None:
    reference = Reference.from_datamodule(data)
    values = Measure(reference, metrics=["authenticity", "data_copying"])(planted_copies(data, 12, 30)).values()
    assert 1 - values["authenticity/pixels/train"] >= 12 / 30  # all copies, and what lies near by chance
    everything = Measure(reference, metrics=["authenticity"])(SampleSet(data.members.images, torch.arange(30))).values()
    assert everything["authenticity/pixels/train"] == 0.0
    assert everything["authenticity/pixels/heldout"] > 0.2
    assert 0.2 < everything["authenticity/pixels/unseen"] < 0.8
    assert values["data_copying/pixels"] < -2


def test_the_extrapolated_distance_takes_off_the_bias_of_few_samples() -> None:
    """Two halves of one distribution: the plain distance is far from 0, the extrapolated one near it."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1200, 1, 2, 2), generator=draw, dtype=torch.uint8)
    measure = Measure(Reference.from_images(images[:400], images[400:800]), metrics=["frechet", "frechet_infinity"])
    values = measure(SampleSet(images[800:], torch.arange(400))).values()
    plain, extrapolated = values["frechet/pixels/heldout"], values["frechet_infinity/pixels/heldout"]
    assert abs(extrapolated) < plain
    assert values["frechet_infinity/pixels/heldout_low"] < 0.002


def test_only_the_original_inception_has_a_fid_and_a_kid(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(PixelsExtractor):
        """Pixels under another name, as from an official file."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.official = name.removesuffix(" of our own"), name in ("inception", "inception-64", "sscd")

    monkeypatch.setattr("lightning_mem.evaluation.measure.build_extractor", lambda name, *_, **__: Named(name))
    reference = Reference.from_images(planted.members, planted.heldout)
    found = {}
    for name in ("pixels", "inception", "inception of our own", "inception-64", "sscd"):
        records = Measure(reference, [name], metrics=["frechet", "kernel"])(planted.samples).records
        found[name] = {record.name for record in records if record.name.startswith(("fid", "kid"))}
    assert found.pop("inception") == {"fid/train", "fid/heldout", "kid/train", "kid/heldout"}
    assert not any(found.values()), found


def test_kernel_distance_is_the_formula_on_banks_of_equal_size(planted: Planted) -> None:
    measure = Measure(Reference.from_images(planted.members, planted.heldout), metrics=["kernel"])
    records = {record.name: record for record in measure(planted.samples).records}
    x = planted.samples.images.flatten(1).double() / 255
    rows = measure.reference.cut(planted.heldout, "heldout")
    for name, y in (("train", planted.members), ("heldout", planted.heldout[rows])):
        y = y.flatten(1).double() / 255
        k = lambda a, b: (a @ b.T / 64 + 1) ** 3  # noqa: E731
        n, m = len(x), len(y)
        within = (k(x, x).sum() - k(x, x).trace()) / (n * (n - 1)) + (k(y, y).sum() - k(y, y).trace()) / (m * (m - 1))
        assert records[f"kernel/pixels/{name}"].value == pytest.approx(float(within - 2 * k(x, y).mean()), abs=1e-9)
        assert records[f"kernel/pixels/{name}"].definition["bank_size"] == 40


def test_what_cannot_be_given_says_why(planted: Planted) -> None:
    few = SampleSet(planted.samples.images[:4], torch.arange(4))
    records = Measure(Reference.from_images(planted.members), metrics=EVERY)(few).records
    undefined = {record.name: record.definition.get("undefined") for record in records if record.value is None}
    assert undefined["data_copying/pixels"] == "there are no held-out images"
    assert "more than 5" in undefined["precision/pixels/train"]
    assert "325 samples" in undefined["frechet_infinity/pixels/train"]
    assert "memorization/ratio" not in undefined


def test_an_unknown_metric_is_refused_with_the_known_ones(planted: Planted) -> None:
    with pytest.raises(ValueError, match="metrics must be some of ratio, .*, got nonsense"):
        Measure(Reference.from_images(planted.members), metrics=["nonsense"])
