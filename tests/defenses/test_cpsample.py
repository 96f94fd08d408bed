"""CPSample against finite differences, logistic algebra and a planted target: its sign, scale, gate and certificate."""

import math

import numpy as np
import pytest
import torch
from labelled_mixture import BitClassifier, copied, patterns, planted
from oracles import finite_differences
from torch import Tensor, nn

from lightning_mem.defenses import CPSample, certainty_slope, confidence, final_confidence
from lightning_mem.defenses.confidence import check_tol
from lightning_mem.diffusion import ClassifierGuidance, DiffusionProcess, sample, sample_x0

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]


class LogitClassifier:
    """A classifier whose logit is the sum of the image times a slope, plus an offset; as smooth and sure as asked."""

    num_classes = 2
    digest = "logit"
    process = DiffusionProcess("linear")

    def __init__(self, slope: float = 1.0, offset: float = 0.0) -> None:
        self.slope, self.offset = slope, offset
        self.forward_rows: list[int] = []
        self.backward_rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.forward_rows.append(len(x_t))
        logit = self.slope * x_t.flatten(1).sum(1) + self.offset
        if logit.requires_grad:
            logit.register_hook(self._count)
        return torch.stack([torch.zeros_like(logit), logit], 1)

    def _count(self, gradient: Tensor) -> None:
        self.backward_rows.append(int(gradient.count_nonzero()))


