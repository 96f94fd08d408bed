"""The guiding term: its gradient, when it acts and how strongly, and that it changes nothing where it does not."""

import math

import numpy as np
import pytest
import torch
from guiding import PREDICTIONS, VARIANTS, NetworkClassifier, Untouchable, draw, network_target, variant_name
from oracles import finite_differences
from torch import nn

from lightning_mem.diffusion import (
    ClassifierGuidance,
    DiffusionProcess,
    Target,
    classifier_gradient,
)


def test_the_gradient_of_a_network_is_the_slope_of_its_log_probability():
    classifier = NetworkClassifier()
    classifier.module.double().eval()
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, labels = torch.tensor([0, 400, 999]), torch.tensor([2, 0, 1])
    gradient = classifier_gradient(classifier, x_t, t, labels).numpy()
    for row in range(3):

        def log_p(x, row=row):
            with torch.no_grad():
                logits = classifier.module(torch.from_numpy(x)[None], t[row : row + 1]).numpy()[0]
            return logits[labels[row]] - np.logaddexp.reduce(logits)

        # central differences: 1e-16 / h of rounding, h**2 of curvature
        slopes = finite_differences(log_p, x_t[row].numpy(), 1e-5)
        np.testing.assert_allclose(gradient[row], slopes, rtol=0, atol=1e-9)
        assert np.abs(slopes).max() > 1e-2


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_no_guidance_changes_no_bit_and_asks_no_classifier(options, prediction):
    target, labels = network_target(prediction), torch.zeros(5, dtype=torch.int64)
    none = ClassifierGuidance(Untouchable(), labels, 0.0)
    elsewhere = ClassifierGuidance(Untouchable(), labels, 5.0, interval=(999, 1000))
    assert 999 not in target.process.scheduler("ddim", 3).timesteps
    plain = draw(target, 5, num_steps=3, block=8, **options)
    guidance = [none, elsewhere] if options["sampler"] in ("ddim", "ddpm") else [none]  # the others begin at 999
    assert torch.equal(draw(target, 5, num_steps=3, block=8, guidance=guidance, **options), plain)
    assert none.evaluations == elsewhere.evaluations == 0


def test_nothing_is_added_to_a_half_precision_output_where_there_is_nothing():
    # (bfloat16 - float32 zero) would be float32: untouched means the very tensor
    process = DiffusionProcess(clip_sample=False)
    seen = []

    class Half:
        prediction = "eps"

        def __call__(self, x_t, t, condition=None):
            return (x_t * 0.9).bfloat16()

    target = Target(Half(), process, (1, 8, 8))
    add_score = process.add_score

    def watched(output, score, *rest):
        found = add_score(output, score, *rest)
        seen.append((output.dtype, score.dtype, found.dtype))
        return found

    process.add_score = watched
    guidance = ClassifierGuidance(NetworkClassifier(), torch.zeros(4, dtype=torch.int64), 3.0)
    draw(target, 4, guidance=[lambda *at: None], num_steps=2)
    assert seen == []
    draw(target, 4, guidance=[guidance], num_steps=2)
    assert seen == 2 * [(torch.bfloat16, torch.float32, torch.float32)]
    # a term in half precision is no more than that, but the sum is not rounded once more
    draw(target, 4, guidance=[lambda x_t, t, addresses: x_t.bfloat16()], num_steps=1)
    assert seen[-1] == (torch.bfloat16, torch.float32, torch.float32)


