import types

import pytest
import torch

from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.modules import DenoiserModule
from lightning_mem.modules.denoiser import loss_weight
from lightning_mem.networks import UNetConfig
from lightning_mem.randomness import generator

TINY = UNetConfig((8, 8), norm_num_groups=4, mid_attention=False)
EVERY_T = torch.arange(1000)


def snr(process):
    return process.alpha_bar / (1 - process.alpha_bar)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_plain_weighs_every_timestep_alike(prediction):
    assert torch.equal(loss_weight(DiffusionProcess(prediction=prediction), EVERY_T, "plain"), torch.ones(1000))


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_weighs_the_error_of_x0_by_the_clamped_ratio(gamma):
    # |eps error|^2 = SNR |x0 error|^2 and |v error|^2 = (SNR + 1) |x0 error|^2, so all three weigh x0 alike
    for prediction, per_x0 in (("x0", lambda s: 1), ("eps", lambda s: s), ("v", lambda s: s + 1)):
        process = DiffusionProcess("linear", prediction=prediction)
        on_x0 = loss_weight(process, EVERY_T, "min_snr", gamma).double() * per_x0(snr(process))
        torch.testing.assert_close(on_x0, snr(process).clamp(max=gamma), rtol=1e-6, atol=0)


def test_min_snr_with_a_large_gamma_is_the_plain_loss_of_eps():
    process = DiffusionProcess("linear", prediction="eps")
    torch.testing.assert_close(loss_weight(process, EVERY_T, "min_snr", 1e9), torch.ones(1000), rtol=1e-6, atol=0)
    low = snr(process) < 5
    assert 0 < low.sum() < 1000
    weight = loss_weight(process, EVERY_T, "min_snr", 5.0)
    torch.testing.assert_close(weight[low], torch.ones(int(low.sum())), rtol=1e-6, atol=0)
    assert (weight[~low] < 1).all()


def test_no_weight_is_undefined_at_zero_terminal_signal():
    for prediction in ("v", "x0"):
        process = DiffusionProcess("linear", prediction=prediction, zero_terminal_snr=True)
        weight = loss_weight(process, torch.tensor([0, 999]), "min_snr")
        assert weight[1] == 0  # the paper's own weight: nothing is asked where nothing is visible
        assert torch.isfinite(weight).all()


def module(loss="plain", prediction="eps", num_classes=None, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        process = DiffusionProcess(prediction=prediction)
        built = DenoiserModule(8, 1, num_classes, TINY, process, loss=loss, seed=seed)
    progress = types.SimpleNamespace(total_batch_idx=4)
    loop = types.SimpleNamespace(epoch_loop=progress)
    built._trainer = types.SimpleNamespace(world_size=1, global_rank=0, global_step=4, fit_loop=loop)
    # nobody reads the loss: neither a progress bar nor a logger
    built._trainer.progress_bar_callback = None
    built._trainer._logger_connector = types.SimpleNamespace(should_update_logs=False)
    built.log = lambda *_, **__: None
    return built


def images(n=5):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("loss", ["plain", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_training_loss_and_its_gradient_are_those_written_by_hand(loss, prediction):
    built = module(loss, prediction)
    x0 = images()
    given = built.training_step({"image": x0}, 0)
    given.backward()
    gradients = [p.grad.clone() for p in built.unet.parameters()]
    built.zero_grad()

    draw = generator(3, "train", 4)
    t = torch.randint(1000, (5,), generator=draw)
    eps = torch.randn(x0.shape, generator=draw)
    alpha_bar = built.process.alpha_bar[t].reshape(-1, 1, 1, 1)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]
    output = built.unet((signal * x0 + noise * eps).float(), t).sample
    error = ((output - target) ** 2).mean(dim=(1, 2, 3))
    ratio = (alpha_bar / (1 - alpha_bar)).flatten()
    clamped = torch.minimum(ratio, torch.tensor(5.0))
    weight = clamped / {"eps": ratio, "v": ratio + 1, "x0": 1}[prediction] if loss == "min_snr" else 1
    by_hand = (error * weight).mean()
    by_hand.backward()
    assert given.item() == pytest.approx(by_hand.item(), rel=1e-5)
    for theirs, parameter in zip(gradients, built.unet.parameters(), strict=True):
        torch.testing.assert_close(theirs, parameter.grad, rtol=1e-3, atol=1e-5)


def test_labels_reach_the_loss():
    built = module(num_classes=3)
    losses = [
        built.training_step({"image": images(), "label": torch.full((5,), label)}, 0).item() for label in (0, 1, 1)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]  # timesteps and noise are addressed by the step


def test_the_noise_of_a_step_depends_on_seed_and_step_only():
    built, other = module(), module(seed=4)
    here = built.training_step({"image": images()}, 0).item()
    torch.randn(7)
    assert built.training_step({"image": images()}, 9).item() == here
    assert other.training_step({"image": images()}, 0).item() != here
    built._trainer.fit_loop.epoch_loop.total_batch_idx = 5
    assert built.training_step({"image": images()}, 0).item() != here


def test_a_gamma_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"got -1\.0"):
        DenoiserModule(network=TINY, snr_gamma=-1.0)
