"""Sampling in blocks of one shape, every sample from noise that depends on nothing but its address."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lightning_mem.diffusion.process import DiffusionProcess, Sampler
from lightning_mem.diffusion.target import Condition, Target
from lightning_mem.randomness import generator
from lightning_mem.types import Prediction, to_uint8

OnStep = Callable[[int, int, Tensor], None]
"""Called with (sampler step, training timestep, the sampler's own x) after each step of each block."""


class ScoreTerm(Protocol):
    """A term added to the score: guidance, protection.

    Called with x_t [B, C, H, W] in the denoiser's (variance-preserving) scale, the *training* timestep t int64 [B],
    and the addresses int64 [B] of the rows; returns [B, C, H, W], or None where it has nothing to add.
    """

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        """The term at x_t and t; None leaves the network's output untouched, bit for bit."""


class HasTarget(Protocol):
    """Whatever can be sampled: a :class:`Target`, an oracle, a module."""

    def target(self) -> Target:
        """The target to draw from."""


def network_of(call: object) -> torch.nn.Module | None:
    """The network behind a denoiser or a classifier: its ``module``, or itself; None for a closed form."""
    module = getattr(call, "module", call)
    return module if isinstance(module, torch.nn.Module) else None


@contextmanager
def evaluation_mode(call: object) -> Iterator[None]:
    """Dropout off and batch statistics still in the network behind ``call``, back as it was afterwards."""
    module = network_of(call)
    training = [part for part in module.modules() if part.training] if module is not None else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _rows(condition: Condition, rows: Tensor, device: torch.device | str) -> Condition:
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition[rows].to(device)
    return {name: value[rows].to(device) for name, value in condition.items()}


def _check_condition(target: Target, condition: Condition, count: int) -> None:
    if condition is None:
        if target.num_classes is not None:
            raise ValueError(
                f"the target is conditioned on {target.num_classes} classes: pass condition= int64 labels, one a sample"
            )
        return
    parts = condition.items() if isinstance(condition, Mapping) else [("condition", condition)]
    for name, value in parts:
        if len(value) != count:
            raise ValueError(f"{name} must have one row per index ({count}), got {len(value)}")
    if isinstance(condition, Tensor) and target.num_classes is not None and count:
        low, high = int(condition.min()), int(condition.max())
        if low < 0 or high >= target.num_classes:
            raise ValueError(f"labels must lie in [0, {target.num_classes}), got {low} to {high}")


def add_terms(
    process: DiffusionProcess,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    addresses: Tensor,
    guidance: Sequence[ScoreTerm],
    prediction: Prediction,
    sampler: Sampler,
) -> Tensor:
    """The output with all score terms; rows to which nothing was added keep theirs, bit for bit."""
    plain, touched = output, torch.zeros(len(t), dtype=torch.bool, device=x_t.device)
    for term in guidance:
        score = term(x_t, t, addresses)
        if score is not None:  # float32, whatever the network's precision: the sum is as precise
            output = process.add_score(output, score.float(), x_t, t, prediction)
            touched |= score.flatten(1).any(1)
    if sampler != "ddim" or not touched.any():  # the others have no eps of their own beside the clipped x0
        return output
    rows = touched.reshape(-1, *[1] * (x_t.ndim - 1))
    return torch.where(rows, process.clip_x0(output, x_t, t, prediction), plain)


def initial_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal rows [B, *shape], row i from generator i, drawn on the CPU so that no device changes them."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


@torch.no_grad()  # not inference mode: a score term may differentiate a classifier
def sample_x0(
    target: HasTarget,
    indices: Sequence[int] | Tensor,
    *,
    seed: int,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    guidance: Sequence[ScoreTerm] = (),
    condition: Condition = None,
    block: int = 64,
    on_step: OnStep | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As :func:`sample`, before quantising: [N, C, H, W] in the denoiser's space, on its device.

    ``dtype`` is the precision of the solver's state and of what the denoiser is given; samples are defined in float32.
    Tangents of forward-mode differentiation pass through.
    """
    target = target.target()
    addresses = torch.as_tensor(indices).cpu().flatten()
    if len(addresses) and (addresses.is_floating_point() or addresses.dtype == torch.bool):
        raise ValueError(f"indices must be integers, got {addresses.dtype}")
    addresses = addresses.to(torch.int64)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if eta < 0 or (eta > 0 and sampler != "ddim"):
        raise ValueError(f"eta must be 0, or positive with sampler ddim; got {eta} with {sampler}")
    _check_condition(target, condition, len(addresses))
    prediction = target.denoiser.prediction
    # diffusers' Heun knows eps and v only
    as_eps = sampler == "heun" and prediction == "x0"
    scheduler = target.process.scheduler(sampler, num_steps, "eps" if as_eps else prediction)
    step_options = {"eta": eta} if sampler == "ddim" else {}
    drawn = []
    with evaluation_mode(target.denoiser):
        for start in range(0, len(addresses), block):
            rows = torch.arange(start, min(start + block, len(addresses)))
            # the network's rounding depends on the shape of its call: the last block is padded, then cut
            rows = torch.cat([rows, rows[-1:].expand(block - len(rows))])
            generators = [generator(seed, "sample", int(i)) for i in addresses[rows]]
            own_addresses = addresses[rows].to(target.device)
            own_condition = _rows(condition, rows, target.device)
            scheduler.set_timesteps(num_steps)  # multistep solvers keep a history
            x = initial_noise(target.shape, generators).to(target.device, dtype) * scheduler.init_noise_sigma
            for step, timestep in enumerate(scheduler.timesteps):
                t = torch.full((block,), int(timestep), dtype=torch.int64, device=target.device)
                x_t = scheduler.scale_model_input(x, timestep)
                output = target.denoiser(x_t, t, own_condition)
                output = add_terms(target.process, output, x_t, t, own_addresses, guidance, prediction, sampler)
                if as_eps:
                    output = target.process.to_eps(output, x_t, t, prediction)
                # reduced precision ends at the network: solvers keep their state in float32, or better
                noise = {} if sampler == "heun" else {"generator": generators}
                x = scheduler.step(output.to(dtype), timestep, x, **step_options, **noise).prev_sample
                if on_step is not None:
                    on_step(step, int(timestep), x)
            drawn.append(x[: min(block, len(addresses) - start)])
    return torch.cat(drawn) if drawn else torch.empty(0, *target.shape)


def sample(
    target: HasTarget,
    indices: Sequence[int] | Tensor,
    *,
    seed: int,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    guidance: Sequence[ScoreTerm] = (),
    condition: Condition = None,
    block: int = 64,
    on_step: OnStep | None = None,
) -> Tensor:
    """The images of these addresses.

    Args:
        target: A :class:`Target`, or whatever has ``target()``.
        indices: Addresses, integers; sample 17 of a seed is the same image in any company and order.
        seed: Seed of the draw.
        num_steps: Sampler steps; the cost is ``num_steps`` network evaluations a sample (Heun: twice that, less one).
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``, all at integer training timesteps.
        eta: DDIM's share of fresh noise: 0 deterministic, 1 as DDPM.
        guidance: Score terms, added in turn; no term, or None from it, leaves the network's output untouched.
        condition: int64 labels [N], or a mapping of tensors with N rows, one row per index.
        block: Images per network call; part of the definition, because rounding depends on it.
        on_step: Called after each sampler step with (step, training timestep, x in the sampler's own scale).

    Returns:
        uint8 [N, C, H, W] on the CPU.

    Raises:
        ValueError: If an option is out of range, a condition is missing or does not fit, or pixels are not finite.
    """
    x0 = sample_x0(
        target,
        indices,
        seed=seed,
        num_steps=num_steps,
        sampler=sampler,
        eta=eta,
        guidance=guidance,
        condition=condition,
        block=block,
        on_step=on_step,
    )
    return to_uint8(target.target().codec.decode(x0)).cpu()
