"""The surrogate: its loss by hand, its accuracy against Bayes' rule, and a checkpoint that answers alone."""

import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mem.cli import run
from lightning_mem.data import ArraySource, MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess
from lightning_mem.modules import DenoiserModule, SurrogateModule, load_classifier, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig
from lightning_mem.randomness import generator
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer

pytestmark = pytest.mark.usefixtures("no_curves")

TINY_SURROGATE = Path(__file__).parent.parent / "tiny_surrogate.yaml"
SMALL = ClassifierConfig(widths=(8,), blocks=(2,))


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run folder with an untrained denoiser of 8 x 8 grey images."""
    torch.manual_seed(0)
    process = DiffusionProcess("linear", num_timesteps=1000)
    module = DenoiserModule(network=UNetConfig((8,), norm_num_groups=4, mid_attention=False), process=process)
    meta = {"module": "DenoiserModule", "seed": 0, "step": 1, "members_digest": "", "num_members": 0}
    folder = tmp_path_factory.mktemp("parent") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)


# two Gaussians on either side of grey, apart by DISTANCE in all, each SPREAD wide in every pixel
DISTANCE, SPREAD = 1.2, 0.1


def gaussians(path: str, count: int = 700) -> MemorizationDataModule:
    """As many images of each class, one half members, the other held out."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).normal(size=(count, 8, 8, 1))
    x0 = (2 * labels - 1)[:, None, None, None] * DISTANCE / 2 / 8 + SPREAD * noise
    np.savez(path, arr_0=np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8), labels=labels)
    data = MemorizationDataModule(ArraySource(path), None, count // 2, 8, labels="true", batch_size=64)
    data.prepare_data()
    return data


def log_ratio(x_t: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
    """log p(1 | x_t) - log p(0 | x_t) of the two Gaussians, by Bayes' rule."""
    alpha_bar = process.alpha_bar[t]
    return alpha_bar.sqrt() * x_t.double().sum((1, 2, 3)) * DISTANCE / 8 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


def train(parent: str, data: MemorizationDataModule, steps: int, **options: object) -> SurrogateModule:
    options = {"network": SMALL, "seed": 0, **options}
    lr = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)  # noqa: E731
    module = SurrogateModule(parent, optimizer=lr, **options)
    trainer = MemorizationTrainer(
        max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        use_distributed_sampler=False, default_root_dir=f"run{steps}", logger=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module.eval()


@pytest.fixture(scope="session")
def taught(parent: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SurrogateModule, MemorizationDataModule]:
    """A surrogate trained until it knows two Gaussians."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("taught"))
        data = gaussians("two.npz")
        return train(parent, data, 120, bins=4), data


def bins_of(values: dict[str, Tensor], name: str) -> list[float]:
    return [float(values[f"val/{name}/t{low}-{low + 249}"]) for low in range(0, 1000, 250)]


def test_accuracy_per_timestep_bin_is_that_of_bayes_rule(taught) -> None:
    module, _ = taught
    alpha_bar = module.process.alpha_bar
    # the projection on the line between the means decides: Phi(half the distance in standard deviations)
    ratio = alpha_bar.sqrt() * DISTANCE / 2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar).sqrt()
    best = (0.5 * (1 + torch.erf(ratio / math.sqrt(2)))).reshape(4, 250).mean(1)
    assert best[0] > 0.85
    assert best[3] < 0.55
    found = torch.tensor(bins_of(module.trainer.callback_metrics, "accuracy"))
    error = (best * (1 - best) / 350).sqrt()
    assert (found - best).abs().max() < 0.04 + 3 * error.max()
    assert max(bins_of(module.trainer.callback_metrics, "calibration")) < 0.1


def test_it_knows_the_time_and_a_shifted_index_would_be_seen(taught) -> None:
    module, data = taught
    x0 = torch.cat([part.images for part in (data.heldout, data.members)]).float() / 127.5 - 1
    labels = torch.cat([data.heldout.labels, data.members.labels])

    def loss(t: int, told: int) -> tuple[float, float]:
        """Cross-entropy at noise t, told another timestep; and that of Bayes' rule."""
        rows = torch.full((len(x0),), t)
        eps = torch.randn(x0.shape, generator=generator(0, "test", t))
        x_t = module.process.add_noise(x0, eps, rows)
        with torch.no_grad():
            ours = torch.nn.functional.cross_entropy(module(x_t, torch.full_like(rows, told)), labels)
        truth = -torch.nn.functional.logsigmoid((2 * labels - 1) * log_ratio(x_t, rows, module.process)).mean()
        return float(ours), float(truth)

    for t in (20, 150, 400, 700):
        ours, truth = loss(t, t)
        assert ours < truth + 0.06
        assert ours < loss(t, (t + 400) % 1000)[0]
    assert loss(150, 550)[0] > loss(150, 150)[1] + 0.06


@pytest.mark.parametrize("time_dependent", [True, False])
def test_the_first_loss_is_the_formula_at_addressed_noise(parent: str, time_dependent: bool, monkeypatch) -> None:
    seen: dict[str, Tensor] = {}
    original = SurrogateModule.training_step

    def step(self: SurrogateModule, batch: dict, batch_idx: int) -> Tensor:
        network = deepcopy(self.classifier)
        loss = original(self, batch, batch_idx)
        seen.update(loss=loss.detach(), x0=batch["image"].clone(), labels=batch["label"].clone())
        if time_dependent:
            draw = generator(7, "train", 0)
            t = torch.randint(100, 300, (64,), generator=draw)
            eps = torch.randn(seen["x0"].shape, generator=draw)
            alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].float()
            signal = alpha_bar.reshape(-1, 1, 1, 1)
            logits = network(signal.sqrt() * seen["x0"] + (1 - signal).sqrt() * eps, t)
        else:
            logits = network(seen["x0"], torch.zeros(64, dtype=torch.int64))
        smooth = torch.full((64, 2), 0.1).scatter(1, seen["labels"][:, None], 0.9)
        seen.update(expected=-(smooth * logits.log_softmax(1)).sum(1).mean().detach())
        return loss

    monkeypatch.setattr(SurrogateModule, "training_step", step)
    options = {"time_dependent": time_dependent, "interval": (100, 300), "label_smoothing": 0.2, "seed": 7}
    module = train(parent, gaussians("two.npz"), 1, **options)
    torch.testing.assert_close(seen["loss"], seen["expected"], rtol=1e-5, atol=1e-6)
    assert module.bins[0][0] == 100
    assert module.bins[-1][1] == 300


def test_the_time_independent_one_learns_clean_images_and_ignores_t(parent: str) -> None:
    module = train(parent, gaussians("two.npz"), 30, time_dependent=False)
    values = module.trainer.callback_metrics
    clean = 0.5 * (1 + math.erf(DISTANCE / 2 / SPREAD / math.sqrt(2)))
    assert values["val/accuracy"] > clean - 0.02  # of clean images; its bins are of noised ones
    assert values["val/accuracy/t800-999"] < 0.6
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x, torch.tensor([0, 5, 9])), module(x, torch.tensor([999, 1, 400])))


