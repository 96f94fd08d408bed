import math
import re

import numpy as np
import pytest
import torch
from oracles import dense_class_log_probability, dense_posterior_mean, finite_differences

from lightning_mem.data import DigitsSource
from lightning_mem.diffusion import (
    DiffusionProcess,
    EmpiricalClassifier,
    EmpiricalDenoiser,
    classifier_gradient,
    sample,
)
from lightning_mem.diffusion import posterior as posteriors
from lightning_mem.metrics import duplicate_groups, memorization_ratio, nearest_neighbors
from lightning_mem.types import to_float

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]


def variant_name(options):
    return "-".join(str(value) for value in options.values())


@pytest.fixture(scope="module")
def digits():
    source = DigitsSource()
    return torch.stack([torch.from_numpy(source.read(i, 8, 1)) for i in range(len(source))])


@pytest.fixture(scope="module")
def true_labels():
    return torch.from_numpy(DigitsSource().labels())


def members_of(bank, samples):
    """For each sample, whether some row of the bank has exactly its pixels."""
    rows = {image.numpy().tobytes() for image in bank}
    return [image.numpy().tobytes() in rows for image in samples]


def ratio(samples, bank, groups=None):
    distances, _ = nearest_neighbors(samples, bank, 2, groups=groups)
    return memorization_ratio(distances)


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_sample_of_the_optimum_is_a_training_image(digits, options, prediction):
    bank = digits[:64]
    target = EmpiricalDenoiser(bank, DiffusionProcess(prediction=prediction)).target()
    drawn = sample(target, range(64), seed=0, num_steps=20, **options)
    assert all(members_of(bank, drawn))
    assert len(drawn.flatten(1).unique(dim=0)) > 32  # and not always the same one
    assert ratio(drawn, bank, duplicate_groups(bank)) == 1.0


def test_fresh_draws_are_no_copies(digits):
    bank, fresh = digits[:64], digits[64:320]
    assert ratio(fresh, bank, duplicate_groups(bank)) == 0.0


def test_duplicates_and_mirror_images_need_groups(digits):
    bank = digits[:64]
    process = DiffusionProcess()
    doubled = torch.cat([bank, bank])
    drawn = sample(EmpiricalDenoiser(doubled, process), range(64), seed=0, num_steps=20)
    assert ratio(drawn, doubled, duplicate_groups(doubled)) == 1.0
    with pytest.raises(ValueError, match="the bank holds duplicates"):  # the second neighbour is as near as the first
        ratio(drawn, doubled)
    mirrored = torch.cat([bank, bank.flip(-1)])
    drawn = sample(EmpiricalDenoiser(mirrored, process), range(64), seed=0, num_steps=20)
    assert all(members_of(mirrored, drawn))
    assert not all(members_of(bank, drawn))
    assert ratio(drawn, mirrored, duplicate_groups(mirrored, mirror=True)) == 1.0


def test_symmetric_images_are_missed_without_mirror_groups():
    draw = torch.Generator().manual_seed(0)
    half = torch.randint(0, 256, (16, 1, 8, 4), generator=draw, dtype=torch.uint8)
    almost = torch.cat([half, half.flip(-1)], dim=3)
    almost[:, 0, 0, 0] ^= 1  # an image and its mirror image are nearly the same
    bank = torch.cat([almost, almost.flip(-1)])
    noisy = (almost.int() + torch.randint(-3, 4, almost.shape, generator=draw)).clamp(0, 255).to(torch.uint8)
    assert ratio(noisy, bank) == 0.0
    assert ratio(noisy, bank, duplicate_groups(bank, mirror=True)) == 1.0


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
@pytest.mark.parametrize("with_labels", [False, True])
def test_streaming_equals_the_dense_definition(digits, true_labels, chunk, with_labels):
    bank, labels = digits[:50], true_labels[:50]
    process = DiffusionProcess("linear")
    denoiser = EmpiricalDenoiser(bank, process, labels if with_labels else None, chunk=chunk)
    draw = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 10, 50, 100, 200, 400, 700, 998, 999])
    x0 = to_float(bank[:10]).double()
    x_t = process.add_noise(x0, torch.randn(x0.shape, generator=draw, dtype=torch.float64), t)
    wanted = labels[10:20] if with_labels else None
    mean = denoiser.posterior_mean(x_t, t, wanted)
    dense = dense_posterior_mean(
        bank.numpy() / 127.5 - 1,
        x_t.numpy(),
        process.alpha_bar[t].numpy(),
        labels.numpy() if with_labels else None,
        wanted.numpy() if with_labels else None,
    )
    # uint8 becomes float32 on the way: x / 127.5 - 1 is exact to 6e-8 only
    exact = dense_posterior_mean(
        to_float(bank).numpy(),
        x_t.numpy(),
        process.alpha_bar[t].numpy(),
        labels.numpy() if with_labels else None,
        wanted.numpy() if with_labels else None,
    )
    np.testing.assert_allclose(mean.numpy(), exact, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mean.numpy(), dense, rtol=0, atol=1e-3)
    assert mean.std(dim=0).max() > 0.1  # the rows differ: from one image at t = 0 to the mean of all


