import json
import math
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from oracles import MixtureClassifier, MixtureDenoiser, finite_differences
from torch import nn

from lightning_mem.callbacks.drawing import Blocks, Drawer
from lightning_mem.diffusion import (
    ClassifierGuidance,
    DiffusionProcess,
    Target,
    classifier_gradient,
    guidance_settings,
    sample,
    sample_x0,
)
from lightning_mem.diffusion.sampling import initial_noise
from lightning_mem.evaluation import draw_samples
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator
from lightning_mem.types import SampleSet

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]
PREDICTIONS = ["eps", "v", "x0"]


def variant_name(options):
    return "-".join(str(value) for value in options.values())


class Network(nn.Module):
    """A time-conditional classifier with everything that must stand still: batch statistics, dropout, weights."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        self.time = nn.Embedding(1000, 4)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(4 * 64 + 4, num_classes)

    def forward(self, x_t, t):
        return self.head(torch.cat([self.layers(x_t), self.time(t)], 1))


class NetworkClassifier:
    """A network as a classifier with an identity and a process."""

    digest = "network"

    def __init__(self, num_classes=3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.module = Network(num_classes)
        self.num_classes = num_classes
        self.process = DiffusionProcess()
        self.seen = []

    def __call__(self, x_t, t):
        self.seen.append(t.clone())
        return self.module(x_t, t)


class Untouchable:
    """A classifier that must not be asked."""

    num_classes = 3
    process = DiffusionProcess()
    digest = "untouchable"

    def __call__(self, x_t, t):
        raise AssertionError(f"asked at t = {t.tolist()}")


def network_target(prediction="eps"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(UNetConfig((8, 8), norm_num_groups=4), image_size=8, channels=1).eval()
    return Target(UNetDenoiser(unet, prediction), DiffusionProcess(prediction=prediction), (1, 8, 8), digest="unet")


def pair(prediction="eps", schedule="linear", share=0.5):
    """A mixture of a left and a right Gaussian, and each of them alone."""
    process = DiffusionProcess(schedule, prediction=prediction, clip_sample=False)
    means = torch.stack([torch.full((1, 2, 2), -0.6), torch.full((1, 2, 2), 0.6)])
    means[1, 0, 0, 0] = -0.2
    scales, weights = torch.tensor([0.3, 0.15]), torch.tensor([1 - share, share])
    both = MixtureDenoiser(means, scales, process, weights)
    alone = [MixtureDenoiser(means[c : c + 1], scales[c : c + 1], process) for c in range(2)]
    return both, alone


def draw(target, count=16, **options):
    return sample_x0(target, range(count), **{"seed": 0, "num_steps": 20, "block": 16, **options})


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


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_drawer_guides_inside_the_predict_loop(inference_mode, tmp_path):
    target, classifier = network_target(), NetworkClassifier()
    before = {name: value.clone() for name, value in classifier.module.state_dict().items()}
    guidance = ClassifierGuidance(classifier, torch.arange(70) % 3, 50.0, interval=(300, 1000))
    settings = {
        "sampler": "ddim", "num_steps": 4, "eta": 0.0, "block": 64, "sample_seed": 5, "target": target.digest,
    }  # fmt: skip
    drawer = Drawer(target, settings, [guidance])
    # registered: the strategy moves it with the denoiser's network
    assert {id(p) for p in classifier.module.parameters()} <= {id(p) for p in drawer.parameters()}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=inference_mode,
    )  # fmt: skip
    drawn = trainer.predict(drawer, dataloaders=Blocks(tmp_path / "blocks", 0, 70, drawer.settings))
    plain = draw_samples(target, 70, seed=5, num_steps=4)
    direct = draw_samples(target, 70, seed=5, num_steps=4, guidance=[guidance])
    images = torch.cat([part.images for part in drawn])
    assert torch.equal(images, direct.images)
    assert not torch.equal(images, plain.images)
    assert all(torch.equal(value, before[name]) for name, value in classifier.module.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.module.parameters())
    own = guidance_settings([guidance])
    assert own == {**guidance.settings, "guidance_clip": "x0 and eps"}
    assert drawer.settings == drawn[0].settings == {**settings, **own}
    assert direct.settings == {**plain.settings, **own}


def test_settings_tell_guidances_apart_and_survive_the_disk(tmp_path):
    labels = torch.arange(6) % 3
    classifier, other = NetworkClassifier(), NetworkClassifier()
    other.digest = "other"
    guidances = [
        ClassifierGuidance(classifier, labels),
        ClassifierGuidance(other, labels),
        ClassifierGuidance(classifier, labels.flip(0)),
        ClassifierGuidance(classifier, labels, addresses=torch.arange(1, 7)),
        ClassifierGuidance(classifier, labels, 2.0),
        ClassifierGuidance(classifier, labels, interval=(0, 999)),
        ClassifierGuidance(classifier, labels, schedule="linear"),
    ]
    settings = [guidance_settings([guidance]) for guidance in guidances]
    assert len({json.dumps(entry, sort_keys=True) for entry in settings}) == 7
    order = torch.tensor([4, 1, 0, 3, 2, 5])  # the same labels in another order are the same guidance
    assert ClassifierGuidance(classifier, labels[order], addresses=order).settings == guidances[0].settings
    both = guidance_settings(guidances[:2])
    assert both["guidance_classifier"] == "network"
    assert both["guidance_classifier_2"] == "other"
    assert guidance_settings([]) == {}
    found = draw_samples(network_target(), 6, num_steps=2, guidance=guidances[:2])
    found.save(tmp_path / "guided.npz")
    assert SampleSet.load(tmp_path / "guided.npz").settings == found.settings
    assert both.items() <= found.settings.items()


def test_terms_that_cannot_be_told_apart_are_refused_where_samples_are_kept():
    nameless = NetworkClassifier()
    nameless.digest = ""
    with pytest.raises(ValueError, match="no digest"):
        draw_samples(
            network_target(), 2, num_steps=2, guidance=[ClassifierGuidance(nameless, torch.zeros(2, dtype=torch.int64))]
        )
    with pytest.raises(ValueError, match="needs a mapping `settings`"):
        draw_samples(network_target(), 2, num_steps=2, guidance=[lambda x_t, t, addresses: None])


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "labels must lie in [0, 3), got 0 to 3"),
        ({"labels": torch.tensor([0, -1])}, "labels must lie in [0, 3), got -1 to 0"),
        ({"labels": torch.tensor([0.0, 1.0])}, "integers [N], got torch.float32 (2,)"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "integers [N], got torch.int64 (2, 3)"),
        ({"addresses": torch.arange(3)}, "one entry per label (4), got (3,)"),
        ({"addresses": torch.tensor([0, 1, 1, 2])}, "an address occurs twice"),
        ({"interval": (500, 500)}, "0 <= low < high <= 1000, got [500, 500)"),
        ({"interval": (600, 500)}, "got [600, 500)"),
        ({"interval": (-1, 500)}, "got [-1, 500)"),
        ({"interval": (500, 1001)}, "got [500, 1001)"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"schedule": "cosine"}, "got 'cosine'"),
        ({"process": DiffusionProcess("linear")}, "another noising process"),
        ({"process": DiffusionProcess(num_timesteps=500)}, "another noising process (1000 timesteps"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassifierGuidance(NetworkClassifier(), **{"labels": LABELS, **options})


def test_a_sample_without_a_label_is_refused():
    guidance = ClassifierGuidance(NetworkClassifier(), LABELS, addresses=torch.tensor([2, 4, 6, 8]))
    with pytest.raises(ValueError, match=re.escape("no label for the addresses [3, 9]; it has 4 addresses (2 to 8)")):
        sample(network_target(), [2, 3, 9], seed=0, num_steps=2, guidance=[guidance])
    empty = ClassifierGuidance(NetworkClassifier(), LABELS[:0])
    with pytest.raises(ValueError, match=re.escape("no label for the addresses [0]; it has 0 addresses (none)")):
        sample(network_target(), [0], seed=0, num_steps=2, guidance=[empty])


def test_classifiers_that_cannot_guide_are_refused():
    class Plain:
        num_classes = 3

        def __call__(self, x_t, t):
            return x_t.flatten(1)[:, :2]

    class Blind(Plain):
        num_classes = 2

        @torch.no_grad()
        def __call__(self, x_t, t):
            return super().__call__(x_t, t) * 2

    with pytest.raises(ValueError, match="pass process="):
        ClassifierGuidance(Plain(), LABELS)
    at = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    with pytest.raises(ValueError, match=re.escape("must return logits [4, 3], got [4, 2]")):
        ClassifierGuidance(Plain(), LABELS, process=DiffusionProcess())(*at)
    with pytest.raises(ValueError, match="carry no gradient to x_t"):
        ClassifierGuidance(Blind(), LABELS % 2, process=DiffusionProcess())(*at)
