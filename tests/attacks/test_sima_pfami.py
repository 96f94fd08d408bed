"""SimA by the exact score, PFAMI by losses of zoomed images at the same noise, and the zoom pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from torch import Tensor
from victim import patterns

from lightning_mem.attacks import PFAMI, SimA, reconstruction_losses
from lightning_mem.attacks.pfami import zoom
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.evaluation import Workers

IMAGES = patterns(3, 9)


def planted(prediction: str = "eps") -> Target:
    return planted_mixture(patterns(8), DiffusionProcess("linear", prediction=prediction), wide=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("power", [4.0, 2.0])
def test_sima_is_the_norm_of_the_noise_seen_in_the_image_as_it_is(prediction: str, power: float) -> None:
    target, x = planted(prediction), IMAGES.double() / 127.5 - 1
    expected = []
    for t in (50, 200):
        score = target.denoiser.score(x, torch.full((3,), t)).numpy()  # type: ignore[attr-defined]
        eps = math.sqrt(1 - float(target.process.alpha_bar[t])) * np.abs(score)
        expected.append((eps**power).sum((1, 2, 3)) ** (1 / power))
    attack = SimA(power, timesteps=[50, 200])
    found = attack.side_errors(target, IMAGES, {"none": ()}, "members", Workers())["none"]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=2e-3)


@pytest.mark.parametrize("share", [0.95, 0.7, 0.31])
def test_a_zoom_is_the_middle_of_an_image_drawn_larger(share: float) -> None:
    images = torch.randint(0, 256, (2, 3, 9, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def larger(line: np.ndarray) -> np.ndarray:
        centers = (np.arange(len(line)) + 0.5) / len(line)
        return np.interp(0.5 + share * (centers - 0.5), centers, line)

    expected = np.apply_along_axis(larger, 3, np.apply_along_axis(larger, 2, images.double().numpy()))
    assert np.abs(zoom(images, share).numpy() - expected).max() < 0.51
    assert torch.equal(zoom(images, 1.0), images)


def test_pfami_is_the_loss_less_that_of_zoomed_images_at_the_same_noise_averaged_up_to_its_timestep() -> None:
    target = planted()

    def losses(images: Tensor) -> Tensor:
        asked = [20, 60, 100]
        return reconstruction_losses(target, images, asked, {"none": ()}, seed=4, name="x", num_draws=2)["none"]

    differences = losses(IMAGES) - (losses(zoom(IMAGES, 0.9)) + losses(zoom(IMAGES, 0.6))) / 2
    attack = PFAMI([0.9, 0.6], 40, 2, timesteps=[60, 100], noise_seed=4)
    found = attack.side_errors(target, IMAGES, {"none": ()}, "x", Workers())["none"]
    expected = torch.stack([differences[:, :2].mean(1), differences.mean(1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    alone = PFAMI([0.9, 0.6], None, 2, timesteps=[60], noise_seed=4)
    found = alone.side_errors(target, IMAGES, {"none": ()}, "x", Workers())["none"]
    torch.testing.assert_close(found[:, 0], differences[:, 1], rtol=1e-9, atol=1e-12)
    assert PFAMI().steps(450) == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450]


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="power must be positive, got 0"):
        SimA(0)
    with pytest.raises(ValueError, match=r"zooms must be at least one share in \(0, 1\), got \[1.0\]"):
        PFAMI([1.0])
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        PFAMI(stride=0)
