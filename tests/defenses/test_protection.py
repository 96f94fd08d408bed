"""Protections by class_path: under the verb sample, beside guidance, under the loss attack, and what they refuse."""

import csv
import shutil
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
from lightning_mem.defenses import (
    AMGProtection,
    CPSampleProtection,
    NearestRejection,
    UndecidedRejection,
    final_confidence,
    load_protector,
    training_images,
)
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.diffusion import sample as diffusion_sample
from lightning_mem.diffusion.additions import AbstractAddition, Together
from lightning_mem.evaluation import blocks, rejection
from lightning_mem.evaluation.rejection import Accepted, try_seed
from lightning_mem.metrics import memorized, nearest_neighbors
from lightning_mem.modules import DenoiserModule, RandomLabelModule, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer
from lightning_mem.types import SampleSet

pytestmark = pytest.mark.usefixtures("no_curves")

MODEL: Any = LightningModule()
"""Verbs take the network from the checkpoint."""


def save(folder: Path, module: Any, members_digest: str) -> str:
    """A run folder with one checkpoint, as training leaves it."""
    meta = {"module": type(module).__name__, "seed": 0, "step": 7, "members_digest": members_digest, "num_members": 12}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)


DATA: dict[str, Any] = {
    "source": {"class_path": "lightning_mem.data.ArraySource", "init_args": {"path": "x.npz"}},
    "num_members": 12, "num_heldout": 20, "image_size": 8,
}  # fmt: skip


def data() -> MemorizationDataModule:
    np.savez("x.npz", arr_0=patterns(32, 8).permute(0, 2, 3, 1).numpy())
    found = MemorizationDataModule(ArraySource("x.npz"), 12, 20, 8)
    found.setup()
    return found


def say_data(folder: str, images: MemorizationDataModule, **options: Any) -> None:
    """What ``fit`` writes about the data into a run folder."""
    Path(folder, "config.yaml").write_text(yaml.safe_dump({"data": DATA | options}))
    images.write_members(Path(folder))


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
        "data": DATA,
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


# --- rejection, certificates and the target's own members ----------------------------------------------------------


def table(folder: str) -> list[dict[str, str]]:
    with next(Path(folder, "samples").glob("*_certificates.csv")).open() as file:
        return list(csv.DictReader(file))


def draw(folder: str, guidance: AbstractAddition, count: int = 20, **options: Any) -> SampleSet:
    found = trainer_of(folder).sample(MODEL, num_samples=count, num_steps=3, guidance=guidance, **options)
    assert found is not None
    return found


def test_every_protected_sample_has_a_certificate(protected: Any) -> None:
    own, bits, images = protected
    say_data(own, images)
    # a classifier that was never trained is sure of nothing: at this tolerance the gate opens now and then
    classifier = load_protector(bits, "ema", load_target(own), own)
    given = CPSampleProtection(bits, 1 - float(final_confidence(classifier, images.members.images).median()), 300.0)
    found = draw(own, given)
    rows = table(own)
    assert list(rows[0]) == ["address", "gate_rate", "final_confidence", "nearest", "accepted", "tries"]
    assert [int(row["address"]) for row in rows] == list(range(20))
    term = given.terms(load_target(own), own, found.addresses)[0]
    again = diffusion_sample(load_target(own), range(20), seed=0, num_steps=3, guidance=[term])
    assert torch.equal(again, found.images)
    rates = term.certificates(range(20)).gate_rate.tolist()  # type: ignore[attr-defined]
    assert len(set(rates)) > 1
    assert [float(row["gate_rate"]) for row in rows] == pytest.approx(rates, rel=1e-8)
    members = images.members.images
    near = (found.images[:, None].double() - members[None].double()).div(255).square().mean((2, 3, 4)).sqrt().amin(1)
    assert [float(row["nearest"]) for row in rows] == pytest.approx(near.tolist(), rel=1e-6)
    q = final_confidence(classifier, found.images).tolist()
    assert [float(row["final_confidence"]) for row in rows] == pytest.approx(q, rel=1e-8)
    assert {(row["accepted"], row["tries"]) for row in rows} == {("1", "1")}