def at_logits(logits: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """One-pixel images with these logits under slope 1, at t = 500 and addresses from 0."""
    x_t = torch.tensor(logits, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return x_t, torch.full((len(logits),), 500), torch.arange(len(logits))


# --- sign, scale, gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [20.0, -20.0, 0.3, -4.0])
@pytest.mark.parametrize("form", ["attract", "repel"])
def test_the_term_is_the_slope_of_the_log_probability_it_moves(form: str, logit: float) -> None:
    # a bent logit, so that its own slope matters too
    def of(x: Tensor) -> Tensor:
        return logit + torch.sin(x).flatten(1).sum(1)

    class Bent(LogitClassifier):
        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.stack([-of(x_t) / 2, of(x_t) / 2], 1)

    x_t = 0.1 * torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    term = CPSample(Bent(), 0.5, 7.0, form)(x_t, torch.tensor([3]), torch.tensor([0]))  # type: ignore[arg-type]
    assert term is not None
    sure = np.sign(float(of(x_t)))

    def moved(x: np.ndarray) -> float:
        own = sure * float(of(torch.from_numpy(x)))
        # up with log p of the other label, or down with log p of the guessed one, both as -log(1 + exp(.))
        return -np.logaddexp(0, own) if form == "attract" else np.log1p(np.exp(-own))

    slopes = finite_differences(moved, x_t.numpy(), 1e-4 if abs(logit) < 10 or form == "attract" else 1e-3)
    np.testing.assert_allclose(term.numpy(), 7 * slopes, rtol=1e-5, atol=1e-15)
    assert np.abs(slopes).max() > 1e-10


def test_the_forms_differ_by_the_odds_and_the_weak_one_does_not_round_to_nothing() -> None:
    x_t, t, _ = at_logits([0.5, 4.0, 30.0, -30.0])
    attract, logits = certainty_slope(LogitClassifier(), x_t.float(), t, "attract")
    repel, _ = certainty_slope(LogitClassifier(), x_t.float(), t, "repel")
    q = confidence(logits)
    torch.testing.assert_close(attract.flatten().double(), logits[:, 0].sign().double() * q, rtol=1e-6, atol=0)
    odds = (attract / repel).flatten().double()
    torch.testing.assert_close(odds, logits[:, 0].double().abs().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_correction_has_the_size_of_the_definition_in_every_parameterisation(prediction: str) -> None:
    _, target, classifier = planted(6, prediction)
    process = target.process
    x_t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([10, 50, 200, 600])
    term = CPSample(classifier, 0.5, 2.5)(x_t, t, torch.arange(4))
    d, _ = certainty_slope(classifier, x_t, t, "attract")
    output = target.denoiser(x_t, t)
    assert term is not None
    found = process.to_eps(process.add_score(output, term, x_t, t), x_t, t)
    root = (1 - process.alpha_bar[t]).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, process.to_eps(output, x_t, t) + 2.5 * root * d, rtol=0, atol=1e-9)
    # and the estimate of x0 moves by -s (1 - alpha_bar) / sqrt(alpha_bar) d
    signal = process.alpha_bar[t].sqrt().reshape(-1, 1, 1, 1)
    moved = process.to_x0(process.add_score(output, term, x_t, t), x_t, t) - process.to_x0(output, x_t, t)
    torch.testing.assert_close(moved, -2.5 * root**2 / signal * d, rtol=0, atol=1e-9)
    assert d.abs().amax((1, 2, 3)).max() > 1e-2


def test_the_gate_opens_above_one_minus_tol_and_not_at_it() -> None:
    edge = math.log(0.9 / 0.1)
    sides = [edge, math.nextafter(edge, 9), math.nextafter(edge, 0), -edge, -math.nextafter(edge, 9), 0.0, 40.0]
    x_t, t, addresses = at_logits(sides)
    term = CPSample(LogitClassifier(), 0.1)
    term.gate = edge  # log1p(-0.1) - log(0.1) is this up to the last bit
    found = term(x_t, t, addresses)
    assert found is not None
    assert (found.flatten() != 0).tolist() == [False, True, False, False, True, False, True]
    assert check_tol(0.1) == pytest.approx(edge, abs=1e-15)
    assert check_tol(0.5) == 0
    assert check_tol(1e-20) == pytest.approx(20 * math.log(10))  # where 1 - tol is 1
    always = CPSample(LogitClassifier(), 0.5)(x_t, t, addresses)
    assert always is not None
    assert (always.flatten() != 0).tolist() == [True] * 5 + [False, True]
    assert CPSample(LogitClassifier(), 1e-20)(x_t, t, addresses) is None


def test_one_forward_pass_and_a_backward_pass_through_gated_rows_only() -> None:
    classifier = LogitClassifier()
    term = CPSample(classifier, 0.1)
    x_t, t, addresses = at_logits([5.0] * 18 + [0.1] * 46)
    found = term(x_t, t, addresses)
    assert found is not None
    assert found[:18].abs().min() > 0.9
    assert found[18:].abs().max() == 0
    assert classifier.forward_rows == [64]
    assert classifier.backward_rows == [18]
    assert (term.evaluations, term.gradients) == (64, 18)
    assert term(*at_logits([0.1] * 64)) is None
    assert classifier.backward_rows == [18]  # nothing to go back for
    assert (term.evaluations, term.gradients) == (128, 18)


def test_several_labelings_must_all_be_sure_and_pull_in_turn() -> None:
    class Two(LogitClassifier):
        num_classes, num_labelings = 4, 2

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            one, other = x_t.flatten(1).unbind(1)
            return torch.stack([0 * one, one, 0 * one, -3 * other], 1)

    x_t = torch.tensor([[5.0, 2.0], [5.0, 0.1], [1.0, 9.0]]).reshape(3, 1, 1, 2)
    found = CPSample(Two(), 0.1)(x_t, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert found is not None
    assert found[1:].abs().max() == 0
    one, other = torch.tensor([5.0, 6.0]).sigmoid()
    torch.testing.assert_close(found[0].flatten(), torch.stack([-one, -3 * other]) / 2)


def test_outside_its_interval_it_asks_nothing() -> None:
    classifier = LogitClassifier()
    classifier.interval = (100, 500)  # type: ignore[attr-defined]
    term = CPSample(classifier)  # what it was trained on, where nothing else is said
    assert CPSample(classifier, interval=(0, 7)).interval == (0, 7)
    x_t, t, addresses = at_logits([5.0, 5.0])
    for at in (99, 500):
        assert term(x_t, torch.full_like(t, at), addresses) is None
    assert classifier.forward_rows == []
    for at in (100, 499):
        assert term(x_t, torch.full_like(t, at), addresses) is not None


# --- on a target that memorized ------------------------------------------------------------------------------------


def ratio(terms: list, count: int = 64, **options: object) -> float:
    members, target, _ = planted()
    images = sample(target, range(count), seed=0, num_steps=20, guidance=terms, **options)  # type: ignore[arg-type]
    return copied(images, members).double().mean().item()


@pytest.mark.parametrize("form", ["attract", "repel"])
def test_it_lowers_copies_and_certainty_and_the_wrong_sign_raises_both(form: str) -> None:
    members, target, classifier = planted()
    term = CPSample(classifier, 0.5, 1.0, form)  # type: ignore[arg-type]

    def wrong(x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        found = term(x_t, t, addresses)
        return None if found is None else -found

    base, right, reverse = ratio([]), ratio([term]), ratio([wrong])
    assert base > 0.3
    assert right < base / 2
    assert reverse > 1.5 * base
    q = [
        final_confidence(classifier, sample(target, range(32), seed=0, num_steps=20, guidance=terms)).mean()
        for terms in ([term], [], [wrong])
    ]
    assert q[0] < q[1] < q[2]
    assert final_confidence(classifier, members).min() > 0.99


@pytest.mark.parametrize("form", ["attract", "repel"])
def test_a_small_step_lowers_the_log_odds_of_the_training_label_and_the_wrong_sign_raises_them(form: str) -> None:
    members, target, classifier = planted()
    t = torch.full((len(members),), 80)
    noise = torch.randn(members.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = target.process.add_noise(members.double() / 127.5 - 1, noise, t)

    def log_odds(x: Tensor) -> Tensor:
        logits = classifier(x, t)
        return (logits[:, 1] - logits[:, 0]) * (2 * classifier.bits - 1)

    term = CPSample(classifier, 0.5, 1.0, form)(x_t, t, torch.arange(len(members)))  # type: ignore[arg-type]
    assert term is not None
    step = 1e-3 * term / term.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert (log_odds(x_t) > 0).all()  # it knows their labels
    assert (log_odds(x_t + step) < log_odds(x_t)).all()
    assert (log_odds(x_t - step) > log_odds(x_t)).all()


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_scale_zero_changes_no_bit_and_protection_works_with_every_sampler(options: dict) -> None:
    _, target, classifier = planted()
    plain = sample_x0(target, range(6), seed=0, num_steps=10, block=8, **options)
    none = CPSample(classifier, 0.5, 0.0)
    found = sample_x0(target, range(6), seed=0, num_steps=10, block=8, guidance=[none], **options)
    assert torch.equal(found, plain)
    assert none.evaluations == 0
    assert classifier.forward_rows == []
    assert ratio([CPSample(classifier, 0.5, 3.0)], **options) <= ratio([], **options) / 4


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_beside_guidance_both_terms_are_added(options: dict) -> None:
    _, target, classifier = planted()
    guidance = ClassifierGuidance(classifier, torch.arange(16) % 2, 2.0)
    protection = CPSample(classifier, 0.5, 1.5)

    def both(x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor:
        terms = [term(x_t, t, addresses) for term in (guidance, protection)]
        return torch.stack([term for term in terms if term is not None]).sum(0)

    options = {"seed": 0, "num_steps": 5, "block": 16, **options}
    found = sample_x0(target, range(16), guidance=[guidance, protection], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, sample_x0(target, range(16), guidance=[both], **options), rtol=0, atol=1e-3)  # type: ignore[arg-type]
    alone = sample_x0(target, range(16), guidance=[guidance], **options)  # type: ignore[arg-type]
    assert (found - alone).abs().max() > 0.1


def test_a_sample_does_not_depend_on_its_company() -> None:
    class Net(LogitClassifier):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 2))

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return 20 * self.module(x_t)

    _, target, _ = planted()
    term = CPSample(Net(), 0.01, 3.0)
    draw = {"seed": 0, "num_steps": 5, "guidance": [term]}
    whole = sample_x0(target, range(40), **draw)  # type: ignore[arg-type]
    assert 0 < term.gradients < term.evaluations
    assert torch.equal(sample_x0(target, [31, 7, 90], **draw)[:2], whole[[31, 7]])  # type: ignore[arg-type]


# --- certificate ---------------------------------------------------------------------------------------------------


def test_the_certificate_counts_by_hand() -> None:
    term = CPSample(LogitClassifier(), 0.1)
    for at, logits in ((900, [5.0, 0.1, 5.0, 5.0]), (500, [0.1, 0.1, 5.0, 5.0]), (100, [-5.0, 1.0, -3.0, -3.0])):
        x_t, t, _ = at_logits(logits)
        term(x_t, torch.full_like(t, at), torch.tensor([7, 3, 9, 9]))  # the last row pads the block
    found = term.certificates([9, 3, 7])
    assert found.addresses.tolist() == [9, 3, 7]
    torch.testing.assert_close(found.gate_rate, torch.tensor([1, 0, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(found.last_confidence, torch.tensor([3.0, 1.0, 5.0], dtype=torch.float64).sigmoid())
    assert found.nearest is None
    assert term.watch.gate_rates == {100: (2, 3), 500: (1, 3), 900: (2, 3)}
    assert (term.evaluations, term.gradients) == (9, 5)
    x_t, t, _ = at_logits([0.0])
    term(x_t, torch.full_like(t, 900), torch.tensor([7]))  # another draw of 7 begins
    assert term.certificates([7]).gate_rate.item() == 0
    with pytest.raises(ValueError, match=r"addresses \[4\] were not drawn under this protection"):
        term.certificates([7, 4])
    with pytest.raises(ValueError, match="a bank was given without images"):
        term.certificates([7], bank=patterns(2))


def test_the_certificate_of_a_finished_image_names_its_nearest_member() -> None:
    members, target, classifier = planted()
    term = CPSample(classifier, 0.5, 3.0)
    images = sample(target, range(8), seed=0, num_steps=5, guidance=[term])
    found = term.certificates(range(8), images, members)  # type: ignore[arg-type]
    distances = (images[:, None].double() - members[None].double()).div(255).square().mean((2, 3, 4)).sqrt()
    assert found.nearest is not None
    assert found.nearest_index is not None
    torch.testing.assert_close(found.nearest, distances.amin(1), rtol=0, atol=1e-7)
    assert torch.equal(found.nearest_index, distances.argmin(1))
    logits = classifier(images.double() / 127.5 - 1, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(found.final_confidence, logits.softmax(1).amax(1), rtol=0, atol=1e-5)
    assert list(found.rows()[0]) == [
        "addresses", "gate_rate", "last_confidence", "final_confidence", "nearest", "nearest_index"
    ]  # fmt: skip


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [0.0, -0.1, 0.51, 1.0, math.nan])
def test_a_tolerance_outside_is_refused(tol: float) -> None:
    with pytest.raises(ValueError, match=r"tol must lie in \(0, 0.5\], .* got"):
        CPSample(LogitClassifier(), tol)


def test_what_does_not_fit_is_refused() -> None:
    given = LogitClassifier()
    for scale in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"scale must be finite and at least 0 .* got {scale}"):
            CPSample(given, 0.5, scale)
    with pytest.raises(ValueError, match="form must be attract or repel, got 'push'"):
        CPSample(given, form="push")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"interval .* <= 1000, got \[5, 1001\)"):
        CPSample(given, interval=(5, 1001))
    with pytest.raises(ValueError, match="belongs to another noising process"):
        CPSample(given, process=DiffusionProcess("cosine"))
    three = LogitClassifier()
    three.num_classes = 3
    with pytest.raises(ValueError, match=r"1 binary labeling\(s\), got one of 3 classes"):
        CPSample(three)
    _, _, classifier = planted()
    assert isinstance(classifier, BitClassifier)
    with pytest.raises(ValueError, match=r"works on .* \(1, 4, 4\), but the denoiser on \(1, 8, 8\)"):
        CPSample(classifier)(torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([0]))

    class Wide(LogitClassifier):
        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.zeros(len(x_t), 3)

    with pytest.raises(ValueError, match=r"must return logits \[2, 2\], .* got \[2, 3\]"):
        CPSample(Wide(), 0.1)(*at_logits([1.0, 2.0]))
    given.digest = ""
    with pytest.raises(ValueError, match="the classifier has no digest"):
        CPSample(given).settings  # noqa: B018
