"""Guidance by exact scores and classifiers: the conditional law, its share of a class, and clipping."""

import math

import pytest
import torch
from guiding import PREDICTIONS, VARIANTS, NetworkClassifier, draw, network_target, pair, variant_name
from oracles import MixtureClassifier

from lightning_mem.diffusion import (
    ClassifierGuidance,
    DiffusionProcess,
    sample_x0,
)
from lightning_mem.diffusion.sampling import initial_noise
from lightning_mem.randomness import generator


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_exact_score_and_exact_classifier_give_the_conditional_law(options, prediction):
    # score + grad log p(c | x_t) is the score of class c, so every path of it is found, not only its law
    both, alone = pair(prediction)
    guidance = ClassifierGuidance(MixtureClassifier(both, torch.arange(2)), torch.arange(16) % 2)
    guided = draw(both, num_steps=10, guidance=[guidance], **options)
    for label in (0, 1):
        truth = draw(alone[label], num_steps=10, **options)
        # scores are float32; at alpha_bar = 4e-5 the image is the score times 160
        torch.testing.assert_close(guided[label::2], truth[label::2], rtol=0, atol=1e-3)
    assert (draw(both, num_steps=10, **options) - guided).abs().max() > 0.5  # which the model alone does not do


def test_the_conditional_law_shows_a_wrong_sign_scale_and_time_index():
    both, alone = pair()
    truth = draw(alone[1])

    def error(term):
        return (draw(both, guidance=[term]) - truth).abs().max().item()

    right = ClassifierGuidance(MixtureClassifier(both, torch.arange(2)), torch.ones(16, dtype=torch.int64))

    def on_eps(x_t, t, addresses):  # lambda times the gradient subtracted from eps, without sqrt(1 - alpha_bar)
        return right(x_t, t, addresses) / (1 - both.process.alpha_bar_at(t, x_t)).sqrt()

    def on_x0(x_t, t, addresses):  # ... added to x0 as it is
        alpha_bar = both.process.alpha_bar_at(t, x_t)
        return right(x_t, t, addresses) * alpha_bar.sqrt() / (1 - alpha_bar)

    wrong = [on_eps, on_x0, lambda *at: -right(*at), lambda *at: 1.2 * right(*at)]
    for shift in (50, -50):  # one step of twenty
        late = MixtureClassifier(both, torch.arange(2), shift)
        wrong.append(ClassifierGuidance(late, right.labels))
    assert error(right) < 1e-3
    for term in wrong:
        assert error(term) > 0.02


def test_the_share_of_the_asked_class_rises_with_lambda_and_falls_with_the_wrong_sign():
    both, _ = pair(share=0.3)
    classifier = MixtureClassifier(both, torch.arange(2))
    shares = []
    for scale in (-1.0, 0.0, 1.0):
        guidance = ClassifierGuidance(classifier, torch.ones(256, dtype=torch.int64), scale)
        drawn = draw(both, 256, guidance=[guidance], block=256)
        shares.append((drawn[:, 0, 1, 1] > 0.15).double().mean().item())
    # four standard errors of 256 draws around 0.3
    assert shares[1] == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 256))
    assert shares[0] < 0.05
    assert shares[2] > 0.95


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_guided_ddim_clips_as_diffusers_does_with_use_clipped_model_output(prediction, eta):
    both, _ = pair(prediction)
    both.process = process = DiffusionProcess("linear", prediction=prediction)
    guidance = ClassifierGuidance(MixtureClassifier(both, torch.arange(2)), torch.arange(16) % 2, 4.0)
    found = draw(both, num_steps=10, guidance=[guidance], eta=eta)
    scheduler = process.scheduler("ddim", 10)
    generators = [generator(0, "sample", i) for i in range(16)]
    x = initial_noise((1, 2, 2), generators)
    clipped = 0
    for timestep in scheduler.timesteps:
        t = torch.full((16,), int(timestep))
        output = process.add_score(both(x, t), guidance(x, t, torch.arange(16)), x, t)
        clipped += int((process.to_x0(output, x, t).abs() > 1).sum())
        options = {"eta": eta, "use_clipped_model_output": True, "generator": generators}
        x = scheduler.step(output, timestep, x, **options).prev_sample
    assert clipped > 100
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)


def test_strong_guidance_does_not_turn_round_where_x0_is_clipped():
    # with the eps of the unclipped x0, a large lambda draws every sample away from its class
    both, _ = pair()
    both.process = DiffusionProcess("linear")
    labels = torch.arange(64) % 2
    for scale in (1.0, 3.0, 10.0):
        guidance = ClassifierGuidance(MixtureClassifier(both, torch.arange(2)), labels, scale)
        right = (draw(both, 64, guidance=[guidance], block=64)[:, 0, 1, 1] > 0.15).long() == labels
        assert right.double().mean() > 0.9, scale


def test_samples_without_a_term_do_not_notice_guided_ones_beside_them():
    target, labels = network_target(), torch.arange(16) % 3
    guidance = ClassifierGuidance(NetworkClassifier(), labels, 50.0)

    def half(x_t, t, addresses):  # as a protection that acts on some rows only
        return guidance(x_t, t, addresses) * (addresses % 2 == 0).reshape(-1, 1, 1, 1)

    plain, whole, found = (draw(target, num_steps=4, guidance=terms) for terms in ([], [guidance], [half]))
    assert torch.equal(found[1::2], plain[1::2])
    assert torch.equal(found[::2], whole[::2])
    assert not torch.equal(found[::2], plain[::2])


def test_every_sample_is_drawn_towards_its_own_class_in_any_order():
    target, addresses = network_target(), torch.tensor([7, 3, 40, 12])
    labels = torch.tensor([2, 0, 1, 2])
    guidance = ClassifierGuidance(NetworkClassifier(), labels, 50.0, addresses=addresses)
    options = {"seed": 0, "num_steps": 4, "block": 16}
    mixed = sample_x0(target, addresses, guidance=[guidance], **options)
    assert torch.equal(sample_x0(target, [40, 7], guidance=[guidance], **options), mixed[[2, 0]])
    for label in range(3):
        alone = ClassifierGuidance(NetworkClassifier(), torch.full((41,), label), 50.0)
        same = sample_x0(target, addresses, guidance=[alone], **options)
        assert torch.equal(mixed[labels == label], same[labels == label])
        assert not torch.equal(mixed[labels != label], same[labels != label])
