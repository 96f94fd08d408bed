"""Gradients of images against closed forms of a linear denoiser, and what they may not depend on."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from linear_denoiser import PROCESS, gradients_by_hand, images, noised, target_of
from torch import Tensor

from lightning_mem.attribution.gradients import OUTPUTS, ImageGradients, loss_output, spaced_timesteps
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator

WEIGHTS = torch.randn(4, 4, generator=generator(1, "weights"), dtype=torch.float64)


def test_timesteps_are_the_middles_of_equal_parts() -> None:
    assert spaced_timesteps(4, 100) == [12, 37, 62, 87]
    assert spaced_timesteps(100, 100) == list(range(100))
    assert spaced_timesteps(1, 1000) == [500]
    with pytest.raises(ValueError, match=r"num_timesteps must lie in \[1, 100\].*got 101"):
        spaced_timesteps(101, 100)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("output", ["loss", "squared_norm"])
def test_gradients_of_a_linear_denoiser_have_their_closed_form(output: str, unit: bool) -> None:
    pixels = images(3, 0)
    found = ImageGradients(target_of(WEIGHTS), OUTPUTS[output], 3, 2, unit, seed=5)(pixels)
    expected = gradients_by_hand(WEIGHTS, pixels, [16, 50, 83], output == "loss", unit, draws=2, seed=5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_predictions_of_velocity_are_asked_for_velocity_and_their_norm_is_that_of_the_noise() -> None:
    process = DiffusionProcess(num_timesteps=100, prediction="v")
    target = target_of(WEIGHTS)
    target.denoiser.prediction, target.process = "v", process
    pixels = images(2, 3)
    x_t, eps = (side[:, 0, 0] for side in noised(pixels, [50]))
    a, s = np.sqrt(float(process.alpha_bar[50])), np.sqrt(1 - float(process.alpha_bar[50]))
    x0, out = (x_t - s * eps) / a, x_t @ WEIGHTS.numpy().T
    loss = 2 / 4 * np.einsum("na,nb->nab", out - (a * eps - s * x0), x_t).reshape(2, 16)
    norm = 2 / 4 * a * np.einsum("na,nb->nab", s * x_t + a * out, x_t).reshape(2, 16)
    for name, expected in (("loss", loss), ("squared_norm", norm)):
        np.testing.assert_allclose(ImageGradients(target, OUTPUTS[name], 1)(pixels).numpy(), expected, rtol=1e-9)


def _unet() -> Target:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_unet(UNetConfig((4,), mid_attention=False, norm_num_groups=2, dropout=0.3), 4, 1).double()
    return Target(UNetDenoiser(network.train(), "eps"), PROCESS, (1, 4, 4), digest="unet")


@pytest.mark.parametrize("shared", [True, False])
def test_no_chunk_order_or_company_changes_a_gradient_and_dropout_is_off(shared: bool) -> None:
    target, pixels = _unet(), images(3, 2, side=4)
    options = {"num_timesteps": 2, "num_draws": 2, "shared_noise": shared}
    whole = ImageGradients(target, **options)(pixels)
    assert target.denoiser.module.training
    scale = float(whole.abs().max())
    for calls, rows in ((3, [2, 1, 0]), (128, [2])):
        found = ImageGradients(target, **options, calls_at_once=calls)(pixels[rows])
        torch.testing.assert_close(found, whole[rows], rtol=1e-9, atol=1e-12 * scale)


def test_noise_is_one_for_all_images_or_goes_with_the_image_and_never_with_its_place() -> None:
    """Equal images get equal gradients either way; with noise of their own two images see different noise."""
    seen: list[Tensor] = []

    def watch(out: Tensor, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
        # the gradient of <out, eps> in W is eps x_t^T: linear in what was shown
        return (out * eps).flatten(1).sum(1)

    pixels = images(2, 4)[[0, 1, 0]]
    for shared in (True, False):
        found = ImageGradients(target_of(WEIGHTS), watch, 1, shared_noise=shared)(pixels).reshape(3, 4, 4)
        assert torch.equal(found[0], found[2])
        noise = [np.linalg.svd(part.numpy())[0][:, 0] for part in found]  # eps up to scale and sign
        seen.append(torch.tensor(abs(noise[0] @ noise[1])))
    assert seen[0] == pytest.approx(1, abs=1e-9)
    assert seen[1] < 0.99


def test_where_training_flips_a_gradient_is_the_mean_of_both_orientations() -> None:
    gradients = ImageGradients(target_of(WEIGHTS), num_timesteps=2)
    pixels = images(3, 5)
    expected = (gradients(pixels) + gradients(pixels.flip(-1))) / 2
    torch.testing.assert_close(gradients(pixels, mirror=True), expected)
    assert not torch.allclose(expected, gradients(pixels))


def test_a_class_conditional_target_is_asked_under_each_images_own_label() -> None:
    target = target_of(torch.stack([WEIGHTS, -WEIGHTS, WEIGHTS.T]))
    pixels, labels = images(2, 6), torch.tensor([2, 0])
    found = ImageGradients(target, num_timesteps=2)(pixels, labels).reshape(2, 3, 16)
    for row, label in enumerate(labels.tolist()):
        own = gradients_by_hand(target.denoiser.weight[label].detach(), pixels[row : row + 1], [25, 75], True, False)
        np.testing.assert_allclose(found[row, label].numpy(), own[0], rtol=1e-9)
        assert not found[row, [c for c in range(3) if c != label]].any()
    with pytest.raises(ValueError, match="conditioned on 3 classes: its gradients need the images' labels"):
        ImageGradients(target, num_timesteps=2)(pixels)


def test_what_has_no_gradients_is_refused() -> None:
    closed = EmpiricalDenoiser(images(3, 0), PROCESS).target()
    linear = target_of(WEIGHTS)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("a closed form has no parameters", lambda: ImageGradients(closed)),
        ("num_draws must be at least 1, got 0", lambda: ImageGradients(linear, loss_output, num_draws=0)),
        ("calls_at_once must be at least 1, got 0", lambda: ImageGradients(linear, calls_at_once=0)),
        (r"num_timesteps must lie in \[1, 100\]", lambda: ImageGradients(linear, num_timesteps=0)),
    ]
    for message, make in wrong:
        with pytest.raises(ValueError, match=message):
            make()
