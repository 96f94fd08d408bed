"""Pseudo-labels: generated images only, every one labelled, drawn once and never mixed with another target's."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from victim import write_target

from lightning_mem.attacks import PseudoLabels, pseudo_labels
from lightning_mem.data import ArraySource, MemorizationDataModule
from lightning_mem.evaluation.blocks import draw_block
from lightning_mem.modules import load_target
from lightning_mem.types import SampleSet

DRAWING: dict[str, Any] = {"sampler": "ddim", "num_steps": 2, "eta": 0.0, "block": 64}


def source(target: str | None, **options: Any) -> PseudoLabels:
    small = {"num_images": 70, "num_clusters": 6, "extractor": "pixels", "num_steps": 2, "n_init": 1, "device": "cpu"}
    return PseudoLabels(target, **small | options)


def given(target: str, count: int = 64, **settings: Any) -> SampleSet:
    """What the verb ``sample`` would have drawn."""
    model = load_target(target)
    return draw_block(model, torch.arange(count), {**DRAWING, "sample_seed": 5, "target": model.digest, **settings})


@pytest.mark.parametrize(("dropped", "more"), [("relabel", 0), ("background", 1)])
def test_every_image_carries_a_label_and_the_manifest_says_how(target: str, dropped: str, more: int) -> None:
    labelled = source(target, keep=3, dropped=dropped)
    labelled.prepare()
    labels, about = labelled.labels(), labelled.provenance()
    assert len(labelled) == len(labels) == 70
    assert labelled.num_targets == 3
    assert labelled.num_classes == 3 + more
    assert set(labels) == set(range(3 + more))
    np.testing.assert_array_equal(about["class_counts"], np.bincount(labels))
    assert about["target_digest"] == load_target(target).digest
    assert about["images_digest"] == SampleSet.load(labelled.file).digest
    assert {len(about[f"cluster_{name}"]) for name in ("cohesion", "isolation", "sizes")} == {3}
    features = torch.from_numpy(np.stack([labelled.read(i, 8, 1) for i in range(70)])).flatten(1) / 255
    np.testing.assert_array_equal(labelled.clusters().labels(features, dropped).numpy(), labels)


def test_it_is_a_source_of_labelled_examples_for_a_classifier(target: str) -> None:
    data = MemorizationDataModule(source(target), None, 10, 8, labels="true")
    data.prepare_data()
    data.setup()
    own = data.source.labels()
    assert torch.equal(data.members.labels, torch.from_numpy(own[data.members.indices]))
    assert len(data.members) + len(data.heldout) == 70
    again = pickle.loads(pickle.dumps(data.source))  # as a reader process gets it
    np.testing.assert_array_equal(again.labels(), own)


def test_another_size_than_the_target_draws_is_refused(target: str) -> None:
    data = MemorizationDataModule(source(target), None, 10, 16, labels="true")
    data.prepare_data()
    with pytest.raises(ValueError, match=r"draws images of \(channels, height, width\) \(1, 8, 8\).*data.image_size 8"):
        data.setup()


def test_what_was_drawn_and_labelled_is_not_done_again(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def draw(*args: Any) -> SampleSet:
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return draw_block(*args)

    monkeypatch.setattr(pseudo_labels, "draw_block", draw)
    with pytest.raises(RuntimeError, match="power cut"):
        source(target).prepare()
    source(target).prepare()
    assert calls == [64, 6, 6]  # the first block was there
    source(target).prepare()
    source(target, num_clusters=5).prepare()  # other clusters of the same images
    assert len(calls) == 3
    drawn = list(Path(target, "pseudo_labels").glob("samples-*.npz"))
    assert len(drawn) == 1
    whole = SampleSet.load(drawn[0])
    expected = draw_block(load_target(target), torch.arange(70), whole.settings)
    assert torch.equal(whole.images, expected.images)


def test_seeds_targets_and_settings_have_files_of_their_own(target: str) -> None:
    other = write_target(Path("other"), seed=1)
    ways = [source(target), source(target, seed=1), source(other), source(target, tau=0.4), source(target, keep=3)]
    assert len({one.file.name for one in ways}) == len(ways)
    seeds = {one.settings["sample_seed"] for one in ways[:2]}
    assert len(seeds) == 2
    assert not seeds & {0, 1}  # never the noise that an attack starts from


def test_given_samples_are_labelled_when_the_target_draws_them_again(target: str) -> None:
    given(target).save("given.npz")
    labelled = source(target, num_images=64, samples="given.npz", verify="all")
    labelled.prepare()
    assert torch.equal(SampleSet.load(labelled.file).images, SampleSet.load("given.npz").images)


@pytest.mark.parametrize("verify", ["block", "all"])
def test_a_training_image_among_given_samples_is_named(target: str, verify: str) -> None:
    samples = given(target)
    samples.images[17] = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 8, 8), dtype=np.uint8))
    samples.save("given.npz")
    message = r"row 17 of given.npz is not what victim draws at address 17 .*holds generated images only"
    with pytest.raises(ValueError, match=message):
        source(target, num_images=64, samples="given.npz", verify=verify).prepare()


def test_samples_that_cannot_be_drawn_again_are_refused(target: str) -> None:
    other = write_target(Path("other"), seed=1)
    cases: list[tuple[SampleSet, str]] = [
        (given(other), "was drawn from the target"),
        (given(target, guidance="classifier"), "was drawn under guidance"),
        (given(target, count=20), "holds 20 images, num_images is 64"),
        (
            SampleSet(given(target).images, torch.arange(64)),
            "does not say its sampler, num_steps, eta, sample_seed, block",
        ),
    ]
    for samples, message in cases:
        samples.save("given.npz")
        with pytest.raises(ValueError, match=message):
            source(target, num_images=64, samples="given.npz").prepare()
    # a foreign set that names no target: the pixels tell
    foreign = given(other)
    del foreign.settings["target"]
    foreign.save("given.npz")
    with pytest.raises(ValueError, match="is not what victim draws"):
        source(target, num_images=64, samples="given.npz").prepare()


def test_bad_options_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"num_clusters must lie in \[2, num_images = 70\], got 71"):
        source(target, num_clusters=71)
    with pytest.raises(ValueError, match="0 of 6 clusters stay"):
        source(target, tau=1.0).prepare()
    with pytest.raises(ValueError, match="sscd needs images of at least 32 pixels, those of victim have 8"):
        source(target, extractor="sscd").prepare()
    with pytest.raises(ValueError, match="PseudoLabels needs target"):
        source(None).prepare()
    with pytest.raises(ValueError, match="call prepare"):
        source(target).open()


def test_a_file_of_labelled_images_tells_the_same_story(target: str) -> None:
    labelled = source(target)
    labelled.prepare()
    assert ArraySource(str(labelled.file)).provenance() == labelled.provenance()
    np.savez("plain.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    assert ArraySource("plain.npz").provenance() == {}
    Path("plain.json").write_text("[]")
    with pytest.raises(ValueError, match="plain.json is no manifest of a SampleSet"):
        ArraySource("plain.npz").provenance()
