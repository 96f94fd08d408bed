"""Several attacks from one configuration: on a Stable-Diffusion-type model by one command, and each as if alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import planted_mixture
from PIL import Image
from stable_diffusion import save_pipeline
from victim import patterns, scene_of

from lightning_mem.attacks import Audit, Inpainting, LossAttack, prompted
from lightning_mem.cli import run
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.records import Record, read_records

AUDIT = Path(__file__).parent.parent.parent / "configs" / "stable_diffusion" / "attacks" / "audit.yaml"
MEMBERS, HELDOUT = patterns(6), patterns(6, 1)


def attacks() -> list[LossAttack | Inpainting]:
    loss = LossAttack(timesteps=[20, 60], noise_seed=0)
    return [loss, Inpainting(num_inpaintings=2, kept=1, num_steps=2, block=4, sample_seed=0)]


def told(records: list[Record]) -> list[tuple[object, ...]]:
    """All but times."""
    return [(r.name, r.value, r.definition) for r in records if "seconds" not in r.name]


def test_every_attack_leaves_what_it_leaves_alone_and_a_second_run_asks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = planted_mixture(MEMBERS, DiffusionProcess("linear"))
    audit = Audit(list(attacks()))
    assert audit.identity(target, "x", Path("x"))
    found = audit.run(scene_of(target, MEMBERS, HELDOUT))
    alone = [record for attack in attacks() for record in attack.run(scene_of(target, MEMBERS, HELDOUT, Path("alone")))]
    assert told(found) == told(alone)
    assert audit.table(found).row_count == 2
    folders = sorted(path.name.split("-")[0] for path in Path("results").iterdir())
    assert folders == ["inpainting", "loss"]
    for attack in (LossAttack, Inpainting):
        monkeypatch.setattr(attack, "run", None)
    again = audit.run(scene_of(target, MEMBERS, HELDOUT))
    assert again == found


def test_what_cannot_be_audited_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="at least one attack, got none"):
        Audit([])
    target = planted_mixture(MEMBERS, DiffusionProcess("linear"))
    with pytest.raises(ValueError, match="attacks must differ, got loss-"):
        Audit([attacks()[0], attacks()[0]]).identity(target, "x", Path("x"))
    with pytest.raises(ValueError, match="need a model with a text encoder"):
        Audit([attacks()[0], prompted.PromptedExtraction(["a"], cfg_weight=None)]).identity(target, "x", Path("x"))


def test_a_stable_diffusion_type_model_is_audited_by_one_command(capsys: pytest.CaptureFixture) -> None:
    path = save_pipeline(Path("sd"))
    pixels = torch.randint(0, 256, (12, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Path("images").mkdir()
    for number, image in enumerate(pixels.numpy().astype(np.uint8)):
        Image.fromarray(image).save(f"images/{number:02d}.png")
    Path("my_captions.csv").write_text("caption\na cat\na dog\n")
    Path("other_captions.csv").write_text("caption\na hat\na log\n")
    text = AUDIT.read_text()
    for own, other in (
        ("num_generations: 500", "num_generations: 6\n          num_steps: 2"), ("clique_size: 10", "clique_size: 2"),
        ("num_generations: 4", "num_generations: 2\n          num_steps: 2"), ("block: 16", "block: 4"),
    ):  # fmt: skip
        assert own in text
        text = text.replace(own, other)
    Path("audit.yaml").write_text(text)
    options = ["--model.init_args.pretrained", path, "--data.source.init_args.path", "images", "--data.image_size=16"]
    options += ["--data.num_heldout=6", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    run(["attack", "--config", "audit.yaml", *options])
    records = [r for file in Path("runs").glob("*/attacks/audit-*/results.jsonl") for r in read_records(file)]
    names = {record.name for record in records}
    assert {"attack/prompted/flagged", "attack/prompted/flagged_heldout", "attack/noise_norm/auc"} <= names
    assert {"attack/loss/auc", "attack/pia/auc"} <= names
    assert all(r.value is None or np.isfinite(r.value) for r in records)
    shown = capsys.readouterr().out
    assert "attack prompted" in shown
    assert "attack noise_norm" in shown