def test_the_posterior_asks_for_the_hard_labels_in_expectation_and_is_let_go(parent: str, monkeypatch) -> None:
    asked: list[tuple[Tensor, ...]] = []
    original = SurrogateModule._wanted

    def wanted(self: SurrogateModule, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found = original(self, x_t, t, labels)
        asked.append((x_t, labels, found, torch.nn.functional.one_hot(labels, 5).float()))
        return found

    monkeypatch.setattr(SurrogateModule, "_wanted", wanted)
    data = options_of(classes=5, count=12, batch_size=256, flip=True)(Path("."))
    module = train(parent, data, 12, labels_as="posterior", interval=(400, 600))
    x_t, _, soft, hard = (torch.cat(part) for part in zip(*asked, strict=True))
    assert torch.allclose(soft.sum(1), torch.ones(len(soft)))
    assert 0.3 < soft.max(1).values.mean() < 0.95
    # what the gradient of the loss at x_t is made of: (softmax - wanted) times any function of x_t
    probes = torch.cat([torch.ones(len(x_t), 1), x_t.flatten(1)[:, ::9], soft], 1)
    gap = (soft - hard)[:, :, None] * probes[:, None]
    error = gap.std(0) / len(gap) ** 0.5
    assert (gap.mean(0).abs() / error).max() < 4.2
    wrong = (soft.roll(1, 1) - hard)[:, :, None] * probes[:, None]
    assert (wrong.mean(0).abs() / error).max() > 10
    assert module._exact is None


def test_calibration_is_the_expected_calibration_error_of_the_definition(parent: str) -> None:
    module = SurrogateModule(parent, network=SMALL, bins=1)
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 400)
    hit = (rng.uniform(size=400) < confidence**2).astype(float)
    values = torch.tensor(np.stack([np.zeros(400), hit, confidence], 1))
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert module._summary(values, "")["val/calibration/t0-999"] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="session")
def whole(parent: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny surrogate."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        options = ["--model.init_args.target", parent, "--trainer.default_root_dir", str(folder)]
        run(["fit", "--config", str(TINY_SURROGATE), *options])
    return folder


def test_a_checkpoint_alone_gives_the_frozen_classifier_in_both_weights(whole: Path, parent: str) -> None:
    best, file = whole / "checkpoints" / "best.ckpt", whole / "checkpoints" / "last.ckpt"
    assert load_classifier(best).step in (5, 10)
    assert load_classifier(whole).digest == load_classifier(best).digest  # the lowest val/loss
    ema, raw = load_classifier(file), load_classifier(file, "raw")
    assert (ema.weights, raw.weights, ema.step, ema.num_classes, ema.shape) == ("ema", "raw", 12, 10, (1, 8, 8))
    assert ema.target_digest == load_target(parent).digest
    assert ema.process.digest == load_target(parent).process.digest
    assert ema.pseudo_labels == {}
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999])
    assert ema(x, t).dtype == torch.float32
    assert not torch.equal(ema(x, t), raw(x, t))
    assert ema.digest != raw.digest
    assert ema.digest == load_classifier(file).digest
    assert not ema.module.training
    x.requires_grad_()
    ema(x, t).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in ema.module.parameters())
    with pytest.raises(ValueError, match=r"works on images \(1, 8, 8\), got \(3, 8, 8\)"):
        ema(torch.zeros(1, 3, 8, 8), t[:1])
    with pytest.raises(ValueError, match="is a checkpoint of SurrogateModule, not of DenoiserModule"):
        load_target(whole)
    with pytest.raises(ValueError, match="is a checkpoint of DenoiserModule, not of SurrogateModule"):
        load_classifier(Path(parent))