def test_far_away_points_do_not_underflow(digits):
    # every weight exp(-d**2 / 2 sigma**2) is 0 in float64 before the maximum is taken out
    denoiser = EmpiricalDenoiser(digits[:20], DiffusionProcess("linear"), chunk=3)
    x_t = torch.full((1, 1, 8, 8), 100.0, dtype=torch.float64)
    mean = denoiser.posterior_mean(x_t, torch.tensor([0]))
    brightest = to_float(digits[:20]).flatten(1).double().sum(1).argmax()
    torch.testing.assert_close(mean[0], to_float(digits[brightest]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_output_is_the_training_target_of_a_single_image(digits, prediction):
    # with one image, x0 is known and the loss can be brought to zero
    process = DiffusionProcess("linear", prediction=prediction)
    denoiser = EmpiricalDenoiser(digits[:1], process)
    assert denoiser.prediction == prediction
    t = torch.tensor([0, 5, 100, 500, 999])
    x0 = to_float(digits[:1]).double().expand(5, 1, 8, 8)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = denoiser(process.add_noise(x0, eps, t), t)
    torch.testing.assert_close(output, process.training_target(x0, eps, t), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_a_set_of_one_image_gives_that_image(digits, options):
    drawn = sample(EmpiricalDenoiser(digits[5:6], DiffusionProcess()), range(8), seed=0, num_steps=10, **options)
    assert torch.equal(drawn, digits[5:6].expand(8, 1, 8, 8))


def test_a_label_never_returns_an_image_of_another(digits, true_labels):
    bank, labels = digits[:64], true_labels[:64]
    denoiser = EmpiricalDenoiser(bank, DiffusionProcess(), labels, chunk=10)
    assert denoiser.target().num_classes == 10
    wanted = torch.arange(60) % 10
    drawn = sample(denoiser, range(60), seed=0, num_steps=20, condition=wanted)
    for label in range(10):
        assert all(members_of(bank[labels == label], drawn[wanted == label]))
    free = denoiser.posterior_mean(torch.zeros(1, 1, 8, 8), torch.tensor([999]))
    restricted = denoiser.posterior_mean(torch.zeros(1, 1, 8, 8), torch.tensor([999]), torch.tensor([3]))
    # at the last timestep all images weigh (nearly) the same: the mean of the set, and of the label
    everything = to_float(bank).double()
    assert (free[0] - everything.mean(0)).abs().max() < 0.02
    assert (restricted[0] - everything[labels == 3].mean(0)).abs().max() < 0.02


def test_a_label_without_images_is_refused(digits):
    labels = torch.tensor([0, 1, 1, 3])
    denoiser = EmpiricalDenoiser(digits[:4], DiffusionProcess(), labels, chunk=2)
    x_t, t = torch.zeros(3, 1, 8, 8), torch.tensor([5, 5, 5])
    with pytest.raises(ValueError, match=r"labels \[2\]"):
        denoiser(x_t, t, torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match="built without"):
        EmpiricalDenoiser(digits[:4], DiffusionProcess())(x_t, t, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, r"non-empty.*\(0, 1, 8, 8\)"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), None, r"\(4, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\(4\), got \(3,\)"),
    ],
)
def test_sets_that_are_none_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        EmpiricalDenoiser(images, DiffusionProcess(), labels)


def test_targets_that_sample_differently_have_different_digests(digits):
    base = EmpiricalDenoiser(digits[:8], DiffusionProcess()).target().digest
    assert EmpiricalDenoiser(digits[:8], DiffusionProcess()).target().digest == base
    others = [
        EmpiricalDenoiser(digits[1:9], DiffusionProcess()),
        EmpiricalDenoiser(digits[:8], DiffusionProcess("linear")),
        EmpiricalDenoiser(digits[:8], DiffusionProcess(prediction="v")),
        EmpiricalDenoiser(digits[:8], DiffusionProcess(clip_sample=False)),
        EmpiricalDenoiser(digits[:8], DiffusionProcess(), torch.zeros(8, dtype=torch.int64)),
    ]
    assert len({other.target().digest for other in others} | {base}) == 6


