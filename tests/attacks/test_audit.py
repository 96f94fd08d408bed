"""Several attacks from one configuration: on a Stable-Diffusion-type model by one command, and each as if alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from oracles import planted_mixture
from PIL import Image
from stable_diffusion import save_pipeline
from victim import patterns, scene_of

from lightning_mem.attacks import PIA, Audit, Inpainting, LossAttack, prompted
from lightning_mem.cli import run
from lightning_mem.data import ListedSource, MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.modules import DenoiserModule
from lightning_mem.records import Record, read_records
from lightning_mem.trainer import MemorizationTrainer

CONFIGS = Path(__file__).parent.parent.parent / "configs"
AUDIT, FOLDER = (CONFIGS / kind / "attacks" / "audit.yaml" for kind in ("stable_diffusion", "folder"))
MEMBERS, HELDOUT = patterns(6), patterns(6, 1)


def attacks() -> list[LossAttack | Inpainting]:
    loss = LossAttack(timesteps=[20, 60], noise_seed=0)
    return [loss, Inpainting(num_inpaintings=2, kept=1, num_steps=2, block=4, sample_seed=0, pictures=0)]


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


def table(name: str, seed: int, captions: list[str], side: int = 16) -> str:
    """A CSV of colour images beside it, each with its caption and label."""
    lines = ["file,caption,label"]
    for number, caption in enumerate(captions):
        file = f"{Path(name).stem}{number}.png"
        pixels = np.random.default_rng((seed, number)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        lines.append(f"{file},{caption},{number % 3}")
    Path(name).write_text("\n".join(lines))
    return name


def audited(file: Path, smaller: dict[str, str], *options: str) -> list[Record]:
    """The records of the shipped configuration with smaller numbers."""
    text = file.read_text()
    for own, other in smaller.items():
        assert own in text
        text = text.replace(own, other)
    Path("audit.yaml").write_text(text)
    lists = ["members", table("own.csv", 0, ["a cat", "a dog", "a hat", "a cow"])]
    lists += ["heldout", table("other.csv", 1, ["red", "blue", "a hat", "grey", "pink"])]
    given = [f"--data.source.init_args.{word}={path}" for word, path in zip(lists[::2], lists[1::2], strict=True)]
    given += ["--data.image_size=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options]
    run(["attack", "--config", "audit.yaml", *given])
    records = [r for file in Path("runs").glob("*/attacks/audit-*/results.jsonl") for r in read_records(file)]
    assert all(r.value is None or np.isfinite(r.value) for r in records)
    return records


TEXT = {
    "num_generations: 500": "num_generations: 3\n          num_steps: 2", "clique_size: 10": "clique_size: 2",
    "num_generations: 4": "num_generations: 1\n          num_steps: 2", "block: 16": "block: 4",
}  # fmt: skip


def test_a_stable_diffusion_type_model_is_audited_by_one_command(capsys: pytest.CaptureFixture) -> None:
    options = ["--model.init_args.pretrained", save_pipeline(Path("sd"))]
    records = audited(AUDIT, TEXT, *options)
    names = {record.name for record in records}
    assert {"attack/prompted/flagged", "attack/prompted/flagged_heldout", "attack/noise_norm/auc"} <= names
    of_images = [r for r in records if r.name.endswith("/auc") and "attacker" in r.definition]
    assert {r.name.split("/")[1] for r in of_images} == {"loss", "secmi", "pia", "gradient_norm"}
    assert {r.definition["condition"] for r in of_images} == {"caption"}
    counts = {(r.definition["num_members"], r.definition["num_heldout"]) for r in of_images}
    assert counts == {(4, 5), (2, 3)}  # both lists; and the half that the calibrated attacker is told on
    prompts = next(Path("runs").glob("*/attacks/audit-*/prompted-*/tables/prompts.csv")).read_text()
    assert sorted(line.split(",")[1] for line in prompts.splitlines()[1:]) == sorted(
        ["a cat", "a cow", "a dog", "a hat", "blue", "grey", "pink", "red"]
    )
    shown = capsys.readouterr().out
    assert all(f"attack {name}" in shown for name in ("prompted", "noise_norm"))
    assert "resolve false positive rates from 0.2 on" in shown.replace("\n", " ")


SMALL = {
    "num_samples: 4096": "num_samples: 70", "num_steps: 50": "num_steps: 2",
    "num_inpaintings: 100": "num_inpaintings: 2\n          num_steps: 2", "kept: 10": "kept: 1\n          pictures: 0",
    "num_draws: 10": "num_draws: 1\n          block: 4", "timesteps: [100]": "timesteps: [100]\n          block: 4",
    "timesteps: [200]": "timesteps: [200]\n          block: 4",
}  # fmt: skip


def pipeline(classes: int | None = None) -> str:
    """A diffusers folder around a tiny UNet on pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4, num_class_embeds=classes,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained("theirs", safe_serialization=True)
    return "theirs"


def test_a_class_conditional_pipeline_is_audited_by_one_command() -> None:
    options = ["--model.init_args.pretrained", pipeline(4), "--data.labels=true", "--data.num_classes=4"]
    records = audited(FOLDER, SMALL, *options)
    names = {record.name.split("/")[1] for record in records}
    assert names == {"extraction", "inpainting", "loss", "secmi", "pia", "gradient_norm"}
    assert {r.definition.get("condition") for r in records if r.name.endswith("/auc")} == {"label"}
    written = json.loads(Path("runs/audit/members.json").read_text())
    assert [len(written[side]["indices"]) for side in ("members", "heldout")] == [4, 5]
    rows = next(Path("runs").glob("*/attacks/audit-*/pia-*/tables/membership.csv")).read_text().splitlines()[1:]
    places = [("members", range(4)), ("heldout", range(4, 9))]
    assert [row.split(",")[:2] for row in rows] == [[side, str(i)] for side, indices in places for i in indices]


def test_what_a_folder_says_of_other_images_is_not_taken_for_these() -> None:
    table("own.csv", 0, ["a"] * 4)
    table("other.csv", 1, ["a"] * 5)
    model = DenoiserModule.from_diffusers(pipeline())

    def attacked(**options: int) -> list[Record]:
        source = ListedSource("own.csv", "other.csv")
        data = MemorizationDataModule(source, num_heldout=None, image_size=16, channels=3, **options)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        trainer = MemorizationTrainer(default_root_dir="runs/theirs", **quiet)
        return trainer.attack(model, Audit([PIA(timesteps=[20], block=4)]), data)

    first = attacked()
    assert attacked() == first
    assert {r.definition["num_members"] for r in first if r.name == "attack/pia/z"} == {4, 2}
    with pytest.raises(ValueError, match=r"theirs/members.json names members .* need another run folder"):
        attacked(num_members=3)
