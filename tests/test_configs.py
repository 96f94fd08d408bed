"""Every shipped configuration parses through the real command line, and every run of them trains."""

import contextlib
import csv
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from stable_diffusion import save_pipeline, tiny_pipeline

from lightning_mem.cli import MemorizationCLI, run
from lightning_mem.defenses import CPSample, protected_pipeline
from lightning_mem.defenses.certificates import final_confidence
from lightning_mem.modules import DenoiserModule, load_classifier, load_random_label, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig, build_classifier

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
SURROGATES = sorted(CONFIGS.glob("*/surrogate.yaml"))
LATENT = CONFIGS / "stable_diffusion" / "random_label.yaml"
RANDOM_LABELS = sorted(set(CONFIGS.glob("*/random_label.yaml")) - {LATENT})
RUNS = sorted(set(CONFIGS.glob("*/*.yaml")) - set(OVERLAYS) - set(SURROGATES) - set(RANDOM_LABELS) - {LATENT})
DIGITS = CONFIGS / "digits" / "denoiser.yaml"
DEBUG = CONFIGS / "overlays" / "debug.yaml"
DEBUG_CLASSIFIER, GPU = CONFIGS / "overlays" / "debug_classifier.yaml", CONFIGS / "overlays" / "gpu.yaml"
STOP = CONFIGS / "overlays" / "stop_before_memorizing.yaml"
EVALUATION, BEST = "lightning_mem.callbacks.SampleEvaluation", "lightning.pytorch.callbacks.ModelCheckpoint"

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false"]
SMALL = ["--model.init_args.network.block_out_channels", "[8,8]", "--model.init_args.network.norm_num_groups", "4"]
SMALL += ["--model.init_args.network.attention_levels", "[1]", "--model.init_args.network.attention_head_dim", "8"]
SHRUNK = ["--data.image_size", "16"]
FEW = ["--data.num_members", "8", "--data.num_heldout", "6", "--data.batch_size", "4"]
FEW += ["--data.steps_per_epoch", "10"]


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@functools.cache
def parsed(*files: Path, options: tuple[str, ...] = ()) -> dict:
    """What the command line makes of these files, all defaults filled in."""
    given = [part for file in files for part in ("--config", str(file))]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        run(["fit", *given, *options, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


def classes(config: dict) -> list[str]:
    return [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Different colour images as files."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = [f"{i:06d}.png" for i in range(count)]
    for file in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / file)
    return names


def cifar10(root: Path) -> list[str]:
    """The binary version: per record one label, then 3072 pixels."""
    folder, rng = root / "cifar-10-batches-bin", np.random.default_rng(0)
    folder.mkdir()
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{file}.bin").write_bytes(records.tobytes())
    return ["--data.source.init_args.root", str(root)]


def celeba(root: Path) -> list[str]:
    """Images of 178 x 218 and the partition; one in five is not of the training split."""
    files = write_images(root / "celeba" / "img_align_celeba", 20, (178, 218))
    lines = [f"{file} {int(i % 5 == 4)}\n" for i, file in enumerate(files)]
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(lines))
    return ["--data.source.init_args.root", str(root)]


def folder(root: Path) -> list[str]:
    write_images(root / "mine", 16, (70, 66))
    return ["--data.source.init_args.path", str(root / "mine")]


def pipeline(root: Path) -> list[str]:
    """A tiny pipeline of another schedule, as an author would have saved it."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(num_train_timesteps=100)
    DDPMPipeline(unet, scheduler).save_pretrained(str(root / "theirs"), safe_serialization=True)
    return ["--model.init_args.pretrained", str(root / "theirs")]


MATERIAL = {
    "digits/denoiser": lambda root: SMALL,
    "cifar10/denoiser": lambda root: [*SMALL, *SHRUNK, *cifar10(root)],
    "celeba/denoiser": lambda root: [*SMALL, *SHRUNK, *celeba(root)],
    "folder/denoiser": lambda root: [*SMALL, *SHRUNK, *folder(root)],
    "folder/finetune": lambda root: [*SHRUNK, *folder(root), *pipeline(root)],
}
"""Tiny data in the true format, written into a folder, and the options that point there and shrink the network."""


@pytest.mark.parametrize("file", [*RUNS, *SURROGATES, *RANDOM_LABELS, LATENT], ids=name)
def test_a_run_parses_says_what_it_answers_and_names_its_folder(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    assert "?" in text.splitlines()[0]
    config, written = parsed(file), yaml.safe_load(text)
    assert config["weights_only"] is True
    assert config["ckpt_path"] is None
    assert {"weights_only", "ckpt_path"} <= written.keys()
    assert Path(written["trainer"]["default_root_dir"]).parent == Path("runs")
    assert written["trainer"]["logger"]["init_args"]["offline"] is True
    assert config["data"]["num_heldout"] > 0


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_a_denoiser_is_measured_and_its_best_is_the_nearest_to_unseen_images(file: Path) -> None:
    config = parsed(file)
    assert classes(config) == ["EMA", "SampleEvaluation", "Gallery", "ModelCheckpoint"]
    by_class = dict(zip(classes(config), config["trainer"]["callbacks"], strict=True))
    best, evaluation = (by_class[k]["init_args"] for k in ("ModelCheckpoint", "SampleEvaluation"))
    assert (best["monitor"], best["mode"]) == (f"frechet/{evaluation['extractors'][0]}/heldout", "min")


@pytest.mark.parametrize("file", SURROGATES, ids=name)
def test_a_surrogate_names_one_target_stops_early_and_takes_the_gpu_overlay(file: Path) -> None:
    config = parsed(file, GPU)
    assert config["model"]["init_args"]["target"] == config["data"]["source"]["init_args"]["target"]
    assert config["model"]["init_args"]["compile"] is True
    denoiser = yaml.safe_load((file.parent / "denoiser.yaml").read_text())
    assert config["model"]["init_args"]["target"] == denoiser["trainer"]["default_root_dir"]
    assert [config["data"][k] for k in ("image_size", "channels")] == [
        denoiser["data"][k] for k in ("image_size", "channels")
    ]
    assert classes(config)[-3:] == ["ClassifierRecords", "EarlyStopping", "ModelCheckpoint"]
    for callback in config["trainer"]["callbacks"][-2:]:
        assert (callback["init_args"]["monitor"], callback["init_args"]["mode"]) == ("val/loss", "min")
    network = config["model"]["init_args"]["network"]
    with torch.device("meta"):
        sizes = (config["data"]["image_size"], config["data"]["channels"])
        build_classifier(ClassifierConfig(**network), *sizes, num_classes=100)


@pytest.mark.parametrize("file", [f for f in SURROGATES if f.parent.name != "digits"], ids=name)
def test_a_surrogate_at_the_papers_settings_has_its_numbers(file: Path) -> None:
    config = parsed(file)
    source, model = config["data"]["source"]["init_args"], config["model"]["init_args"]
    stated = {"num_clusters": 100, "tau": 0.5, "extractor": "sscd", "dropped": "relabel"}
    assert {k: source[k] for k in stated} == stated
    assert (model["network"]["backbone"], model["labels_as"], model["time_dependent"]) == ("resnet34", "hard", True)
    assert (model["optimizer"]["init_args"]["lr"], config["data"]["batch_size"]) == (1e-4, 64)
    members = source["num_images"] - config["data"]["num_heldout"]
    assert members == 10_000
    assert config["trainer"]["max_steps"] == 20 * -(-members // 64)


@pytest.mark.parametrize("file", RANDOM_LABELS, ids=name)
def test_a_random_label_run_protects_the_members_of_its_denoiser_and_stops_when_it_knows_them(file: Path) -> None:
    config, denoiser = parsed(file), parsed(file.with_name("denoiser.yaml"))
    assert config["model"]["init_args"]["target"] == denoiser["trainer"]["default_root_dir"]
    free = {"batch_size", "steps_per_epoch"}  # all else decides the members, or how they are shown
    assert changed(denoiser["data"], config["data"]) <= free
    assert classes(config) == ["EMA", "ClassifierRecords", "EarlyStopping"]
    stop = config["trainer"]["callbacks"][-1]["init_args"]
    assert (stop["monitor"], stop["mode"], stop["stopping_threshold"]) == ("val/memorized", "max", 0.5)
    assert config["trainer"]["max_steps"] / config["trainer"]["val_check_interval"] < stop["patience"]
    model = config["model"]["init_args"]
    assert model["optimizer"]["init_args"]["weight_decay"] == model["network"]["dropout"] == 0
    if file.parent.name != "digits":  # the paper's figure 1; the backbone of the surrogate beside it
        assert model["tol"] == 0.001
        assert model["network"] == parsed(file.with_name("surrogate.yaml"))["model"]["init_args"]["network"]


def test_a_random_label_run_takes_the_gpu_overlay() -> None:
    assert parsed(RANDOM_LABELS[0], GPU)["model"]["init_args"]["compile"] is True


def test_run_folders_are_told_apart() -> None:
    folders = [
        yaml.safe_load(f.read_text())["trainer"]["default_root_dir"]
        for f in [*RUNS, *SURROGATES, *RANDOM_LABELS, LATENT]
    ]
    assert len(set(folders)) == len(folders)


def changed(old: object, new: object, where: str = "") -> set[str]:
    """Keys whose value differs; lists are compared as a whole."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return {key for k in old for key in changed(old[k], new[k], f"{where}.{k}".lstrip("."))}
    return set() if old == new else {where}


CHANGES = {
    "ddp": {"trainer.devices", "trainer.strategy"},
    "gpu": {"model.init_args.compile", "model.init_args.channels_last", "trainer.accelerator", "trainer.precision"},
    "wandb": {"trainer.logger.init_args.offline"},
    "stop_before_memorizing": {"trainer.callbacks"},
    "debug": {
        "data.batch_size",
        *(f"trainer.{k}" for k in ("default_root_dir", "max_steps", "val_check_interval", "limit_val_batches")),
        *(f"trainer.{k}" for k in ("log_every_n_steps", "logger", "callbacks")),
    },
}


CHANGES["debug_classifier"] = CHANGES["debug"]


@pytest.mark.parametrize("file", OVERLAYS, ids=name)
def test_an_overlay_changes_what_it_says_and_nothing_else(file: Path) -> None:
    laid_over = DIGITS.with_name("surrogate.yaml") if file == DEBUG_CLASSIFIER else DIGITS
    plain, laid = parsed(laid_over), parsed(laid_over, file)
    assert changed(plain, laid) == CHANGES[file.stem]
    assert file.read_text().startswith("# ")


def test_the_stopping_overlay_keeps_the_callbacks_of_the_run() -> None:
    plain, laid = (parsed(*files)["trainer"]["callbacks"] for files in ([DIGITS], [DIGITS, STOP]))
    assert laid[:-1] == plain
    assert laid[-1]["class_path"].endswith("EarlyStopping")


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_every_run_trains_under_the_debug_overlay(file: Path, tmp_path: Path) -> None:
    options = MATERIAL[name(file)](tmp_path)
    command = run(["fit", "--config", str(file), "--config", str(DEBUG), *QUIET, *FEW, *options])
    assert command.trainer.global_step == 4
    folder = Path("runs/debug")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["memorization/ratio"]] == ["2", "4"]
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert (folder / "images" / "pairs_step000004.png").is_file()
    assert (folder / "images" / "curves.png").stat().st_size > 5000
    assert json.loads((folder / "summary.json").read_text())["step"] == 4


