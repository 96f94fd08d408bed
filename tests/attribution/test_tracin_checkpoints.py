"""TracIn along a training: the checkpoints that count, at which weights, and which are refused."""

from pathlib import Path

import pytest
import torch
from linear_denoiser import images, scene_of

from lightning_mem.attribution import GradientOptions, Queries, TracIn
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.modules import DenoiserModule, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import UNetConfig

OPTIONS = GradientOptions(num_timesteps=1, dimensions=64)


def write_checkpoint(folder: Path, step: int, rate: float, trained_on: str = "") -> Path:
    """A checkpoint as training leaves it, of a network drawn from its step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        network = UNetConfig((4,), norm_num_groups=2, mid_attention=False)
        module = DenoiserModule(4, network=network, process=DiffusionProcess(num_timesteps=50))
    meta = {"module": "DenoiserModule", "seed": 0, "step": step, "members_digest": trained_on, "num_members": 0}
    path = folder / "checkpoints" / f"step{step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            META: meta | module.checkpoint_meta(),
            "state_dict": module.state_dict(),
            "optimizer_states": [{"param_groups": [{"lr": rate}]}],
        },
        path,
    )
    return path


def test_scores_are_summed_over_checkpoints_by_learning_rate_and_steps_up_to_the_target(tmp_path: Path) -> None:
    home = tmp_path / "run"
    paths = {step: write_checkpoint(home, step, rate) for step, rate in ((10, 0.5), (30, 0.2), (40, 0.0), (50, 9.0))}
    target = load_target(paths[40])
    members, asked = images(3, 1, side=4), Queries(images(2, 2, side=4), "given", torch.arange(2))
    method = TracIn("all", OPTIONS)
    found = method.scores(scene_of(target, members, tmp_path), asked)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for step, weight in ((10, 0.5 * 10), (30, 0.2 * 20)):
        alone = scene_of(load_target(paths[step]), members, tmp_path / f"{step}")
        expected += weight * TracIn("target", OPTIONS).scores(alone, asked)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert method.cost()["gradients"] == 2 * 5  # the schedule had reached 0 at the target
    assert TracIn("target", OPTIONS).identity(target, "", home) != method.identity(target, "", home)
    before = TracIn("all", OPTIONS).identity(target, "", home)
    write_checkpoint(home, 30, 0.1)
    assert TracIn("all", OPTIONS).identity(target, "", home) != before


def test_a_target_without_other_checkpoints_counts_once_and_strange_ones_are_refused(tmp_path: Path) -> None:
    home = tmp_path / "run"
    target = load_target(write_checkpoint(home, 10, 0.0))
    members, asked = images(3, 1, side=4), Queries(images(2, 2, side=4), "given", torch.arange(2))
    alone = TracIn("target", OPTIONS).scores(scene_of(target, members, tmp_path / "a"), asked)
    assert torch.equal(TracIn("all", OPTIONS).scores(scene_of(target, members, tmp_path), asked), alone)
    write_checkpoint(home, 5, 1.0, trained_on="others")
    with pytest.raises(ValueError, match="step5.ckpt was trained on the member set others"):
        TracIn("all", OPTIONS).scores(scene_of(target, members, tmp_path), asked)
    (home / "checkpoints" / "step10.ckpt").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is the target, whose weights differ"):
        TracIn("all", OPTIONS).identity(target, "", home)