def test_the_gradient_does_not_round_with_the_precision_around_it():
    classifier = NetworkClassifier()
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([100, 500]), torch.tensor([0, 1])
    exact = classifier_gradient(classifier, x_t, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier_gradient(classifier, x_t, t, labels), exact)
    half = classifier_gradient(classifier, x_t.bfloat16(), t, labels)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_is_the_same_in_every_loop_and_leaves_the_classifier_as_it_was(around):
    classifier = NetworkClassifier()
    module = classifier.module
    module.layers[0].eval()  # a part that a user froze
    module.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    x_t = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.full((8,), 300), torch.arange(8) % 3
    # by hand: in evaluation mode, with autograd over everything
    module_copy = NetworkClassifier().module.eval()
    x = x_t.clone().requires_grad_()
    nn.functional.cross_entropy(module_copy(x, t), labels, reduction="sum").backward()
    state = torch.get_rng_state()
    with around():
        inside = [x_t.clone(), t.clone(), labels.clone()]  # tensors of the loop itself
        found = classifier_gradient(classifier, *inside)
        term = ClassifierGuidance(classifier, labels, 2.0)(inside[0], inside[1], torch.arange(8))
    assert torch.equal(found, -x.grad)
    assert torch.equal(term, 2 * found)
    assert not inside[0].requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)  # dropout was off


def test_the_classifier_sees_training_timesteps_of_the_interval_only():
    classifier, target = NetworkClassifier(), network_target()
    guidance = ClassifierGuidance(classifier, torch.zeros(4, dtype=torch.int64), interval=(400, 600))
    draw(target, 4, num_steps=50, guidance=[guidance])
    timesteps = target.process.scheduler("ddim", 50).timesteps
    expected = list(range(580, 399, -20))  # 400 belongs to the interval, 600 does not
    assert [t.unique().tolist() for t in classifier.seen] == [[t] for t in expected]
    assert set(expected) < set(timesteps.tolist())
    assert guidance.evaluations_per_sample(timesteps) == 10
    assert guidance.evaluations == 4 * 10  # the twelve rows that pad the block are no samples


def test_the_interval_is_closed_below_and_open_above():
    guidance = ClassifierGuidance(NetworkClassifier(), torch.zeros(4, dtype=torch.int64), 2.0, interval=(400, 620))
    whole = ClassifierGuidance(NetworkClassifier(), torch.zeros(4, dtype=torch.int64), 2.0)
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 399, 620, 999):
        assert guidance(x_t, torch.full((4,), t), torch.arange(4)) is None
    for t in (400, 619):
        at = x_t, torch.full((4,), t), torch.arange(4)
        assert torch.equal(guidance(*at), whole(*at))
    mixed = torch.tensor([399, 400, 619, 620])
    found = guidance(x_t, mixed, torch.arange(4))
    assert found[[0, 3]].abs().max() == 0
    torch.testing.assert_close(found[1:3], whole(x_t, mixed, torch.arange(4))[1:3], rtol=1e-5, atol=1e-7)
    assert found[1:3].abs().amin() > 0
    assert guidance.evaluations == 4 + 4 + 2


@pytest.mark.parametrize(
    ("schedule", "weight"),
    [
        ("constant", lambda t, alpha_bar: 1.0),
        ("linear", lambda t, alpha_bar: t / 999),
        ("sqrt_one_minus_alpha_bar", lambda t, alpha_bar: math.sqrt((1 - alpha_bar[t]) / (1 - alpha_bar[999]))),
        ("sqrt_alpha_bar", lambda t, alpha_bar: math.sqrt(alpha_bar[t] / alpha_bar[0])),
    ],
)
def test_lambda_follows_its_schedule_and_reaches_the_scale(schedule, weight):
    # alpha_bar of the linear schedule from its betas
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float32)).astype(np.float64)
    classifier = NetworkClassifier()
    classifier.process = process = DiffusionProcess("linear")
    labels, at = torch.arange(4) % 3, torch.arange(4)
    guidance = ClassifierGuidance(classifier, labels, -3.0, schedule=schedule)
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for t in (0, 1, 500, 998, 999):
        times = torch.full((4,), t)
        gradient = classifier_gradient(classifier, x_t, times, labels)
        term = guidance(x_t, times, at)
        factor = weight(t, alpha_bar)
        torch.testing.assert_close(
            torch.zeros_like(x_t) if term is None else term, -3.0 * factor * gradient, rtol=1e-4, atol=0
        )
        found.append(factor)
    assert max(found) == 1.0
    assert guidance.scales.min() == -3.0
    assert len(guidance.scales) == process.num_timesteps
