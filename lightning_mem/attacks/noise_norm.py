"""Noise-norm detection: how much of the predicted noise is the prompt's doing, which a memorized prompt makes much."""

import csv
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.conditions import Captions
from lightning_mem.attacks.detection_report import Scores, detection_numbers, draw_detection, statistics_table
from lightning_mem.attacks.extraction_costs import cost_numbers
from lightning_mem.attacks.placement import placed
from lightning_mem.attacks.prompts import condition_of, filled, prompt_lists, rows_of, with_cfg
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.diffusion.sampling import sample_x0
from lightning_mem.diffusion.target import Condition, Denoiser
from lightning_mem.evaluation import Number, Scene, Workers
from lightning_mem.randomness import derive_seed
from lightning_mem.records import Record, atomic_write, digest

PREFIX = "attack/noise_norm/"
KINDS = {"members": "suspected prompts", "heldout": "held-out prompts"}
"""In the legend."""


class _Watched:
    """A denoiser under classifier-free guidance that keeps the norm of what the prompt adds, at every call."""

    def __init__(self, target: Target, cfg_weight: float) -> None:
        self.denoiser: Denoiser = target.denoiser
        self.prediction, self.process, self.cfg_weight = target.denoiser.prediction, target.process, cfg_weight
        self.module = getattr(target.denoiser, "module", None)
        self.norms: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        given, without = self.denoiser(x_t, t, condition), self.denoiser(x_t, t, None)
        eps, plain = (self.process.to_eps(part.float(), x_t, t, self.prediction) for part in (given, without))
        self.norms.append((eps - plain).double().flatten(1).norm(dim=1))
        return without + self.cfg_weight * (given - without)