def test_a_stopped_protected_draw_continues_with_the_certificates_of_one_that_was_not(
    protected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, bits, images = protected
    say_data(own, images)
    shutil.copytree(own, "other")
    given = Together([CPSampleProtection(bits, 0.499, 300.0), NearestRejection(threshold=0.95)])
    whole = draw("other", given, 66, max_tries=3)
    original, calls = blocks.sample, []

    def stop(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "sample", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            draw(own, given, 66, max_tries=3)
        part = draw(own, given, 66, max_tries=3)
    assert len(calls) == 3  # two blocks, one of them twice
    assert part.digest == whole.digest
    assert table(own) == table("other")
    assert {row["tries"] for row in table(own)} > {"1", "2"}
    file = next(Path(own, "samples").glob("*_certificates.csv"))
    file = file.with_name(file.name.replace("_certificates.csv", ".npz"))
    monkeypatch.setattr(rejection, "sample", None)  # it is all there
    assert draw(own, given, 66, max_tries=3).digest == whole.digest
    with pytest.raises(ValueError, match="holds another draw"):
        draw(
            own, NearestRejection(threshold=0.8), 66, out=str(next(Path(own, "samples").glob("*guided-*[0-9a-f].npz")))
        )


def test_rejected_samples_are_drawn_again_by_the_verb(protected: Any) -> None:
    own, bits, images = protected
    say_data(own, images)
    plain = trainer_of(own).sample(MODEL, num_samples=20, num_steps=3)
    assert plain is not None
    assert not list(Path(own, "samples").glob("*_certificates.csv"))
    found = draw(own, NearestRejection(threshold=0.9), max_tries=3)
    kept = ~memorized(nearest_neighbors(plain.images, images.members.images, 2)[0], 0.9)
    assert 0 < kept.sum() < 20
    assert torch.equal(found.images[kept], plain.images[kept])
    rows = table(own)
    assert torch.equal(torch.tensor([row["tries"] == "1" for row in rows]), kept)
    lost = [row["accepted"] == "0" for row in rows]
    assert all(row["tries"] == "3" for row, left in zip(rows, lost, strict=True) if left)
    place = next(place for place, row in enumerate(rows) if row["tries"] == "2")
    second = diffusion_sample(load_target(own), [place], seed=try_seed(0, 1), num_steps=3)
    assert torch.equal(found.images[place], second[0])
    assert {row["gate_rate"] for row in rows} == {""}
    assert found.settings["protection"] == "rejection_nearest"
    sure = draw(own, UndecidedRejection(bits, 0.499), 4, max_tries=1, out="sure")
    edge = final_confidence(load_protector(bits, "ema", load_target(own), own), sure.images) <= 0.501
    assert torch.equal(Accepted.load("sure.npz").accepted, edge)
    with pytest.raises(ValueError, match="max_tries must be at least 1, got 0"):
        draw(own, NearestRejection(), max_tries=0)


def test_a_bank_that_is_not_named_is_the_targets_members_as_it_trained_on_them(protected: Any) -> None:
    own, _, images = protected
    path = f"{own}/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"lies in no run folder .* or name the training images with bank"):
        training_images(None, None, path)
    say_data(own, images)
    for given in (own, path):
        found, mirror = training_images(None, None, given)
        assert torch.equal(found, images.members.images)
        assert mirror is False
    say_data(own, images, flip=True)
    assert training_images(None, None, own)[1] is True
    assert training_images(None, False, own)[1] is False
    target = load_target(own)
    judge = NearestRejection().judge(target, own)
    assert not judge(images.members.images.flip(-1)).any()
    assert len(judge.bank) == 24
    assert len(AMGProtection().terms(target, own, torch.arange(2))[0].images) == 24  # type: ignore[attr-defined]
    say_data(own, images, seed=5)
    with pytest.raises(ValueError, match="members.json names members with the digest"):
        training_images(None, None, own)
    Path(own, "members.json").unlink()
    with pytest.raises(ValueError, match=f"was trained on the member set {images.members.digest}, but .* leads to"):
        training_images(None, None, own)


def test_a_rejection_that_does_not_belong_is_refused(protected: Any) -> None:
    _, bits, images = protected
    digest = images.members.digest
    larger = target("larger", digest, side=16)
    with pytest.raises(ValueError, match=r"bits works on .* \(1, 8, 8\), but larger on \(1, 16, 16\)"):
        UndecidedRejection(bits).judge(load_target(larger), larger)
    cosine = target("schedule", digest, schedule="cosine")
    with pytest.raises(ValueError, match="belongs to another noising process"):
        UndecidedRejection(bits).judge(load_target(cosine), cosine)
    with pytest.raises(ValueError, match=r"become \(1, 8, 8\) for the denoiser, which works on \(1, 16, 16\)"):
        NearestRejection("x.npz").judge(load_target(larger), larger)
    for tol in (0.0, 0.5, 0.6):
        with pytest.raises(ValueError, match=f"tol .*{tol}"):
            UndecidedRejection(bits, tol)
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 1.0"):
        NearestRejection(threshold=1.0)
