"""SecMI, PIA and the gradient norm by hand in float64, and what is told of a small trained network."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from oracles import planted_mixture
from torch import Tensor, nn
from victim import patterns, scene_of

from lightning_mem.attacks import PIA, AbstractAttack, GradientNorm, SecMI, SecMINetwork, secmi_network
from lightning_mem.attacks.pia import unit_scale
from lightning_mem.attacks.query import Query
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Workers
from lightning_mem.metrics import Roc, roc
from lightning_mem.networks import ClassifierConfig
from lightning_mem.randomness import generator

IMAGES = patterns(3, 9)


def planted(prediction: str = "eps") -> Target:
    return planted_mixture(patterns(8), DiffusionProcess("linear", prediction=prediction), wide=1.0)  # type: ignore[arg-type]


def noise(target: Target, x: np.ndarray, t: int) -> np.ndarray:
    """The exact eps of the mixture, by its score."""
    score = target.denoiser.score(torch.from_numpy(x), torch.full((len(x),), t))  # type: ignore[attr-defined]
    found: np.ndarray = -math.sqrt(1 - float(target.process.alpha_bar[t])) * score.numpy()
    return found


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pia_is_the_distance_of_two_predictions(prediction: str, normalize: bool) -> None:
    target, x0 = planted(prediction), IMAGES.double().numpy() / 127.5 - 1
    eps = noise(target, x0, 0)
    if normalize:
        eps = eps * math.sqrt(2 / math.pi) / np.abs(eps).mean((1, 2, 3), keepdims=True)
    expected = []
    for t in (50, 200):
        alpha_bar = float(target.process.alpha_bar[t])
        again = noise(target, math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps, t)
        expected.append((np.abs(eps - again) ** 4).sum((1, 2, 3)) ** 0.25)  # which ranks as without the root
    attack = PIA(normalize, timesteps=[50, 200])
    found = attack.side_errors(target, IMAGES, {"none": ()}, "members", Workers())["none"]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=2e-3)


def test_pian_leaves_standard_normal_noise_as_it_is_and_the_papers_scale_would_not() -> None:
    eps = 3 * torch.randn(2, 1, 300, 300, generator=torch.Generator().manual_seed(0))
    scaled = unit_scale(eps)
    assert scaled.std() == pytest.approx(1, abs=0.01)
    papers = eps * eps[0].numel() * math.sqrt(math.pi / 2) / eps.abs().flatten(1).sum(1)[:, None, None, None]
    assert float(papers.std() / scaled.std()) == pytest.approx(math.pi / 2, abs=1e-4)


def test_secmi_goes_there_and_back_by_ddim_and_reads_the_error_at_t() -> None:
    target, x = planted(), IMAGES.double().numpy() / 127.5 - 1
    alpha_bar = target.process.alpha_bar.numpy()

    def step(x: np.ndarray, t: int, s: int) -> np.ndarray:
        eps = noise(target, x, t)
        x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
        return math.sqrt(alpha_bar[s]) * x0 + math.sqrt(1 - alpha_bar[s]) * eps

    expected = {}
    for t in range(0, 300, 20):
        if t in (180, 280):
            expected[t] = ((step(step(x, t, t + 20), t + 20, t) - x) ** 2).sum((1, 2, 3))
        x = step(x, t, t + 20)
    attack = SecMI(20, timesteps=[180, 280])
    found = attack.side_errors(target, IMAGES, {"none": ()}, "members", Workers())["none"]
    np.testing.assert_allclose(found, np.stack(list(expected.values()), 1), rtol=2e-2)
    assert SecMI(10).steps(100) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]  # the release stops at 90
    assert SecMI(10).reach([100]) == 110


def test_numbers_of_a_command_line_stay_what_they_are() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AbstractAttack, "attack")
    given = ["--attack", "lightning_mem.attacks.SecMI", "--attack.stride", "5", "--attack.timesteps", "[90]"]
    saved = parser.dump(parser.parse_args(given))
    for parsed in (parser.parse_args(given), parser.parse_string(saved)):
        attack = parser.instantiate(parsed).attack
        assert (attack.stride, attack.timesteps, attack.steps(10)) == (5, [90], [0, 5, 10])


class Constant:
    """Predicts the same noise everywhere: inversion and denoising undo each other."""

    prediction = "eps"

    def __call__(self, x_t: Tensor, t: Tensor, condition: None = None) -> Tensor:
        return torch.full_like(x_t, 0.3)


def test_secmi_finds_no_error_where_inversion_is_exact() -> None:
    target = Target(Constant(), DiffusionProcess("linear"), (1, 8, 8))
    found = SecMI(timesteps=[100, 300]).side_errors(target, IMAGES, {"none": ()}, "x", Workers())["none"]
    assert float(found.max()) < 64 * (10 * 1.2e-7) ** 2


class Perceptron(nn.Module):
    """A denoiser of 8 x 8 images that overfits in a moment."""

    prediction = "eps"

    def __init__(self, images: Tensor, process: DiffusionProcess, steps: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 64))
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        for _ in range(steps):
            rows = torch.randint(len(images), (64,), generator=draw)
            t = torch.randint(50, 250, (64,), generator=draw)
            eps = torch.randn(64, 1, 8, 8, generator=draw)
            x_t = process.add_noise(images[rows] / 127.5 - 1, eps, t)
            optimizer.zero_grad()
            (self(x_t, t) - eps).square().mean().backward()
            optimizer.step()

    def forward(self, x_t: Tensor, t: Tensor, condition: None = None) -> Tensor:
        flat = torch.cat([x_t.flatten(1), t[:, None] / 1000], 1)
        return self.layers(flat).reshape(x_t.shape)


@pytest.fixture(scope="module")
def trained() -> tuple[Target, Tensor, Tensor]:
    """A network trained on 40 of 90 random images, as a target, and both sides."""
    members, heldout = patterns(40, 3), patterns(50, 4)
    process = DiffusionProcess("linear")
    return Target(Perceptron(members, process, 200), process, (1, 8, 8)), members, heldout


def test_the_gradient_norm_is_that_of_one_backward_pass_an_image(trained: tuple[Target, Tensor, Tensor]) -> None:
    target, members, _ = trained
    attack = GradientNorm(num_draws=2, images_at_once=5, timesteps=[100, 200], noise_seed=7)
    found = attack.side_errors(target, members[:3], {"none": ()}, "members", Workers())["none"]
    network = target.denoiser
    assert isinstance(network, Perceptron)
    for row in range(3):
        for place, t in enumerate((100, 200)):
            network.zero_grad()
            alpha_bar = float(target.process.alpha_bar[t])
            for number in range(2):
                eps = torch.randn(1, 8, 8, generator=generator(7, "loss", "members", row, t, number))
                x_t = alpha_bar**0.5 * (members[row] / 127.5 - 1) + (1 - alpha_bar) ** 0.5 * eps
                ((network(x_t[None], torch.tensor([t]))[0] - eps).square().mean() / 2).backward()
            square = sum(float(p.grad.double().square().sum()) for p in network.parameters() if p.grad is not None)
            assert float(found[row, place]) == pytest.approx(math.sqrt(square), rel=1e-4)
    network.zero_grad()


def test_the_gradient_norm_tells_the_members_of_a_trained_network(trained: tuple[Target, Tensor, Tensor]) -> None:
    target, members, heldout = trained
    attack = GradientNorm(noise_seed=0)
    own, other = attack.scores(target, (members, heldout), {"none": ()}, Workers())["none"]
    assert roc(own[:, 0], other[:, 0]).auc > 0.99
    # a coin that named some of the images it never saw members is not told
    coin, tail = attack.scores(target, (patterns(40, 6), heldout), {"none": ()}, Workers())["none"]
    assert abs(roc(coin[:, 0], tail[:, 0]).auc - 0.5) < 3 * math.sqrt((40 + 50 + 1) / (12 * 40 * 50))
    closed = EmpiricalDenoiser(members, target.process).target()
    with pytest.raises(ValueError, match="a closed form has no parameters"):
        attack.side_errors(closed, members, {"none": ()}, "members", Workers())


class Dealt(Workers):
    """Blocks of 16, in order or as two processes might take them: the last first, and one of them twice."""

    turned = False

    def in_blocks(
        self, count: int, compute: Callable[[Tensor], Tensor], block: int = 16, label: str | None = None
    ) -> Tensor:
        blocks = torch.arange(-(-count // 16) * 16).clamp(max=count - 1).split(16)
        if self.turned:
            compute(blocks[0])
        order = range(len(blocks))[:: -1 if self.turned else 1]
        found = {place: compute(blocks[place]) for place in order}
        return torch.cat([found[place] for place in range(len(blocks))])[:count]


class Turned(Dealt):
    turned = True


def test_secmis_network_learns_from_some_images_and_is_told_on_others(trained: tuple[Target, Tensor, Tensor]) -> None:
    target, members, heldout = trained
    small = ClassifierConfig(widths=(8,), blocks=(2,))
    options = {"share": 0.4, "epochs": 6, "learning_rate": 0.05, "batch_size": 16, "network": small}
    attack = SecMINetwork(**options, timesteps=[100], noise_seed=0)  # type: ignore[arg-type]
    scene = scene_of(target, members, heldout)
    told = attack.tell(target, (members, heldout), Dealt())
    for side, count, name in zip(told.scores["none"], (40, 50), ("members", "heldout"), strict=True):
        train, choose = attack.learned_rows(count, name)
        assert (len(train), len(choose)) == (12, 4) if count == 40 else (15, 5)
        assert sorted([*train.tolist(), *choose.tolist()]) == side[:, 0].isnan().nonzero().flatten().tolist()
    own, other = told.tested("none")
    assert (len(own), len(other)) == (24, 30)
    assert roc(own[:, 0], other[:, 0]).auc > 0.9
    again = attack.tell(target, (members, heldout), Turned()).tested("none")
    assert torch.equal(again[0], own)  # no draw from the global generator, none that goes on from block to block
    record = next(r for r in attack.run(scene) if r.name.endswith("/auc"))
    assert record.definition["num_members"] == 24
    with pytest.raises(ValueError, match="at least 20 images of either side, got 40 members and 19"):
        attack.tell(target, (members, heldout[:19]), Workers())
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\)"):
        SecMINetwork(share=1)


def test_the_epoch_that_tells_the_choosing_images_best_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    train, choose = ([torch.rand(n, 1, 8, 8, generator=draw) * size for size in (0.9, 1.0)] for n in (12, 40))
    seen: list[float] = []

    def noted(own: Tensor, other: Tensor) -> Roc:
        found = roc(own, other)
        seen.append(found.auc)
        return found

    monkeypatch.setattr(secmi_network, "roc", noted)
    attack = SecMINetwork(
        epochs=8, learning_rate=0.5, batch_size=6, network=ClassifierConfig(widths=(8,), blocks=(2,)), noise_seed=0
    )
    kept = attack._fit(train, choose, "none", 100)
    assert len(seen) == 8
    assert seen[-1] < max(seen)
    assert roc(*(secmi_network._logits(kept, side) for side in choose)).auc == max(seen)


def test_a_protected_denoiser_is_asked_with_its_protection() -> None:
    target = planted()

    class Away:
        """A score term at one address."""

        def __init__(self) -> None:
            self.settings = {"protection": "away"}

        def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
            return 2 * x_t if int(addresses[0]) == 5 else None

    x_t = torch.ones(2, 1, 8, 8)
    plain, own = Query(target), Query(target, [Away()])
    alpha_bar = float(target.process.alpha_bar[300])
    pushed = plain(x_t, 300, torch.tensor([5, 6])) - math.sqrt(1 - alpha_bar) * 2 * x_t
    torch.testing.assert_close(own(x_t, 300, torch.tensor([5, 6])), pushed)
    assert torch.equal(own(x_t, 300, torch.tensor([6, 5])), plain(x_t, 300, torch.tensor([6, 5])))