def noise_norms(
    target: Target,
    prompts: Sequence[str],
    *,
    num_generations: int = 4,
    cfg_weight: float = 7.5,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    seed: int = 0,
    block: int = BLOCK,
    workers: Workers | None = None,
) -> Tensor:
    r"""Norm of the prompt's part of the predicted noise, at every network call while sampling under guidance.

    .. math:: \lVert \epsilon_\theta(x_t, t, c) - \epsilon_\theta(x_t, t, \varnothing) \rVert_2

    in the denoiser's space, before the guidance weight. A prompt's norms depend on seed and prompt only, not on the
    others.

    Args:
        target: A text-to-image model without guidance of its own (``cfg_weight`` 1).
        prompts: At least one.
        num_generations: Samples of a prompt, at least 1.
        cfg_weight: Of the guidance under which the samples are drawn.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        seed: Of the noise.
        block: Images of a network call, prompts together.
        workers: How blocks are dealt out.

    Returns:
        float64 [prompts, generations, calls], the first call (the most noise) first.

    Source:
        Wen et al., Detecting, Explaining, and Mitigating Memorization in Diffusion Models, arXiv:2407.21720, eq. 2.
    """
    workers = workers or Workers(device=torch.device(target.device))
    target = placed(target, workers.device)

    def compute(rows: Tensor) -> Tensor:
        own = rows.unique()
        named = [prompts[int(row) // num_generations] for row in own]
        kinds = list(dict.fromkeys(named))
        which = torch.tensor([kinds.index(prompt) for prompt in named])
        addresses = torch.tensor([
            (derive_seed(seed, "noise norm", prompt) >> 16) + int(row) % num_generations
            for prompt, row in zip(named, own, strict=True)
        ])  # fmt: skip
        watched = _Watched(target, cfg_weight)
        sample_x0(
            replace(target, denoiser=watched), addresses, seed=seed, num_steps=num_steps, sampler=sampler, eta=eta,
            condition=rows_of(condition_of(target, kinds), which), block=block,
        )  # fmt: skip
        return torch.stack(watched.norms, 1)[torch.searchsorted(own, rows)].to(workers.device)

    found = workers.in_blocks(len(prompts) * num_generations, compute, block, "noise norms").cpu()
    return found.unflatten(0, (len(prompts), num_generations))


class NoiseNorm(AbstractAttack):
    r"""Tells captions of training images from others by the size of what the prompt adds to the predicted noise.

    .. math:: m = \frac{1}{G\,S} \sum_{g, s} \lVert \epsilon_\theta(x_{t_s}, t_s, c) -
        \epsilon_\theta(x_{t_s}, t_s, \varnothing) \rVert_2

    over generations g and steps s; larger = memorized. Needs no image. ``definition.statistic`` is ``mean``, or
    ``first_step`` for the first step alone, which costs two network evaluations a generation. Records:
    ``attack/noise_norm/norm`` and ``norm_heldout`` (means over prompts), ``auc``, ``tpr_at_0.01``, ``tpr_at_0.001``,
    ``evaluations`` (denoiser calls of a generation), and of ``mean`` ``seconds_per_image`` (of a generation).
    ``tables/noise_norms.csv`` has every prompt's norm at every step, ``images/noise_norms.png`` how they spread.

    Args:
        prompts: Suspected prompts: a list, or a file; null for the captions of the data; see
            :class:`PromptedExtraction`.
        heldout_prompts: Prompts of images that were not trained on, likewise; null for none, and no AUC.
        num_generations: G, at least 1.
        cfg_weight: Of classifier-free guidance while sampling; the norm is taken before it.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        sample_seed: Of noise; null takes ``seed_everything``.
        block: Images of a network call: part of the definition.

    Raises:
        ValueError: If a number is out of range, there is no prompt, or the target has no classifier-free guidance.

    Undefined when:
        The two lists differ in more than membership: length and style of a prompt move the norm.

    Source:
        Wen et al., Detecting, Explaining, and Mitigating Memorization in Diffusion Models, arXiv:2407.21720.
    """

    name = "noise_norm"
    threat_model = (
        "Noise-norm detection gives prompts to the target and sees its noise predictions with and without them while "
        "it samples: the model's owner, or whoever has the weights. It sees no image."
    )

    def __init__(
        self,
        prompts: list[str] | str | None = None,
        heldout_prompts: list[str] | str | None = None,
        num_generations: int = 4,
        cfg_weight: float = 7.5,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int | None = None,
        block: int = BLOCK,
    ) -> None:
        if num_generations < 1 or block < 1:
            raise ValueError(f"num_generations and block must be at least 1, got {num_generations} and {block}")
        self.prompts = prompt_lists(prompts, heldout_prompts)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.drawing: dict[str, Any] = {
            "num_generations": num_generations, "cfg_weight": cfg_weight, "num_steps": num_steps, "sampler": sampler,
            "eta": eta, "seed": seed, "block": block,
        }  # fmt: skip

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """Without prompts the captions are the prompts; see :class:`AbstractAttack`."""
        self.prompts = filled(self.prompts, target, captions)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, prompts and settings; see :class:`AbstractAttack`."""
        with_cfg(target, 1.0)  # refuses a target without an empty prompt
        self.prompts = filled(self.prompts, target, lambda: None)
        return digest(target.digest, self.prompts, self.drawing)

    def run(self, scene: Scene) -> list[Record]:
        """Sample under every prompt and watch; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        target = with_cfg(scene.target, 1.0)  # the watched denoiser guides by itself
        found = {
            kind: noise_norms(target, prompts, workers=scene.workers, **self.drawing).mean(1)
            for kind, prompts in self.prompts.items()
            if prompts
        }
        taken = time.perf_counter() - start
        scores = {
            "mean": {kind: norms.mean(1) for kind, norms in found.items()},
            "first_step": {kind: norms[:, 0] for kind, norms in found.items()},
        }
        scene.first(lambda: self._write(scene.folder, found, scores))
        numbers = self._numbers(scores, next(iter(found.values())).shape[1], taken)
        seed, seconds = int(self.drawing["seed"]), time.perf_counter() - start
        return [scene.record(PREFIX, number, seed=seed, seconds=seconds) for number in numbers]

    def _numbers(self, scores: Mapping[str, Scores], calls: int, taken: float) -> list[Number]:
        """Both statistics; a call of the guided denoiser asks with the prompt and without."""
        settings = {key: value for key, value in self.drawing.items() if key != "seed"}
        prompts = sum(map(len, scores["mean"].values()))
        each = torch.full((prompts * self.drawing["num_generations"],), 1.0, dtype=torch.float64)
        numbers = []
        for statistic, own in scores.items():
            about = {**settings, "statistic": statistic}
            whole = statistic == "mean"
            seconds = each * (taken / len(each) if whole else torch.nan)
            numbers += detection_numbers(own, "norm", "l2", about)
            costs = cost_numbers(2 * (calls if whole else 1), seconds, about, "generation")
            numbers += costs if whole else costs[:1]  # the first step is not timed alone
        return numbers

    def table(self, records: Sequence[Record]) -> Table:
        """One column a statistic."""
        return statistics_table(records, PREFIX, "attack noise_norm")

    def _write(self, folder: Path, found: Mapping[str, Tensor], scores: Mapping[str, Scores]) -> None:
        """The picture; and one row a prompt, the largest mean first: the mean, and the norm at each call."""
        draw_detection(folder / "images" / "noise_norms.png", scores, KINDS, "norm of the prompt's part")
        rows = [
            (float(norms.mean()), prompt, kind, norms.tolist())
            for kind, all_norms in found.items()
            for prompt, norms in zip(self.prompts[kind], all_norms, strict=True)
        ]
        calls = len(rows[0][3])
        with atomic_write(folder / "tables" / "noise_norms.csv") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["prompt", "prompts", "mean", *(f"call_{number}" for number in range(calls))])
            for mean, prompt, kind, norms in sorted(rows, key=lambda row: -row[0]):
                writer.writerow([prompt, kind, f"{mean:.6g}", *(f"{norm:.6g}" for norm in norms)])
