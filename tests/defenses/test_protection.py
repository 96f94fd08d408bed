"""Protections by class_path: under the verb sample, beside guidance, under the loss attack, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from labelled_mixture import patterns
from lightning.pytorch import LightningModule

from lightning_mem.cli import run
from lightning_mem.data import ArraySource, MemorizationDataModule
from lightning_mem.defenses import AMGProtection, CPSampleProtection, load_protector
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.diffusion.additions import AbstractAddition, Together
from lightning_mem.modules import DenoiserModule, RandomLabelModule, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer
from lightning_mem.types import SampleSet

MODEL: Any = LightningModule()
"""Verbs take the network from the checkpoint."""


def save(folder: Path, module: Any, members_digest: str) -> str:
    """A run folder with one checkpoint, as training leaves it."""
    meta = {"module": type(module).__name__, "seed": 0, "step": 7, "members_digest": members_digest, "num_members": 12}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)


def data() -> MemorizationDataModule:
    np.savez("x.npz", arr_0=patterns(32, 8).permute(0, 2, 3, 1).numpy())
    found = MemorizationDataModule(ArraySource("x.npz"), 12, 20, 8)
    found.setup()
    return found


def target(folder: str, members_digest: str, side: int = 8, schedule: str = "linear") -> str:
    torch.manual_seed(0)
    process = DiffusionProcess(schedule, num_timesteps=100)  # type: ignore[arg-type]
    network = UNetConfig((8,), norm_num_groups=4, mid_attention=False)
    module = DenoiserModule(network=network, process=process, image_size=side)
    return save(Path(folder), module, members_digest)


@pytest.fixture
def protected() -> tuple[str, str, MemorizationDataModule]:
    """A target and its random-label classifier, neither of them trained; and the data."""
    images = data()
    own = target("victim", images.members.digest)
    module = RandomLabelModule(own, network=ClassifierConfig(widths=(8,), blocks=(2,)), seed=0, num_labelings=2)
    module._take_data(images)
    module._build()
    return own, save(Path("bits"), module, images.members.digest), images


def trainer_of(folder: str) -> MemorizationTrainer:
    return MemorizationTrainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)


def test_samples_are_drawn_under_protection_and_scale_zero_is_none(protected: Any) -> None:
    own, bits, images = protected
    np.savez("members.npz", arr_0=images.members.images.permute(0, 2, 3, 1).numpy())

    def sample(guidance: AbstractAddition | None) -> SampleSet:
        found = trainer_of(own).sample(MODEL, num_samples=6, num_steps=3, guidance=guidance)
        assert found is not None
        return found

    plain = sample(None)
    assert torch.equal(sample(CPSampleProtection(bits, scale=0.0)).images, plain.images)
    given = CPSampleProtection(bits, 0.5, 300.0, "attract", (0, 90))
    one = sample(given)
    other = sample(AMGProtection("members.npz", 50.0, 1.99))
    both = sample(Together([given, AMGProtection("members.npz", 50.0, 1.99)]))
    assert len({found.digest for found in (plain, one, other, both)}) == 4
    assert one.settings["protection"] == "cpsample"
    assert (one.settings["protection_tol"], one.settings["protection_high"]) == (0.5, 90)
    assert both.settings["protection_2"] == "amg"
    with pytest.raises(ValueError, match="at least one addition, got none"):
        Together([])


def test_one_command_attacks_the_protected_denoiser(protected: Any, capsys: pytest.CaptureFixture) -> None:
    own, bits, _ = protected
    config = {
        "attack": {
            "class_path": "lightning_mem.attacks.LossAttack",
            "init_args": {
                "setting": "copies",
                "timesteps": [10, 20],
                "protection": {
                    "class_path": "lightning_mem.defenses.CPSampleProtection",
                    "init_args": {"random_label": bits, "scale": 5.0, "tol": 0.5},
                },
            },
        },
        "data": {
            "source": {"class_path": "lightning_mem.data.ArraySource", "init_args": {"path": "x.npz"}},
            "num_members": 12, "num_heldout": 20, "image_size": 8,
        },
        "model": {"class_path": "lightning_mem.modules.DenoiserModule"},
        "trainer": {"default_root_dir": own, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }  # fmt: skip
    Path("attack.yaml").write_text(yaml.safe_dump(config))
    run(["attack", "--config", "attack.yaml"])
    folder = next(Path(own, "attacks").glob("loss-*"))
    found = read_records(folder / "results.jsonl")
    assert {record.name for record in found} >= {"attack/loss/z", "attack/loss/auc_folded", "attack/loss/tpr_at_0.01"}
    assert {(r.definition["protection"], r.definition["t"]) for r in found if r.definition["attacker"] == "fixed"} == {
        (protection, t) for protection in ("none", "cpsample") for t in (10, 20)
    }
    assert {record.step for record in found} == {7}
    assert "cpsample" in capsys.readouterr().out


def test_a_classifier_that_does_not_belong_is_refused(protected: Any) -> None:
    own, bits, images = protected
    assert load_protector(bits, "ema", load_target(own), own).num_labelings == 2

    def terms(path: str) -> Any:
        return CPSampleProtection(bits).terms(load_target(path), path, torch.arange(2))

    digest = images.members.digest
    for path, message in (
        (target("larger", digest, side=16), r"bits works on .* \(1, 8, 8\), but larger on \(1, 16, 16\)"),
        (target("others", "0123"), f"bits protects the member set {digest}, but others was trained on 0123"),
        (target("schedule", digest, schedule="cosine"), "belongs to another noising process"),
    ):
        with pytest.raises(ValueError, match=message):
            terms(path)
    assert terms(target("unsaid", ""))  # a model that does not say its members
    with pytest.raises(ValueError, match=r"tol must lie in \(0, 0.5\], .* got 0.6"):
        CPSampleProtection(bits, 0.6)