class TinyCopies(torch.nn.Module):
    """Stands in for SSCD, whose file is not here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def target(root: Path, size: int, channels: int) -> str:
    """A run folder with an untrained denoiser."""
    torch.manual_seed(0)
    module = DenoiserModule(size, channels, network=UNetConfig((8,), norm_num_groups=4, mid_attention=False))
    meta = {"module": "DenoiserModule", "seed": 0, "step": 1, "members_digest": "", "num_members": 0}
    (root / "target" / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, root / "target" / "checkpoints" / "last.ckpt")
    return str(root / "target")


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
@pytest.mark.parametrize("file", SURROGATES, ids=name)
def test_every_surrogate_draws_labels_and_trains_under_its_debug_overlay(file: Path, tmp_path: Path) -> None:
    data = parsed(file)["data"]
    path = target(tmp_path, data["image_size"], data["channels"])
    options = ["--model.init_args.target", path, "--data.source.init_args.target", path, *QUIET]
    if data["source"]["init_args"]["extractor"] == "sscd":
        torch.jit.save(torch.jit.script(TinyCopies().eval()), tmp_path / "sscd.pt")
        options += ["--data.source.init_args.extractor_weights", str(tmp_path / "sscd.pt")]
        options += ["--model.init_args.network.backbone", "small", "--model.init_args.network.widths", "[8,16]"]
    few = {"num_images": 40, "num_clusters": 4, "num_steps": 2, "min_size": 1}
    options += [part for k, v in few.items() for part in (f"--data.source.init_args.{k}", str(v))]
    options += ["--data.num_heldout", "8", "--data.batch_size", "4"]
    command = run(["fit", "--config", str(file), "--config", str(DEBUG_CLASSIFIER), *options])
    assert command.trainer.global_step == 4
    classifier = load_classifier("runs/debug_classifier")
    assert 2 <= classifier.num_classes <= 5
    assert classifier.pseudo_labels["num_clusters"] == 4
    assert classifier.target_digest == classifier.pseudo_labels["target_digest"] == load_target(path).digest


@pytest.mark.parametrize("file", RANDOM_LABELS, ids=name)
def test_every_random_label_run_trains_under_its_debug_overlay(file: Path, tmp_path: Path) -> None:
    write, size = {"cifar10": (cifar10, 16), "celeba": (celeba, 16), "digits": (lambda root: [], 8)}[file.parent.name]
    channels = parsed(file)["data"]["channels"]
    options = ["--model.init_args.target", target(tmp_path, size, channels), *QUIET, *FEW, *write(tmp_path)]
    options += ["--data.image_size", str(size)]
    options += ["--model.init_args.network.backbone", "small", "--model.init_args.network.widths", "[8,16]"]
    command = run(["fit", "--config", str(file), "--config", str(DEBUG_CLASSIFIER), *options])
    assert command.trainer.global_step == 4
    classifier = load_random_label("runs/debug_classifier")
    assert (classifier.labels.bits.reshape(8, -1).sum(0) == 4).all()  # half of the 8 members, in each labeling
    members = json.loads(Path("runs/debug_classifier/members.json").read_text())["members"]
    assert (classifier.members_digest, list(classifier.labels.digests)) == (members["digest"], members["digests"])


def test_the_random_label_run_of_stable_diffusion_is_celebas_on_latents() -> None:
    own, celeba = parsed(LATENT), parsed(CONFIGS / "celeba" / "random_label.yaml")
    assert changed(celeba["model"], own["model"]) == {"init_args.target"}
    assert changed(celeba["trainer"], own["trainer"]) <= {"default_root_dir", "max_steps", "val_check_interval"}
    assert own["data"]["image_size"] == 512


def test_a_stable_diffusion_folder_is_protected_by_a_classifier_of_its_latents(tmp_path: Path) -> None:
    path = save_pipeline(tmp_path / "sd")
    options = ["--model.init_args.target", path, *QUIET, *FEW, *SHRUNK, *folder(tmp_path), "--data.flip", "true"]
    options += ["--model.init_args.network.backbone", "small", "--model.init_args.network.widths", "[8,16]"]
    options += ["--model.init_args.network.stem", "small"]
    command = run(["fit", "--config", str(LATENT), "--config", str(DEBUG_CLASSIFIER), *options])
    assert command.trainer.global_step == 4
    classifier, sd = load_random_label("runs/debug_classifier"), load_target(path)
    assert (classifier.shape, classifier.target_digest) == (sd.shape, sd.digest) == ((4, 8, 8), sd.digest)
    pipeline, term = tiny_pipeline(), CPSample(classifier, tol=0.5, scale=5.0)
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    noise = torch.randn(2, *sd.shape, generator=torch.Generator().manual_seed(0))
    plain = pipeline(["a cat", "a dog"], latents=noise, **given).images
    with protected_pipeline(pipeline, [term]):
        found = pipeline(["a cat", "a dog"], latents=noise, **given).images
    assert found.shape == (2, 3, 16, 16)
    assert term.evaluations == 6
    assert (found - plain).abs().max() > 1e-3
    images = (found * 255).round().to(torch.uint8)
    assert final_confidence(classifier, images, sd.codec).shape == (2,)


def callbacks(**evaluation: object) -> list[str]:
    """The run's list, replaced by cheap ones; before a second --config, so that an overlay can append to it."""
    chosen = [
        {"class_path": EVALUATION, "init_args": {"num_samples": 64, "num_steps": 2, **evaluation}},
        {"class_path": BEST, "init_args": {"filename": "best", "monitor": "frechet/pixels/heldout"}},
    ]
    return ["--trainer.callbacks", json.dumps(chosen)]


