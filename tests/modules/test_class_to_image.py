"""A class-conditional transformer on latents is a target: its images are those of diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from stable_diffusion import tiny_vae
from torch import Tensor

from lightning_mem.diffusion import sample, sample_x0
from lightning_mem.modules import DenoiserModule, load_target
from lightning_mem.modules.base import META
from lightning_mem.randomness import generator
from lightning_mem.types import to_uint8

LABELS = [3, 0, 999, 3]


def tiny_dit(**options) -> DiTTransformer2DModel:
    given = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    given |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, **options}
    return DiTTransformer2DModel(**given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, vae = tiny_dit(), tiny_vae()
        for value in network.parameters():  # its last layers start so that labels say little
            value.data += 0.1 * torch.randn_like(value)
    path = tmp_path_factory.mktemp("diffusers") / "dit"
    DiTPipeline(network, vae, DDIMScheduler(clip_sample=False)).save_pretrained(str(path), safe_serialization=True)
    return str(path)


@pytest.mark.parametrize("cfg_weight", [1.0, 7.5])
def test_images_are_those_of_the_pipeline(folder: str, cfg_weight: float) -> None:
    pipeline, target = DiTPipeline.from_pretrained(folder), load_target(folder, cfg_weight=cfg_weight)
    pipeline.set_progress_bar_config(disable=True)
    noise = [generator(3, "sample", i) for i in range(4)]
    seen: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents: (seen.append(latents), decode(latents))[1]
    images = pipeline(
        LABELS, guidance_scale=cfg_weight, generator=noise, num_inference_steps=4, output_type="np"
    ).images
    given = {"seed": 3, "num_steps": 4, "condition": torch.tensor(LABELS), "block": 4}
    latents = sample_x0(target, range(4), **given)
    assert torch.equal(1 / pipeline.vae.config.scaling_factor * latents, seen[0])
    theirs = to_uint8(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    assert torch.equal(sample(target, range(4), **given), theirs)
    assert (target.num_classes, target.shape) == (1000, (4, 8, 8))
    other = {**given, "condition": torch.tensor([4, 0, 999, 3])}
    moved = (sample_x0(target, range(4), **other) - latents).abs().amax((1, 2, 3))
    assert moved[0] > 1e-3
    assert float(moved[1:].max()) < 1e-5


def test_a_label_is_needed_and_must_be_one_of_its_own(folder: str) -> None:
    target = load_target(folder)
    with pytest.raises(ValueError, match="conditioned on 1000 classes"):
        sample_x0(target, [0], seed=0, num_steps=2)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1000\), got 1000"):  # that is "none"
        sample_x0(target, [0], seed=0, num_steps=2, condition=torch.tensor([1000]))
    with pytest.raises(ValueError, match=r"needs int64 labels in \[0, 1000\)"):
        target.denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64))


def test_its_loss_is_that_of_latents_and_its_checkpoint_is_read_with_its_base(folder: str, tmp_path: Path) -> None:
    module, base = DenoiserModule.from_diffusers(folder), load_target(folder)
    assert (module.num_classes, module.shape) == (1000, (4, 8, 8))
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 300, 999])
    labels = torch.tensor([5, 6, 7])
    batch = {"image": x, "index": torch.arange(3), "mirrored": torch.zeros(3, dtype=torch.bool)}
    module.eval()  # in training it leaves out labels at random
    found = module._loss(module.clean(batch), eps, t, labels)
    alpha_bar = base.process.alpha_bar[t].reshape(3, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * base.codec.encode(x) + (1 - alpha_bar).sqrt() * eps).float()
    with torch.no_grad():
        output = base.denoiser.module(x_t, timestep=t, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(found, (output - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)

    for value in module.unet.parameters():
        value.data.mul_(1.1)
    meta = {"module": "DenoiserModule", "seed": 0, "step": 1, "members_digest": "", "num_members": 0}
    torch.save({META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}, tmp_path / "own.ckpt")
    given = {"seed": 0, "num_steps": 2, "block": 4, "condition": torch.tensor([5])}
    drawn = sample_x0(load_target(tmp_path / "own.ckpt"), [0], **given)
    assert torch.equal(drawn, sample_x0(module, [0], **given))
    assert (drawn - sample_x0(base, [0], **given)).abs().max() > 1e-3
    exported = DenoiserModule.from_checkpoint(tmp_path / "own.ckpt").to_diffusers(tmp_path / "exported")
    assert torch.equal(sample_x0(load_target(exported), [0], **given), drawn)
    module.pretrained = "moved"
    torch.save({META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="was trained from moved, where there is no latent model now"):
        load_target(tmp_path / "own.ckpt")


def test_a_transformer_of_another_kind_is_named(folder: str, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    tiny_dit(out_channels=5).save_pretrained(str(copied / "transformer"), safe_serialization=True)
    with pytest.raises(ValueError, match=r"not a class-conditional DiT: .*'out_channels': 5"):
        load_target(copied)
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(ValueError, match="has as vae AutoencoderTiny, but a latent model needs AutoencoderKL"):
        load_target(copied)
