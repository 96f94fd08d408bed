"""What a sample costs under an attack and a protection: calls counted, blocks timed in turns, kept from run to run."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.additions import Judge
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation.blocks import draw_block
from lightning_mem.records import atomic_write


@dataclass(frozen=True)
class Cost:
    """What one draw of a sample takes; a rejected sample pays it once more.

    Args:
        evaluations: Calls of the denoiser.
        classifier_evaluations: Calls of classifiers, those of guidance and of judges included.
        classifier_gradients: Backward passes through classifiers, on the counted block.
        seconds: Of a block of 64, one a turn.
    """

    evaluations: float
    classifier_evaluations: float
    classifier_gradients: float
    seconds: tuple[float, ...]


def middle(values: Tensor) -> tuple[float, tuple[float, float], float]:
    r"""Median, its interval by order statistics, and the confidence that this has.

    .. math:: P(x_{(k)} \le m \le x_{(R + 1 - k)}) = 1 - 2 \sum_{i < k} \binom{R}{i} 2^{-R}

    with the largest k that keeps 95 %; k = 1, the whole range, where none does.

    Args:
        values: float64 [R >= 1], independent.

    Source:
        David and Nagaraja, Order Statistics (2003), section 7.1.
    """
    ordered, count = values.double().sort().values, len(values)
    tails = torch.distributions.Binomial(count, torch.tensor(0.5, dtype=torch.float64))
    outside = 2 * tails.log_prob(torch.arange(count + 1, dtype=torch.float64)).exp().cumsum(0)
    k = max(1, int((outside[: (count + 1) // 2] <= 0.05).sum()))
    ends = (float(ordered[k - 1]), float(ordered[count - k]))
    return float(ordered.quantile(0.5)), ends, max(0.0, 1 - float(outside[k - 1]))


def _counted(terms: Sequence[ScoreTerm]) -> Tensor:
    """Denoiser calls beside the sampler's, classifier calls and gradients that the terms have counted so far."""
    found = torch.zeros(3, dtype=torch.float64)
    for term in terms:
        found[0] += getattr(term, "network_evaluations", 0)
        if hasattr(term, "classifier"):
            calls = getattr(term, "evaluations", 0)
            found[1] += calls
            found[2] += getattr(term, "gradients", calls)  # guidance goes back through every call
    return found


def measure_costs(
    target: Target,
    arms: Mapping[str, tuple[Sequence[ScoreTerm], Judge | None]],
    settings: Mapping[str, Any],
    num_samples: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Cost]:
    """Count the calls of a block of every arm, then time blocks of all arms in turns: a slow moment falls on all.

    Args:
        target: What is drawn from.
        arms: Score terms and judge by the arm's name.
        settings: Of the draw: sample_seed, num_steps, sampler, eta, block.
        num_samples: Addresses there are; the block takes the first 64.
        repeats: Timed turns.
        device: Where all networks go.
    """
    addresses, steps = torch.arange(min(BLOCK, num_samples)), _calls(target, settings)
    target.device = device
    calls = [target.denoiser, *(part for terms, judge in arms.values() for part in (*terms, judge))]
    for network in map(network_of, calls):
        if network is not None:
            network.to(device)

    def draw(terms: Sequence[ScoreTerm], judge: Judge | None) -> float:
        start = time.perf_counter()
        images = draw_block(target, addresses, dict(settings), terms).images  # on the CPU: the device was waited for
        if judge is not None:
            judge(images)
        return time.perf_counter() - start

    counts = {}
    for name, (terms, judge) in arms.items():
        before = _counted(terms)
        draw(terms, judge)
        judges = getattr(judge, "judges", (judge,))
        asked = sum(hasattr(judge, "classifier") for judge in judges)
        own = (_counted(terms) - before) / len(addresses)
        counts[name] = (steps + float(own[0]), float(own[1]) + asked, float(own[2]))
    turns = [[draw(*arm) for arm in arms.values()] for _ in range(repeats)]
    return {name: Cost(*counts[name], tuple(turn[place] for turn in turns)) for place, name in enumerate(arms)}


def _calls(target: Target, settings: Mapping[str, Any]) -> int:
    """Calls of the denoiser by the sampler, a sample."""
    return len(target.process.scheduler(settings["sampler"], settings["num_steps"]).timesteps)


def write_costs(path: Path, costs: Mapping[str, Cost]) -> None:
    """Keep them, so that a second run of an attack agrees with the first."""
    with atomic_write(path) as file:
        json.dump({name: asdict(cost) for name, cost in costs.items()}, file, indent=1)


def read_costs(path: Path) -> dict[str, Cost]:
    """What was kept; empty where nothing was."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {name: Cost(**{**cost, "seconds": tuple(cost["seconds"])}) for name, cost in found.items()}