def train_digits(folder: str, *options: str, **evaluation: object) -> MemorizationCLI:
    shrunk = [*QUIET, *SMALL, *FEW, "--trainer.logger", "true", "--trainer.default_root_dir", folder]
    shrunk += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "1"]
    return run(["fit", "--config", str(DIGITS), *callbacks(**evaluation), *options, *shrunk])


# at threshold 0.999 nearly every sample is nearer to one of eight digits than to the next: copies from the first step
def test_the_stopping_overlay_stops_and_without_it_nothing_does() -> None:
    stopped = train_digits("with", "--config", str(STOP), threshold=0.999)
    ratio = stopped.trainer.callback_metrics["memorization/ratio_low"]
    assert ratio > 0.05
    assert stopped.trainer.global_step == 1
    assert stopped.trainer.early_stopping_callback.stopping_reason_message.startswith("Stopping threshold reached")
    assert Path("with/checkpoints/best.ckpt").is_file()
    assert Path("with/summary.json").is_file()
    assert train_digits("without", threshold=0.999).trainer.global_step == 4


def test_the_stopping_overlay_does_not_stop_a_run_that_copies_nothing() -> None:
    command = train_digits("run", "--config", str(STOP), threshold=0.01)
    assert command.trainer.callback_metrics["memorization/ratio_low"] == 0
    assert command.trainer.global_step == 4


def test_the_stopping_overlay_bears_validations_that_are_not_measured() -> None:
    command = train_digits("run", "--config", str(STOP), threshold=0.01, log_spaced=2)
    assert command.trainer.global_step == 4


def test_an_option_behind_the_files_reaches_the_last_callback() -> None:
    option = "--trainer.callbacks.init_args.stopping_threshold"
    found = parsed(DIGITS, STOP, options=(option, "0.2"))["trainer"]["callbacks"]
    assert found[:-1] == parsed(DIGITS)["trainer"]["callbacks"]
    assert found[-1]["init_args"]["stopping_threshold"] == 0.2
