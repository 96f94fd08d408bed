"""Models go to diffusers and come back as they were, and training starts from them at their quality."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

from lightning_mem.cli import run
from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import sample, sample_x0
from lightning_mem.evaluation import Measure, Reference, draw_samples
from lightning_mem.modules import DenoiserModule, load_target
from lightning_mem.randomness import generator
from lightning_mem.records import read_records

pytestmark = pytest.mark.usefixtures("no_curves")

TINY = Path(__file__).parent.parent / "tiny.yaml"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder and the diffusers folder made from it; tests only read them."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        run(["fit", "--config", str(TINY), "--trainer.default_root_dir", str(folder / "run")])
    return folder / "run", DenoiserModule.from_checkpoint(folder / "run").to_diffusers(str(folder / "exported"))


def test_samples_of_the_exported_pipeline_are_bit_identical(exported) -> None:
    trained, folder = exported
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    ours = sample_x0(load_target(trained), range(64), seed=3, num_steps=5)
    back = sample_x0(DenoiserModule.from_diffusers(folder), range(64), seed=3, num_steps=5)
    assert torch.equal(ours, back)
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = [generator(3, "sample", i) for i in range(64)]
    theirs = pipeline(batch_size=64, generator=noise, num_inference_steps=5, output_type="np").images
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(theirs).permute(0, 3, 1, 2))


def test_numbers_of_the_exported_model_agree(exported) -> None:
    trained, folder = exported
    data = MemorizationDataModule(num_members=20, num_heldout=24, flip=True)
    data.setup()
    measure = Measure(Reference.from_datamodule(data))
    found = [
        measure(draw_samples(target, 70, num_steps=3), step=0).values()
        for target in (load_target(trained), DenoiserModule.from_diffusers(folder).target())
    ]
    assert found[0] == found[1]
    assert {"memorization/ratio", "frechet/pixels/heldout"} <= found[0].keys()


def test_raw_and_averaged_weights_are_told_apart(exported) -> None:
    trained, _ = exported
    raw, ema = (load_target(trained, weights) for weights in ("raw", "ema"))
    assert (raw.weights, ema.weights) == ("raw", "ema")
    assert raw.digest != ema.digest
    assert not torch.equal(sample(raw, range(4), seed=0, num_steps=2), sample(ema, range(4), seed=0, num_steps=2))


def test_fit_from_pretrained_continues_from_its_quality(fit, exported, tmp_path: Path) -> None:
    trained, folder = exported
    text = TINY.read_text()
    head, tail = text.index("    network:"), text.index("    optimizer:")
    config = tmp_path / "finetune.yaml"
    config.write_text(text[:head] + f"    pretrained: {folder}\n" + text[tail:])
    options = ["--model.init_args.optimizer.init_args.lr", "1e-6", "--trainer.val_check_interval", "1"]
    tuned = fit("tuned", *options, "--trainer.max_steps", "1", config=config)
    last = {r.name: r for r in read_records(trained / "results.jsonl") if r.weights == "ema" and r.step == 10}
    # the exported weights are those of step 12; their own numbers are measured here
    data = MemorizationDataModule(num_members=20, num_heldout=24, flip=True)
    data.setup()
    own = Measure(Reference.from_datamodule(data))(draw_samples(load_target(folder), 70, num_steps=3)).values()
    first = {r.name: r for r in read_records(tuned / "results.jsonl") if r.weights == "ema"}
    key = "frechet/pixels/heldout"
    assert first[key].value <= own[f"{key}_high"]
    assert last[key].value != first[key].value
    # an untrained network of the same shape is far outside
    fresh = fit("fresh", "--trainer.val_check_interval", "1", "--trainer.max_steps", "1")
    untrained = {r.name: r for r in read_records(fresh / "results.jsonl") if r.weights == "ema"}
    assert untrained[key].value > own[f"{key}_high"]


def test_a_checkpoint_alone_gives_the_same_samples_in_a_fresh_process(exported) -> None:
    trained, _ = exported
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from lightning_mem.modules import load_target; from lightning_mem.diffusion import sample\n"
        f"images = sample(load_target('{trained}/checkpoints/last.ckpt'), range(5), seed=1, num_steps=3)\n"
        "print(images.sum((1, 2, 3)).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = sample(load_target(trained), range(5), seed=1, num_steps=3).sum((1, 2, 3)).tolist()
    assert json.loads(found.strip().splitlines()[-1]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 3}, "has channels 1, but the data give 3"),
        ({"image_size": 16}, "has image_size 8, but the data give 16"),
        ({"num_classes": 10}, "has num_classes None, but the data give 10"),
    ],
)
def test_sizes_that_do_not_fit_the_pretrained_model_are_named(exported, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserModule.from_diffusers(exported[1], **change)


def test_pretrained_that_is_not_there_says_what_is_legal() -> None:
    with pytest.raises(ValueError, match="pretrained must be a diffusers folder"):
        DenoiserModule(pretrained="nowhere/at-all")


def test_latent_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    unet = UNet2DModel(8, 3, 3, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "ldm")
    with pytest.raises(ValueError, match="LDMPipeline"):
        DenoiserModule(pretrained=str(tmp_path / "ldm"))