def test_two_parts_equal_one_run(fit, whole: Path, parent: str) -> None:
    target = ["--model.init_args.target", parent]
    part = fit("part/run", *target, "--trainer.max_steps", "7", config=TINY_SURROGATE)
    fit("part/run", *target, "--ckpt_path", "last", config=TINY_SURROGATE)
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, part))
    for name in ("state_dict", "current_model_state"):
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(value, other[name][key]) for key, value in one[name].items())
    for name in ("metrics.csv", "members.json"):
        assert (whole / name).read_text() == (part / name).read_text()
    counted = [[(r.name, r.value, r.step, r.weights) for r in read_records(f / "results.jsonl")] for f in (whole, part)]
    assert counted[0] == counted[1]


def test_a_run_leaves_its_accuracies_as_records_and_in_its_summary(whole: Path) -> None:
    records = {(r.name, r.step): r for r in read_records(whole / "results.jsonl")}
    assert len(records) == 2 * 2 * 5
    last = records["val/accuracy/t0-199", 10]
    assert (last.n, last.weights, last.definition["images"]) == (100, "ema", "heldout")
    assert last.low < last.value < last.high
    assert records["val/accuracy_members/t800-999", 10].n == 60
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == 12
    assert summary["validation"]["val/accuracy/t0-199"] == pytest.approx(last.value)
    assert "memorization" not in json.dumps(summary["open"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("interval", (0, 500), r"trained with interval \[0, 1000\], but this run has \[0, 500\]"),
        ("num_classes", 2, "trained with num_classes 10, but this run has 2"),
        ("target_digest", "0123", "target_digest .*, but this run has 0123"),
        ("pseudo_labels", {"tau": 0.5}, r"pseudo_labels {}, but this run has {'tau': 0.5}"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(whole: Path, parent: str, name: str, value, message: str) -> None:
    module = SurrogateModule(parent, network=ClassifierConfig(widths=(8, 16), blocks=(1, 1), dropout=0.1))
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    assert module.num_classes == 10  # without data the checkpoint says it
    setattr(module, name, value)
    with pytest.raises(ValueError, match=message):
        module.on_load_checkpoint(checkpoint)


class Told(ArraySource):
    """A labelled file that says where it came from."""

    origin: dict = {}  # noqa: RUF012

    def provenance(self) -> dict:
        return self.origin


def options_of(labels: str = "true", **options: object) -> Callable[[Path], MemorizationDataModule]:
    def build(path: Path) -> MemorizationDataModule:
        rng = np.random.default_rng(0)
        count = options.pop("count", 20)
        images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        np.savez(path / "x.npz", arr_0=images, labels=np.arange(count) % options.pop("classes", 4))
        source = Told(str(path / "x.npz"))
        source.origin = options.pop("origin", {})
        return MemorizationDataModule(source, None, 4, options.pop("size", 8), labels=labels, **options)

    return build


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (options_of("none"), "a classifier needs labels, but data.labels is none: choose true"),
        (options_of(classes=1), "at least two classes, but array:x.npz has 1"),
        (
            options_of(size=16),
            r"\(1, 8, 8\), but the data give \(1, 16, 16\): set data.channels 1 and data.image_size 8",
        ),
        (options_of(origin={"target_digest": "0123"}), "were drawn from the target 0123, but model.init_args.target"),
    ],
)
def test_data_that_do_not_fit_are_refused(parent: str, tmp_path: Path, data: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(parent, data(tmp_path), 1)


def test_labels_drawn_from_the_target_are_remembered(parent: str, tmp_path: Path) -> None:
    origin = {"target_digest": load_target(parent).digest, "num_clusters": 100, "tau": 0.5}
    module = train(parent, options_of(origin=origin, batch_size=4)(tmp_path), 1)
    assert load_classifier(module.trainer.default_root_dir).pseudo_labels == origin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"labels_as": "posterior", "time_dependent": False}, "posterior at a timestep: use hard"),
        ({"interval": (500, 1001)}, r"0 <= low < high <= 1000, got \[500, 1001\)"),
        ({"interval": (500, 500)}, "low < high"),
        ({"interval": (0, 3), "bins": 4}, r"bins must lie in \[1, 3\]"),
        ({"target": "nowhere"}, "diffusers folder .* or a hub id, got 'nowhere'"),
    ],
)
def test_settings_out_of_range_are_refused(parent: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurrogateModule(**{"target": parent, **options})
