"""The callback measures the averaged weights in any order, from the same noise, without touching training."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_mem.callbacks import EMA, SampleEvaluation
from lightning_mem.cli import run
from lightning_mem.data import MemorizationDataModule
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser, Target
from lightning_mem.evaluation import Reference
from lightning_mem.modules import DenoiserModule
from lightning_mem.networks import UNetConfig
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def data() -> MemorizationDataModule:
    module = MemorizationDataModule(num_members=30, num_heldout=40, batch_size=10)
    module.setup()
    return module


def train(data: MemorizationDataModule, folder: str, callbacks: list, steps: int = 4) -> dict[str, tuple]:
    torch.manual_seed(0)
    module = DenoiserModule(network=UNetConfig(block_out_channels=(8,), norm_num_groups=4, mid_attention=False), seed=0)
    trainer = MemorizationTrainer(
        default_root_dir=folder, accelerator="cpu", max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = read_records(Path(folder) / "results.jsonl")
    return {f"{r.name}@{r.step}": (r.value, r.low, r.high, r.weights) for r in found}


def test_numbers_do_not_depend_on_the_order_of_callbacks(data) -> None:
    def evaluation() -> SampleEvaluation:
        return SampleEvaluation(num_samples=10, num_steps=2, raw=True)

    first = train(data, "a", [EMAWeightAveraging(decay=0.5), evaluation()])
    second = train(data, "b", [evaluation(), EMAWeightAveraging(decay=0.5)])
    assert first == second
    assert first["memorization/nearest_mean@4"][3] == "ema"
    assert first["raw/memorization/nearest_mean@4"][3] == "raw"
    assert first["memorization/nearest_mean@4"][0] != first["raw/memorization/nearest_mean@4"][0]
    without = train(data, "c", [evaluation()])
    # the raw weights are those of a run that averages nothing
    assert without["memorization/nearest_mean@4"][:3] == first["raw/memorization/nearest_mean@4"][:3]


def test_every_evaluation_starts_from_the_same_noise(data) -> None:
    train(data, "a", [SampleEvaluation(num_samples=10, num_steps=2)], steps=2)
    train(data, "b", [SampleEvaluation(num_samples=10, num_steps=2)], steps=4)
    one, two = read_records("a/results.jsonl"), read_records("b/results.jsonl")
    assert [r.value for r in one] == [r.value for r in two if r.step == 2]


def test_log_spaced_evaluations_always_hold_the_last(data) -> None:
    values = train(data, "a", [SampleEvaluation(num_samples=5, num_steps=1, log_spaced=3)], steps=16)
    steps = {int(key.split("@")[1]) for key in values}
    assert steps == {2, 6, 16}


def test_what_metrics_cost_beside_sampling_is_logged_and_summed_up(data) -> None:
    train(data, "a", [SampleEvaluation(num_samples=10, num_steps=2)])
    assert json.loads(Path("a/summary.json").read_text())["metrics_share"] > 0
    assert "time/" not in Path("a/metrics.csv").read_text()  # equal runs have equal files


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_metrics_cost_at_most_a_tenth_of_the_sampling_they_measure() -> None:
    """The shipped digits run, 500 steps of it."""
    config = Path(__file__).parent.parent.parent / "configs" / "digits" / "denoiser.yaml"
    options = ["--trainer.default_root_dir", "run", "--trainer.max_steps", "500", "--trainer.accelerator", "cpu"]
    run(["fit", "--config", str(config), *options])
    assert 0 < json.loads(Path("run/summary.json").read_text())["metrics_share"] <= 0.10


class Oracle(LightningModule):
    """Somebody's own module: all it has is target()."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self._own = target

    def target(self) -> Target:
        return self._own

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_works_in_any_module_with_target(data) -> None:
    target = EmpiricalDenoiser(data.members.images, DiffusionProcess()).target()
    reference = Reference.from_images(data.members.images, data.heldout.images)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 1)), batch_size=2)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        num_sanity_val_steps=0, enable_model_summary=False,
        callbacks=[SampleEvaluation(num_samples=20, num_steps=10, reference=reference)],
    )  # fmt: skip
    trainer.fit(Oracle(target), loader, loader)
    assert float(trainer.callback_metrics["memorization/ratio"]) == 1.0
    assert float(trainer.callback_metrics["memorization/ratio_heldout"]) == 0.0
    with pytest.raises(ValueError, match=r"reference=Reference.from_images"):
        Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[SampleEvaluation()],
                enable_checkpointing=False, enable_progress_bar=False).fit(Oracle(target), loader, loader)  # fmt: skip


def test_fused_average_is_the_average() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    fused, plain = EMA(decay=0.9), EMAWeightAveraging(decay=0.9)
    averages = [torch.optim.swa_utils.AveragedModel(module, **callback._kwargs) for callback in (fused, plain)]
    for _ in range(5):
        module.weight.data.add_(torch.randn(2, 3))
        for average in averages:
            average.update_parameters(module)
    one, other = (average.module.weight for average in averages)
    assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert not torch.allclose(one, module.weight)
    with pytest.raises(ValueError, match="decay must lie in"):
        EMA(decay=1.0)


def test_a_resumed_run_still_knows_the_number_it_keeps_the_best_of(data) -> None:
    def callbacks() -> list:
        best = ModelCheckpoint(monitor="frechet/pixels/heldout", filename="best", enable_version_counter=False)
        return [SampleEvaluation(num_samples=10, num_steps=1, log_spaced=2), best]

    train(data, "run", callbacks(), steps=16)  # measured at steps 2 and 16 only
    stopped = MemorizationTrainer(
        default_root_dir="part", accelerator="cpu", max_steps=16, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=[*callbacks(), Stop(6)], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    network = UNetConfig(block_out_channels=(8,), norm_num_groups=4, mid_attention=False)
    torch.manual_seed(0)
    stopped.fit(DenoiserModule(network=network, seed=0), datamodule=data)
    assert stopped.global_step == 6
    again = MemorizationTrainer(
        default_root_dir="part", accelerator="cpu", max_steps=16, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=callbacks(), enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    again.fit(DenoiserModule(network=network, seed=0), datamodule=data, ckpt_path="last")
    one, two = read_records("run/results.jsonl"), read_records("part/results.jsonl")
    assert [(r.name, r.step, r.value) for r in one] == [(r.name, r.step, r.value) for r in two]


class Stop(Callback):
    """Ends training after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True