def test_memory_follows_the_chunk():
    # 12,000 images of 3 x 32 x 32 are 295 MB in float64, too much to be kept; a chunk of 512 rows is 13 MB
    bank = torch.zeros(12_000, 3, 32, 32, dtype=torch.uint8)
    bank[:, :, 0, 0] = torch.randint(0, 256, (12_000, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    denoiser = EmpiricalDenoiser(bank, DiffusionProcess(), chunk=512)
    assert denoiser.images.data_ptr() == bank.data_ptr()
    largest = 0
    original = denoiser.posterior.rows

    def watched(start, device):
        nonlocal largest
        rows = original(start, device)
        largest = max(largest, rows[0].numel() * rows[0].element_size())
        return rows

    denoiser.posterior.rows = watched
    mean = denoiser.posterior_mean(torch.zeros(1, 3, 32, 32), torch.tensor([999]))
    assert largest <= 512 * (math.prod(bank.shape[1:]) + 1) * 8
    assert torch.isfinite(mean).all()


def noised(images, t, process, seed=0):
    x0 = to_float(images).double()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return process.add_noise(x0, eps, t)


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
@pytest.mark.parametrize("kept", [True, False])
def test_the_classifier_is_bayes_rule_on_the_noised_set(digits, true_labels, chunk, kept, monkeypatch):
    if not kept:  # as for a set too large to be held
        monkeypatch.setattr(posteriors, "KEPT_BYTES", 0)
    process = DiffusionProcess("linear")
    classifier = EmpiricalClassifier(digits[:50], true_labels[:50], process, chunk=chunk)
    t = torch.tensor([0, 10, 100, 200, 400, 700, 999])
    x_t = noised(digits[50:57], t, process)
    found = classifier(x_t, t).log_softmax(1)
    signal = process.alpha_bar[t].numpy()
    dense = dense_class_log_probability(
        to_float(digits[:50]).double().numpy(), true_labels[:50].numpy(), x_t.numpy(), signal
    )
    # the logits themselves reach 64 / (2e-4) at t = 0
    np.testing.assert_allclose(found.numpy(), dense, rtol=1e-12, atol=1e-8)
    assert dense[0].min() < -1e4  # far below what exp can hold
    assert dense[-1].min() > -3
    # the closed form of the gradient, from E[x0 | x_t] by the definition
    wanted = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    gradient = classifier_gradient(classifier, x_t, t, wanted)
    bank, labels = to_float(digits[:50]).numpy(), true_labels[:50].numpy()
    own = dense_posterior_mean(bank, x_t.numpy(), signal, labels, wanted.numpy())
    every = dense_posterior_mean(bank, x_t.numpy(), signal)
    factor = (np.sqrt(signal) / (1 - signal)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(gradient.numpy(), factor * (own - every), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_the_classifiers_gradient_is_the_slope_of_bayes_rule(digits, true_labels, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(posteriors, "KEPT_BYTES", 0)
    process = DiffusionProcess("linear")
    classifier = EmpiricalClassifier(digits[:30], true_labels[:30], process, chunk=4)
    bank, labels = to_float(digits[:30]).double().numpy(), true_labels[:30].numpy()
    t, wanted = torch.tensor([150, 400, 800]), torch.tensor([3, 7, 0])
    x_t = noised(digits[30:33], t, process)
    gradient = classifier_gradient(classifier, x_t, t, wanted).numpy()
    for row in range(3):
        signal = process.alpha_bar[t[row : row + 1]].numpy()

        def log_p(x, row=row, signal=signal):
            return dense_class_log_probability(bank, labels, x[None], signal)[0, wanted[row]]

        slopes = finite_differences(log_p, x_t[row].numpy(), 1e-5)
        # central differences: h**2 of curvature, and 1e-16 / h of rounding times logits of 1e2
        np.testing.assert_allclose(gradient[row], slopes, rtol=1e-5, atol=1e-7)
        assert np.abs(slopes).max() > 1e-3


def test_the_classifier_of_noise_knows_only_how_large_its_classes_are(digits):
    labels = torch.tensor([0] * 30 + [1] * 10)
    classifier = EmpiricalClassifier(digits[:40], labels, DiffusionProcess("cosine", prediction="v"))
    assert classifier.num_classes == 2
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    p = classifier(x_t, torch.full((4,), 999)).softmax(1)
    torch.testing.assert_close(p, torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(4, 2), rtol=0, atol=0.01)


def test_classifiers_that_answer_differently_have_different_digests(digits):
    labels = torch.arange(8) % 2
    base = EmpiricalClassifier(digits[:8], labels, DiffusionProcess()).digest
    assert EmpiricalClassifier(digits[:8], labels, DiffusionProcess(prediction="v")).digest == base  # no matter here
    others = [
        EmpiricalClassifier(digits[1:9], labels, DiffusionProcess()),
        EmpiricalClassifier(digits[:8], 1 - labels, DiffusionProcess()),
        EmpiricalClassifier(digits[:8], labels, DiffusionProcess("linear")),
    ]
    assert len({other.digest for other in others} | {base}) == 4


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (torch.tensor([0, 1, 2]), None, r"one per image (4), got torch.int64 (3,)"),
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), None, "integers, one per image (4), got torch.float32"),
        (torch.tensor([0, 1, 3, 3]), None, "classes [2] of 4 have no image"),
        (torch.tensor([0, 1, 1, 0]), 4, "classes [2, 3] of 4 have no image"),
        (torch.tensor([0, 1, 2, 3]), 3, "[0, 3), got 0 to 3"),
        (torch.tensor([0, 1, -1, 1]), None, "[0, 2), got -1 to 1"),
    ],
)
def test_labels_that_make_no_classifier_are_refused(digits, labels, num_classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EmpiricalClassifier(digits[:4], labels, DiffusionProcess(), num_classes)
