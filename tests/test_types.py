import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mem.types import SampleSet, to_float, to_uint8

EVERY_LEVEL = torch.arange(256, dtype=torch.int64).to(torch.uint8)


def samples(n=5, labels=True, channels=3):
    draw = torch.Generator().manual_seed(0)
    return SampleSet(
        images=torch.randint(0, 256, (n, channels, 4, 6), generator=draw).to(torch.uint8),
        addresses=torch.arange(n) * 3 + 2**40,
        labels=torch.arange(n) % 3 if labels else None,
        weights="ema",
        settings={"seed": 4, "sampler": "ddim", "eta": 0.0},
    )


def test_quantising_undoes_the_scale_on_every_level():
    assert torch.equal(to_uint8(to_float(EVERY_LEVEL)), EVERY_LEVEL)
    assert to_float(EVERY_LEVEL).dtype == torch.float32
    exact = EVERY_LEVEL.double() * 2 / 255 - 1
    assert (to_float(EVERY_LEVEL).double() - exact).abs().max() < 2**-23


def test_quantising_rounds_to_the_nearest_level_and_clamps():
    levels = EVERY_LEVEL.double()
    for offset in (-0.49, 0.49):
        assert torch.equal(to_uint8((levels + offset) / 127.5 - 1), EVERY_LEVEL)
    outside = torch.tensor([-100.0, -1.0001, 1.0001, 1e30])
    assert to_uint8(outside).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_become_no_pixel(value):
    with pytest.raises(ValueError, match="1 of 6 pixel values"):
        to_uint8(torch.tensor([[0.0, 0.1, value], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_set_survives_the_disk(labels, channels):
    written = samples(labels=labels, channels=channels)
    written.save("out/samples.npz")
    read = SampleSet.load("out/samples.npz")
    assert torch.equal(read.images, written.images)
    assert torch.equal(read.addresses, written.addresses)
    assert (read.labels is None) == (not labels)
    assert read.labels is None or torch.equal(read.labels, written.labels)
    assert (read.weights, read.settings, read.digest) == (written.weights, written.settings, written.digest)
    with np.load("out/samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"][2, 1, 3], written.images[2, :, 1, 3].numpy())
    assert json.loads(Path("out/samples.json").read_text())["n"] == 5


def test_names_with_a_dot_are_kept_apart():
    samples(3).save("guidance_1.5")
    samples(4).save("guidance_1.7")
    kept = [path for path in Path().iterdir() if path.suffix == ".npz"]
    assert sorted(len(SampleSet.load(path)) for path in kept) == [3, 4]


def test_an_archive_of_the_field_needs_no_manifest():
    images = samples().images.permute(0, 2, 3, 1).numpy()
    np.savez("theirs.npz", images)
    read = SampleSet.load("theirs.npz")
    assert torch.equal(read.images, samples().images)
    assert read.addresses.tolist() == [0, 1, 2, 3, 4]
    assert read.labels is None


def test_samples_that_are_not_those_of_the_manifest_are_refused():
    samples().save("samples.npz")
    changed = samples().images.clone()
    changed[4, 2, 3, 5] ^= 1
    np.savez("samples.npz", arr_0=changed.permute(0, 2, 3, 1).numpy(), addresses=samples().addresses.numpy())
    with pytest.raises(ValueError, match=r"other samples than its manifest samples\.json"):
        SampleSet.load("samples.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
        {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
        {"arr_0": np.zeros((2, 4, 4), np.uint8)},
        {"images": np.zeros((2, 4, 4, 3), np.uint8)},
        {"arr_0": np.array([{"code": 1}])},
    ],
)
def test_other_layouts_are_refused(arrays):
    np.savez("theirs.npz", **arrays)
    with pytest.raises(ValueError, match=r"theirs\.npz"):
        SampleSet.load("theirs.npz")


def test_files_that_are_no_archive_are_refused_by_name():
    samples().save("whole.npz")
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:200])
    Path("empty.npz").write_bytes(b"")
    Path("text.npz").write_text("no archive")
    np.save("array.npy", np.zeros((2, 4, 4, 3), np.uint8))
    for name in ("cut.npz", "empty.npz", "text.npz", "array.npy"):
        with pytest.raises(ValueError, match=name):
            SampleSet.load(name)


def test_a_compressed_archive_with_a_flipped_byte_is_refused_by_name():
    np.savez_compressed("theirs.npz", samples(64).images.permute(0, 2, 3, 1).numpy())
    content = bytearray(Path("theirs.npz").read_bytes())
    for place in range(60, len(content) - 200, 97):
        damaged = content.copy()
        damaged[place] ^= 0xFF
        Path("damaged.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.npz"):
            SampleSet.load("damaged.npz")


def test_the_digest_follows_pixels_addresses_and_labels():
    base = samples()
    pixels = base.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    others = [replace(base, images=pixels), replace(base, addresses=base.addresses + 1), replace(base, labels=None)]
    others.append(replace(base, labels=base.labels.flip(0)))
    assert len({other.digest for other in others} | {base.digest}) == 5
    assert replace(base, settings={}, weights="raw").digest == base.digest
    assert len(base) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.zeros(5, 3, 4, 6)}, r"float32 \(5, 3, 4, 6\)"),
        ({"images": torch.zeros(5, 3, 4, dtype=torch.uint8)}, r"uint8 \(5, 3, 4\)"),
        ({"addresses": torch.arange(4)}, r"addresses .*\(5\), got \(4,\)"),
        ({"labels": torch.arange(6)}, r"labels .*\(5\), got \(6,\)"),
        ({"addresses": torch.tensor([1, 2, 3, 2, 4])}, "occurs twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(samples(), **options)
