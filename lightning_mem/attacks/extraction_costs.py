"""What extraction costs: denoiser calls, counted by the sampler's own schedule, and seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation import Number
from lightning_mem.evaluation.numbers import absent
from lightning_mem.records import Record

FROM_DISK = "what it was told from was read from the disk: drawing and searching were not timed"
COSTS = {"evaluations": "denoiser calls", "seconds_per_image": "seconds"}
"""Names of costs, and their units."""


def denoiser_calls(target: Target, sampler: Sampler, num_steps: int, *, conditioned: bool, further: int = 0) -> int:
    """Evaluations of the network that one sample takes: N (Heun: 2N - 1), twice that under classifier-free guidance.

    Args:
        target: What is drawn from; a guided denoiser says so by its ``cfg_weight``.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        num_steps: N.
        conditioned: Whether samples are drawn under a label or a prompt: without one there is nothing to guide by.
        further: Calls beside the sampler's, such as for a loss.
    """
    guided = conditioned and getattr(target.denoiser, "cfg_weight", 1.0) != 1
    return (len(target.process.scheduler(sampler, num_steps).timesteps) + further) * (2 if guided else 1)


def cost_numbers(calls: int, seconds: Sequence[float] | Tensor, about: Mapping[str, Any], per: str) -> list[Number]:
    """``evaluations``, and ``seconds_per_image`` over what was timed: absent, with the reason, where nothing was.

    Args:
        calls: Denoiser calls of one.
        seconds: What each took, one entry a piece; NaN where it was read from the disk.
        about: What was drawn, flat.
        per: What one is: ``generation``, ``image``.
    """
    all_seconds, definition = torch.as_tensor(seconds, dtype=torch.float64), {**about, "per": per}
    timed = all_seconds[~all_seconds.isnan()]
    found = [Number("evaluations", float(calls), len(all_seconds), definition, None, COSTS["evaluations"])]
    if len(timed) == 0:
        return [*found, absent("seconds_per_image", FROM_DISK, definition, "seconds")]
    mean = float(timed.mean())
    return [*found, Number("seconds_per_image", mean, len(timed), definition, None, COSTS["seconds_per_image"])]


def cost_line(records: Sequence[Record], prefix: str) -> str:
    """``one generation costs 50 denoiser calls, 0.0123 seconds``, for a table's caption; empty without costs."""
    found = {r.name.removeprefix(prefix): r for r in records if r.name.removeprefix(prefix) in COSTS}
    parts = [f"{r.value:.4g} {COSTS[name]}" for name, r in found.items() if r.value is not None]
    untimed = [" (read from the disk: not timed)" for r in found.values() if r.value is None]
    return f"one {found['evaluations'].definition['per']} costs {', '.join(parts)}{''.join(untimed)}" if parts else ""
