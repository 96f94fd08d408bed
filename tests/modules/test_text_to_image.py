"""A Stable-Diffusion-type folder is a target: its samples are diffusers' own, its latents are what classifiers see."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from stable_diffusion import SCHEDULE, save_pipeline, tiny_pipeline

from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, sample, sample_x0
from lightning_mem.modules import DenoiserModule, RandomLabelModule, SurrogateModule, load_target
from lightning_mem.modules.base import META
from lightning_mem.modules.latents import LatentCache
from lightning_mem.networks import UNetConfig, build_unet
from lightning_mem.randomness import generator
from lightning_mem.records import read_records
from lightning_mem.types import to_float, to_uint8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "sd")


@pytest.mark.parametrize("cfg_weight", [1.0, 7.5])
def test_latents_are_those_of_the_pipeline_bit_for_bit(folder: str, cfg_weight: float) -> None:
    pipeline, target = tiny_pipeline(), load_target(folder, cfg_weight=cfg_weight)

    def theirs(output: str) -> torch.Tensor:
        noise = [generator(3, "sample", i) for i in range(4)]
        given = {"generator": noise, "num_images_per_prompt": 4, "num_inference_steps": 4, "output_type": output}
        return pipeline("a cat", guidance_scale=cfg_weight, **given).images

    assert target.conditioner is not None
    given = {"seed": 3, "num_steps": 4, "condition": target.conditioner(["a cat"] * 4), "block": 4}
    assert torch.equal(sample_x0(target, range(4), **given), theirs("latent"))
    assert torch.equal(sample(target, range(4), **given), to_uint8(theirs("pt") * 2 - 1))


def test_each_sample_has_its_own_prompt_and_none_means_the_empty_one(folder: str) -> None:
    target = load_target(folder, cfg_weight=3.0)
    prompts = target.conditioner(["a cat", "", "a dog"])
    given = {"seed": 0, "num_steps": 3, "block": 4}
    drawn = sample_x0(target, range(3), condition=prompts, **given)
    dog = sample_x0(target, [2], condition=target.conditioner(["a dog"]), **given)
    torch.testing.assert_close(drawn[2:], dog, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn[1:2], sample_x0(target, [1], **given), rtol=0, atol=1e-5)
    assert (drawn[:1] - sample_x0(target, [0], **given)).abs().max() > 1e-3


def test_the_weight_counts_from_the_empty_prompt(folder: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([500, 20])
    plain, guided = load_target(folder).denoiser, load_target(folder, cfg_weight=4.0).denoiser
    prompts = load_target(folder).conditioner(["a cat", "a dog"])
    with torch.no_grad():
        without, given = plain(x, t), plain(x, t, prompts)
        torch.testing.assert_close(guided(x, t, prompts), without + 4 * (given - without), rtol=0, atol=1e-5)
        assert torch.equal(guided(x, t), without)


def test_equal_digests_mean_equal_samples(folder: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert load_target(other).digest == load_target(folder).digest != load_target(folder, cfg_weight=2.0).digest
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    assert load_target(other).digest != load_target(folder).digest


def test_latents_are_not_clipped_where_the_scheduler_knows_no_clipping(tmp_path: Path) -> None:
    schedule = {key: value for key, value in SCHEDULE.items() if key != "clip_sample"}
    pipeline = tiny_pipeline(PNDMScheduler(skip_prk_steps=True, **schedule))
    pipeline.save_pretrained(str(tmp_path / "pndm"))
    target = load_target(tmp_path / "pndm")
    assert target.process.scheduler("ddim", 5).config.clip_sample is False
    assert float(sample_x0(target, [0], seed=0, num_steps=2, block=4).abs().max()) > 1.5


def without_part(folder: str, place: Path, part: str, value: list[str | None]) -> Path:
    copied = Path(shutil.copytree(folder, place))
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, part: value}))
    return copied


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("vae", [None, None], "has as vae nothing, but a latent model needs AutoencoderKL"),
        ("vae", ["diffusers", "VQModel"], "has as vae VQModel"),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"], "flow matching, which is not built yet"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "legal are CLIPTokenizer and CLIPTextModel"),
    ],
)
def test_a_pipeline_without_the_piece_says_which(
    folder: str, tmp_path: Path, part: str, value: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(without_part(folder, tmp_path / "copy", part, value))


def test_without_a_text_encoder_embeddings_are_given(folder: str, tmp_path: Path) -> None:
    bare = without_part(folder, tmp_path / "bare", "text_encoder", [None, None])
    target = load_target(bare)
    assert target.conditioner is None
    prompts = load_target(folder).conditioner(["a cat"])
    given = {"seed": 0, "num_steps": 2, "block": 4}
    expected = sample_x0(load_target(folder), [0], condition=prompts, **given)
    assert torch.equal(sample_x0(target, [0], condition=prompts, **given), expected)
    with pytest.raises(ValueError, match="has no text encoder: pass condition="):
        sample_x0(target, [0], **given)
    with pytest.raises(ValueError, match="takes prompt embeddings, not labels"):
        sample_x0(target, [0], condition=torch.zeros(1, dtype=torch.int64), **given)
    with pytest.raises(ValueError, match="needs the embedding of the empty prompt"):
        load_target(bare, cfg_weight=2.0)


def test_a_prompt_is_no_list(folder: str) -> None:
    with pytest.raises(ValueError, match="one a sample, got the text 'a cat'"):
        load_target(folder).conditioner("a cat")


def test_a_classifier_is_trained_on_the_latents_of_both_orientations(folder: str) -> None:
    module, codec = RandomLabelModule(folder), load_target(folder).codec
    images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index, mirrored = torch.tensor([4, 9, 4, 9, 7]), torch.tensor([False, False, True, False, True])
    x = to_float(images[torch.tensor([0, 1, 0, 1, 2])])
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    batch = {"image": x, "index": index, "mirrored": mirrored}
    for _ in range(2):  # encoded, then remembered
        assert torch.equal(module.clean(batch), codec.encode(x))
    assert module.pixel_shape == (3, 16, 16)
    assert (module.shape, module.state_dict()) == ((4, 8, 8), {})


def test_images_are_encoded_once_while_there_is_room() -> None:
    seen: list[int] = []

    class Doubling:
        name = "doubling"

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return 2 * images

        def decode(self, x0: torch.Tensor) -> torch.Tensor:
            return x0 / 2

        def pixel_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
            return shape

    x = torch.arange(4.0).reshape(4, 1, 1, 1)
    cache = LatentCache(Doubling())
    rows = torch.tensor([0, 2, 2, 3])
    assert torch.equal(cache(x[rows], rows.tolist()), 2 * x[rows])
    assert torch.equal(cache(x, range(4)), 2 * x)
    assert seen == [3, 1]
    cache.clear()
    cache(x, range(4))
    assert seen == [3, 1, 4]
    small = LatentCache(Doubling(), capacity=8)  # two floats
    for _ in range(2):
        assert torch.equal(small(x, range(4)), 2 * x)
    assert seen[-2:] == [4, 2]


def test_a_posterior_over_pixels_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="closed-form over pixels"):
        SurrogateModule(folder, labels_as="posterior")


def test_a_loader_says_which_images_are_mirrored() -> None:
    data = MemorizationDataModule(num_members=20, num_heldout=4, batch_size=20, flip=True)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    place = {int(index): row for row, index in enumerate(data.members.indices)}
    original = to_float(data.members.images[[place[int(index)] for index in batch["index"]]])
    assert 0 < int(batch["mirrored"].sum()) < 20
    expected = torch.where(batch["mirrored"][:, None, None, None], original.flip(-1), original)
    assert torch.equal(batch["image"], expected)


def tuned(folder: str, fit, tmp_path: Path, *options: str) -> Path:
    """The tiny run of digits in colour at 16 x 16, from this pipeline."""
    text = (Path(__file__).parent.parent / "tiny.yaml").read_text()
    head, tail = text.index("    network:"), text.index("    optimizer:")
    config = tmp_path / "tuned.yaml"
    cheaper = text[tail:].replace("num_samples: 70", "num_samples: 32").replace("raw: true", "raw: false")
    config.write_text(text[:head] + f"    pretrained: {folder}\n" + cheaper)
    given = ["--data.image_size", "16", "--data.channels", "3", "--trainer.max_steps", "2", *options]
    given += ["--trainer.val_check_interval", "2", "--trainer.callbacks.init_args.monitor", "val/loss"]
    return fit("tuned", *given, config=config)


@pytest.mark.slow
def test_a_text_to_image_model_is_fine_tuned_and_measured(folder: str, fit, tmp_path: Path) -> None:
    run = tuned(folder, fit, tmp_path)
    assert {"frechet/pixels/heldout", "memorization/ratio"} <= {r.name for r in read_records(run / "results.jsonl")}
    target, base = load_target(run), load_target(folder)
    assert (target.weights, target.shape, target.codec.digest) == ("ema", (4, 8, 8), base.codec.digest)
    assert target.digest not in (base.digest, load_target(run, "raw").digest)
    given = {"seed": 0, "num_steps": 3, "block": 4, "condition": target.conditioner(["a cat"])}
    assert (sample_x0(target, [0], **given) - sample_x0(base, [0], **given)).abs().max() > 1e-3


def checkpoint(folder: str | Path, file: Path) -> Path:
    """Of a network that training has moved."""
    module = DenoiserModule.from_diffusers(folder)
    for value in module.unet.parameters():
        value.data.mul_(1.1)
    meta = {"module": "DenoiserModule", "seed": 0, "step": 1, "members_digest": "", "num_members": 0}
    torch.save({META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}, file)
    return file


def test_a_fine_tuned_model_is_read_with_its_base_and_exported(folder: str, tmp_path: Path) -> None:
    file = checkpoint(folder, tmp_path / "own.ckpt")
    target = load_target(file)
    given = {"seed": 0, "num_steps": 3, "block": 4, "condition": target.conditioner(["a cat"])}
    drawn = sample_x0(target, [0], **given)
    assert (drawn - sample_x0(load_target(folder), [0], **given)).abs().max() > 1e-3
    exported = DenoiserModule.from_checkpoint(file).to_diffusers("exported")
    assert torch.equal(sample_x0(DenoiserModule.from_diffusers(exported), [0], **given), drawn)
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat", generator=[generator(0, "sample", 0)], num_inference_steps=3, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-5)


def test_the_loss_is_that_of_latents_under_the_empty_prompt(folder: str) -> None:
    module, base = DenoiserModule.from_diffusers(folder), load_target(folder)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 300, 999])
    batch = {"image": x, "index": torch.arange(3), "mirrored": torch.zeros(3, dtype=torch.bool)}
    found = module._loss(module.clean(batch), eps, t, None)
    alpha_bar = base.process.alpha_bar[t].reshape(3, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * base.codec.encode(x) + (1 - alpha_bar).sqrt() * eps).float()
    states = base.conditioner(["", "", ""])["encoder_hidden_states"]
    with torch.no_grad():
        output = base.denoiser.module(x_t, t, states).sample
    torch.testing.assert_close(found, (output - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in module.unet.parameters())


def test_a_base_that_has_changed_is_refused(folder: str, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    checkpoint(own, tmp_path / "own.ckpt")
    assert load_target(tmp_path / "own.ckpt").digest != load_target(own).digest
    config = json.loads((own / "vae" / "config.json").read_text())
    (own / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    with pytest.raises(ValueError, match="put the model it started from back in its place"):
        load_target(tmp_path / "own.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"channels": 1}, "has channels 3, but the data give 1"), ({"image_size": 8}, "has image_size 16, but the data")],
)
def test_sizes_are_those_of_the_images_not_of_the_latents(folder: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserModule.from_diffusers(folder, **change)


def test_a_class_conditional_pipeline_draws_its_classes(tmp_path: Path) -> None:
    process = DiffusionProcess("linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(UNetConfig((8,), norm_num_groups=4, mid_attention=False), 8, 1, num_classes=3).eval()
    DDIMPipeline(unet, process.scheduler("ddim", 4)).save_pretrained(str(tmp_path / "classes"))
    module = DenoiserModule.from_diffusers(tmp_path / "classes")
    assert module.num_classes == 3
    labels = torch.tensor([0, 2, 1, 2])
    x = torch.stack([torch.randn(1, 8, 8, generator=generator(0, "sample", i)) for i in range(4)])
    scheduler = DDIMScheduler.from_config(process.config)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    drawn = sample_x0(module, range(4), seed=0, num_steps=4, condition=labels, block=4)
    assert torch.equal(drawn, x)
    assert torch.equal(sample_x0(load_target(tmp_path / "classes"), range(4), seed=0, num_steps=4, condition=labels,
                                 block=4), x)  # fmt: skip
    with pytest.raises(ValueError, match="cfg_weight 2.0 is for latent models, and .*classes is none"):
        load_target(tmp_path / "classes", cfg_weight=2.0)
