"""Protection of a diffusers pipeline: score terms added where its scheduler takes the step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from lightning_mem.diffusion import DiffusionProcess, Sampler, ScoreTerm
from lightning_mem.diffusion.sampling import add_terms, network_of


@contextmanager
def protected_pipeline(
    pipeline: DiffusionPipeline, terms: Sequence[ScoreTerm], *, addresses: Sequence[int] | Tensor | None = None
) -> Iterator[DiffusionPipeline]:
    """A diffusers pipeline whose samples are drawn under score terms, inside a ``with``; as it was afterwards.

    Works with whatever hands its scheduler the network's output and x_t: ``DDIMPipeline``, Stable-Diffusion-type
    pipelines. The output that a scheduler sees is the combined one, so terms are added once, after classifier-free
    guidance, and see one row an image. diffusers' ``callback_on_step_end`` comes after the step, too late for this.
    A classifier of a latent pipeline works on latents as the scheduler sees them (times the VAE's scaling factor).

    Args:
        pipeline: On the device where it will run; networks of terms are moved there.
        terms: Such as :class:`CPSample`; their process must be the scheduler's.
        addresses: Of the images of each call, for terms that tell samples apart; null for 0 .. N-1.

    Raises:
        ValueError: If the schedule is not a discrete variance-preserving one or not that of a term; when sampling, if a
            timestep is fractional, the network also predicts a variance, or addresses do not match the images.

    Example:
        with protected_pipeline(pipeline, [CPSample(classifier, tol=0.5, scale=1.0)]):
            images = pipeline(num_inference_steps=50).images
    """
    scheduler = pipeline.scheduler
    process = DiffusionProcess.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
    for term in terms:
        own: DiffusionProcess | None = getattr(term, "process", None)
        if own is not None and not torch.equal(own.alpha_bar, process.alpha_bar):
            raise ValueError(
                f"{term!r} belongs to another noising process ({len(own.alpha_bar)} timesteps) than the pipeline's "
                f"{type(scheduler).__name__} ({len(process.alpha_bar)}): train its classifier on this pipeline's"
            )
        network = network_of(term)
        if network is not None:
            network.to(pipeline.device)
    # only DDIM goes on with the eps of an x0 that it clips
    sampler: Sampler = "ddim" if isinstance(scheduler, DDIMScheduler) else "ddpm"
    step = scheduler.step

    @wraps(step)  # pipelines look at its signature
    def protected(model_output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **options: Any) -> Any:
        at = float(timestep)
        if at != int(at):
            raise ValueError(
                f"the scheduler visits the fractional timestep {at}, but classifiers know training timesteps only: "
                'use timestep_spacing="trailing" in its configuration and a number of steps that divides '
                f"{process.num_timesteps}"
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network's output is {list(model_output.shape)} for x_t {list(sample.shape)}: a network that also "
                "predicts the variance cannot be protected here"
            )
        rows = torch.arange(len(sample)) if addresses is None else torch.as_tensor(addresses)
        if len(rows) != len(sample):
            raise ValueError(f"addresses must name each of the {len(sample)} images of a call, got {len(rows)}")
        t = torch.full((len(sample),), int(at), dtype=torch.int64, device=sample.device)
        x_t = scheduler.scale_model_input(sample, timestep)
        output = add_terms(process, model_output, x_t, t, rows, terms, process.prediction, sampler)
        return step(output.to(model_output.dtype), timestep, sample, *rest, **options)

    scheduler.step = protected
    try:
        yield pipeline
    finally:
        del scheduler.step
