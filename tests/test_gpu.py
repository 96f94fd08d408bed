"""What needs a CUDA device: numbers as on the CPU up to rounding, reduced precision, compilation, resume."""

from pathlib import Path

import pytest
import torch

from lightning_mem.data import MemorizationDataModule
from lightning_mem.evaluation import Measure, Reference, Workers, draw_samples
from lightning_mem.modules import load_target
from lightning_mem.records import read_records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = ["--trainer.accelerator", "gpu"]


def test_samples_and_numbers_agree_with_the_cpu(fit) -> None:
    run = fit("run")
    data = MemorizationDataModule(num_members=20, num_heldout=24, flip=True)
    data.setup()
    near = draw_samples(load_target(run), 130, num_steps=10)
    workers = Workers(device=torch.device("cuda"))
    far = draw_samples(load_target(run, device="cuda"), 130, num_steps=10, workers=workers)
    assert (near.images.int() - far.images.int()).abs().max() <= 2
    reference = Reference.from_datamodule(data)
    on_cpu, on_gpu = Measure(reference)(near).values(), Measure(reference, workers=workers)(near).values()
    assert on_gpu == pytest.approx(on_cpu, rel=1e-5)
    assert on_gpu["memorization/ratio"] == on_cpu["memorization/ratio"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_lowers_the_loss_in_every_precision(fit, precision: str) -> None:
    run = fit("run", *GPU, "--trainer.precision", precision, "--trainer.max_steps", "60")
    found = [r.value for r in read_records(run / "results.jsonl") if r.name == "frechet/pixels/heldout"]
    assert found[-1] < found[0]


def test_compiled_network_trains_and_is_measured(fit) -> None:
    options = ["--model.init_args.compile", "true", "--model.init_args.channels_last", "true"]
    run = fit("run", *GPU, *options)
    assert (run / "summary.json").exists()


def test_resume_equals_no_stop(fit) -> None:
    whole = fit("whole/run", *GPU)
    part = fit("part/run", *GPU, "--trainer.max_steps", "7")
    fit("part/run", *GPU, "--ckpt_path", "last")
    one, two = (torch.load(Path(f) / "checkpoints/last.ckpt", weights_only=True) for f in (whole, part))
    for name, value in one["current_model_state"].items():
        # not to the bit: some CUDA kernels sum in no fixed order
        assert torch.allclose(value, two["current_model_state"][name], rtol=1e-3, atol=1e-5), name
