"""The ensemble as one denoiser: leaving out is exact, and what does not belong together is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from closed_ensembles import closed_ensemble, random_images

from lightning_mem.attribution import Ensemble, EnsembleDenoiser, UnitCodes
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, sample, sample_x0
from lightning_mem.modules import DenoiserModule
from lightning_mem.modules.base import META
from lightning_mem.networks import UNetConfig

PROCESS = DiffusionProcess(num_timesteps=50)
IMAGES = random_images(8)
CODES = UnitCodes.drawn([[i] for i in range(8)], 6, seed=2)
DRAWING = {"seed": 3, "num_steps": 4, "block": 4}


def test_the_prediction_is_the_mean_of_the_members() -> None:
    ensemble = closed_ensemble(IMAGES, CODES, PROCESS)
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([5, 20, 45])
    outputs = torch.stack([member.denoiser(x, t).double() for member in ensemble.members])
    torch.testing.assert_close(ensemble.target().denoiser(x, t).double(), outputs.mean(0), rtol=1e-5, atol=1e-6)
    left = ensemble.codes.active([3, 4])
    assert 0 < int(left.sum()) < 6
    found = ensemble.target([3, 4]).denoiser(x, t).double()
    torch.testing.assert_close(found, outputs[left].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [0, 5])
def test_leaving_out_equals_an_ensemble_that_was_never_shown_the_unit_bit_for_bit(unit: int) -> None:
    changed = IMAGES.clone()
    changed[unit] = 255 - changed[unit]
    shown, never = (closed_ensemble(images, CODES, PROCESS) for images in (IMAGES, changed))
    drawn = [sample(one.target([unit]), range(6), **DRAWING) for one in (shown, never)]
    assert torch.equal(*drawn)
    assert shown.target([unit]).digest == never.target([unit]).digest
    whole = [sample(one.target(), range(6), **DRAWING) for one in (shown, never)]
    assert not torch.equal(*whole)
    assert shown.target().digest != never.target().digest


def test_weights_of_nought_and_two_over_m_are_leaving_out_for_any_number_of_steps() -> None:
    ensemble = closed_ensemble(IMAGES, CODES, PROCESS)
    for steps in (1, 5):
        drawing = {"seed": 1, "num_steps": steps, "block": 2}
        weights = (~CODES.codes[4]).double() * (2 / 6)
        found = sample_x0(ensemble.weighted(weights), [0, 1], **drawing)
        assert torch.equal(found, sample_x0(ensemble.target([4]), [0, 1], **drawing))


def test_a_sample_is_the_same_in_any_company() -> None:
    target = closed_ensemble(IMAGES, CODES, PROCESS).target([1])
    whole = sample(target, range(7), **DRAWING)
    assert torch.equal(whole[[6, 2]], sample(target, [6, 2], **DRAWING))


def test_members_that_do_not_belong_together_are_refused() -> None:
    ensemble = closed_ensemble(IMAGES, CODES, PROCESS)
    own = list(ensemble.members)
    other = EmpiricalDenoiser(IMAGES, DiffusionProcess("linear", num_timesteps=50)).target()
    with pytest.raises(ValueError, match="member02 differs from member00 in process: .* trained by one recipe"):
        Ensemble((*own[:2], other, *own[3:]), CODES)
    with pytest.raises(ValueError, match="member05 differs from member00 in num_classes"):
        Ensemble((*own[:5], replace(own[5], num_classes=2)), CODES)
    with pytest.raises(ValueError, match="the codes have 6 places, but there are 5 members"):
        Ensemble(tuple(own[:5]), CODES)
    v = EmpiricalDenoiser(IMAGES, DiffusionProcess(num_timesteps=50, prediction="v"))
    with pytest.raises(ValueError, match=r"must predict the same, got \['eps', 'v'\]"):
        EnsembleDenoiser([own[0].denoiser, v], torch.ones(2))
    with pytest.raises(ValueError, match="weights must be one a denoiser"):
        ensemble.weighted(torch.zeros(6))


def run_folder(folder: Path, seen: list[int], changes: dict[str, Any] | None = None) -> None:
    """What a training leaves behind, with an untrained network."""
    config = {
        "seed_everything": int(folder.name[-2:]),
        "model": {"class_path": "DenoiserModule", "init_args": {"loss": "plain"}},
        "data": {"seed": int(folder.name[-2:]), "members": f"{folder}.json", "batch_size": 8},
        "trainer": {"max_steps": 5, "default_root_dir": str(folder)},
    }
    for key, value in (changes or {}).items():
        part, name = key.split(".")
        config[part][name] = value
    (folder / "checkpoints").mkdir(parents=True)
    module = DenoiserModule(network=UNetConfig((4, 4), norm_num_groups=2, mid_attention=False))
    meta = {"module": "DenoiserModule", "seed": 0, "step": 5, "members_digest": "", "num_members": len(seen)}
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "members.json").write_text(json.dumps({"members": {"indices": seen[::-1]}}))
    (folder / "summary.json").write_text("{}")


def test_an_ensemble_is_read_from_the_folder_of_its_study_or_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one manifest codes\*.json, or that file; .* holds none"):
        Ensemble.load(tmp_path)
    codes = UnitCodes.drawn([[4], [9], [11]], 3)
    codes.save(tmp_path / "codes_seed0.json")
    for k in (0, 1):
        run_folder(tmp_path / codes.members[k], codes.seen_by(k))
    with pytest.raises(ValueError, match="lacks 1 of 3 members: member02 are not trained to their end"):
        Ensemble.load(tmp_path)
    run_folder(tmp_path / "elsewhere02", codes.seen_by(2))
    row = {"name": "member02", "members": "x", "state": "done", "folder": str(tmp_path / "elsewhere02")}
    (tmp_path / "plan.jsonl").write_text(json.dumps(row) + "\n")  # a run that was reused lies elsewhere
    found = Ensemble.load(tmp_path)
    assert found.digest == Ensemble.load(tmp_path / "codes_seed0.json").digest
    assert sample(found.target([1]), [0], seed=0, num_steps=1, block=1).shape == (1, 1, 8, 8)
    run_folder(tmp_path / "member02", codes.seen_by(2), {"trainer.max_steps": 9, "data.batch_size": 4})
    with pytest.raises(ValueError, match=r"member02 .* another recipe .* in data.batch_size, trainer.max_steps"):
        Ensemble.load(tmp_path)
    members = tmp_path / "member02" / "members.json"
    (tmp_path / "member02" / "config.yaml").write_text((tmp_path / "member00" / "config.yaml").read_text())
    members.write_text(json.dumps({"members": {"indices": [77]}}))
    with pytest.raises(ValueError, match=r"member02 was trained on 1 images that are not those .* for member02 \(1\)"):
        Ensemble.load(tmp_path)
    codes.save(tmp_path / "codes_seed1.json")
    with pytest.raises(ValueError, match=r"holds several \(codes_seed0.json, codes_seed1.json\): name one"):
        Ensemble.load(tmp_path)
