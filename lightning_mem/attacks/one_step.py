"""One-step extraction: a memorized prompt shows its image after a single step, the same one from every noise."""

import csv
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.conditions import Captions, on_device
from lightning_mem.attacks.detection_report import Scores, detection_numbers, draw_detection, statistics_table
from lightning_mem.attacks.extraction_costs import cost_numbers, denoiser_calls
from lightning_mem.attacks.noise_norm import KINDS
from lightning_mem.attacks.placement import placed
from lightning_mem.attacks.prompts import condition_of, filled, prompt_lists, rows_of, with_cfg
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Target
from lightning_mem.diffusion.sampling import evaluation_mode, initial_noise
from lightning_mem.evaluation import Number, Scene, Workers
from lightning_mem.randomness import generator
from lightning_mem.records import Record, atomic_write, digest
from lightning_mem.types import to_uint8

PREFIX = "attack/one_step/"
UNITS = {"white_box": "mse", "black_box": "fraction"}
"""Statistics and the units of their scores."""


def edges(images: Tensor) -> Tensor:
    r"""Strength of the edges of the channels' mean, by forward differences.

    .. math:: \sqrt{(\Delta_x^2 + \Delta_y^2) / 2}

    Args:
        images: uint8 [B, C, H, W], sides of at least 2.

    Returns:
        float32 [B, H - 1, W - 1] in [0, 1].
    """
    grey = images.float().mean(1) / 255
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return ((across.square() + down.square()) / 2).sqrt()


@torch.no_grad()
def one_step(
    target: Target, prompts: Sequence[str], which: Tensor, numbers: Tensor, timestep: int, seed: int, block: int
) -> tuple[Tensor, Tensor]:
    r"""A single step from pure noise to the estimate of the image.

    .. math:: x_t = \sqrt{1 - \bar\alpha_t}\,\epsilon, \qquad \hat x_0 = \hat x_{0,\theta}(x_t, t, c)

    From there Euler's, Heun's and DDIM's one step are the same.

    Args:
        target: Conditional on prompts, or on labels as text.
        prompts: What it is asked with.
        which: int64 [B], each row's prompt.
        numbers: int64 [B], addresses of the noise, shared by all prompts.
        timestep: Where the step starts.
        seed: Of the noise.
        block: At least B: calls are filled up to one shape.

    Returns:
        Estimate and noise, float32 [B, C, H, W] in the denoiser's space; where samplers clip, the estimate is clipped.
    """
    rows, prediction = torch.arange(block).clamp(max=len(which) - 1), target.denoiser.prediction
    kinds = which.unique()
    condition = condition_of(target, [prompts[int(kind)] for kind in kinds])
    given = on_device(rows_of(condition, torch.searchsorted(kinds, which)[rows]), target.device)
    noise = initial_noise(target.shape, [generator(seed, "one step", int(n)) for n in numbers[rows]]).to(target.device)
    t = torch.full((block,), timestep, dtype=torch.int64, device=target.device)
    x_t = target.process.add_noise(torch.zeros_like(noise), noise, t)
    with evaluation_mode(target.denoiser):
        output = target.denoiser(x_t, t, given).float()
    output = target.process.clip_x0(output, x_t, t, prediction)
    return target.process.to_x0(output, x_t, t, prediction)[: len(which)], noise[: len(which)]


def one_step_scores(
    target: Target,
    prompts: Sequence[str],
    *,
    num_generations: int = 4,
    timestep: int | None = None,
    seed: int = 0,
    block: int = BLOCK,
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    r"""How much a single step already shows of an image, by prompt; larger = memorized.

    .. math:: \text{white box} = \frac{1}{G} \sum_g \frac{\lVert \hat x_0^{(g)} - \epsilon^{(g)} \rVert^2}{D},
        \qquad \text{black box} = \mathrm{mean}_{p} \min_g e_p^{(g)}

    e the :func:`edges` of the decoded estimate at pixel p: the soft intersection of the edges over G noises. An
    estimate that is a mean over many images has few edges and little energy. A prompt's scores do not depend on the
    others.

    Args:
        target: Conditional on prompts, or on labels as text.
        prompts: At least one.
        num_generations: G, at least 2: what differs between noises is no copy.
        timestep: Where the step starts; null for the last, the most noise.
        seed: Of the noise.
        block: Images of a network call.
        workers: How blocks are dealt out.

    Returns:
        ``white_box`` and ``black_box``, float64 [prompts].

    Source:
        Webster, A Reproducible Extraction of Training Images from Diffusion Models, arXiv:2305.08694: the error between
        the one-step latent and the initial noise, and edges that noises share. Without a threshold on edges: ours.
    """
    workers = workers or Workers(device=torch.device(target.device))
    target = placed(target, workers.device)
    t = target.process.num_timesteps - 1 if timestep is None else timestep
    white, black = [], []
    for part in torch.arange(len(prompts)).split(block):  # edges of so many prompts are in memory at a time
        first = int(part[0])

        def compute(rows: Tensor, first: int = first) -> Tensor:
            own = rows.unique()
            which, number = first + own // num_generations, own % num_generations
            x0, noise = one_step(target, prompts, which, number, t, seed, block)
            error = (x0 - noise).double().square().flatten(1).mean(1, keepdim=True).cpu()
            seen = edges(to_uint8(target.codec.decode(x0)).cpu()).flatten(1).double()
            return torch.cat([error, seen], 1)[torch.searchsorted(own, rows)].to(workers.device)

        found = workers.in_blocks(len(part) * num_generations, compute, block).cpu()
        found = found.unflatten(0, (len(part), num_generations))
        white.append(found[:, :, 0].mean(1))
        black.append(found[:, :, 1:].amin(1).mean(1))
    return {"white_box": torch.cat(white), "black_box": torch.cat(black)}


class OneStepExtraction(AbstractAttack):
    """Tells captions of training images from others by what a single step from noise shows (:func:`one_step_scores`).

    ``definition.statistic`` is ``white_box`` (needs the latents) or ``black_box`` (sees the images of a one-step
    sampler). Records: ``attack/one_step/score`` and ``score_heldout`` (means over prompts), ``auc``, ``tpr_at_0.01``,
    ``tpr_at_0.001``; ``evaluations`` (denoiser calls of a generation) and ``seconds_per_image``.
    ``tables/one_step.csv`` has both scores of every prompt, ``images/one_step.png`` shows how they spread.

    Args:
        prompts: Suspected prompts: a list, or a file; null for the captions of the data; see
            :class:`PromptedExtraction`.
        heldout_prompts: Prompts of images that were not trained on, likewise; null for none, and no AUC.
        num_generations: G, at least 2.
        cfg_weight: Of classifier-free guidance, 1 for none; null leaves the target's own (class-conditional models).
        timestep: Where the step starts; null for the last. An eps network of a schedule that ends in almost pure noise
            says little there: start lower.
        sample_seed: Of noise; null takes ``seed_everything``.
        block: Images of a network call: part of the definition.

    Raises:
        ValueError: If a number is out of range, there is no prompt, or the target takes none.

    Undefined when:
        The two lists differ in more than membership: a prompt for a page of text has edges for everybody.

    Source:
        Webster, A Reproducible Extraction of Training Images from Diffusion Models, arXiv:2305.08694.
    """

    name = "one_step"
    threat_model = (
        "One-step extraction gives prompts to the target and sees what it makes of noise in one step: the images "
        "(black box), or their latents and the noise (white box). It sees no training image."
    )

    def __init__(
        self,
        prompts: list[str] | str | None = None,
        heldout_prompts: list[str] | str | None = None,
        num_generations: int = 4,
        cfg_weight: float | None = 7.5,
        timestep: int | None = None,
        sample_seed: int | None = None,
        block: int = BLOCK,
    ) -> None:
        if num_generations < 2 or block < 1:
            raise ValueError(
                f"num_generations must be at least 2 and block at least 1, got {num_generations} and {block}"
            )
        self.prompts = prompt_lists(prompts, heldout_prompts)
        self.cfg_weight = cfg_weight
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.drawing: dict[str, Any] = {
            "num_generations": num_generations, "timestep": timestep, "seed": seed, "block": block,
        }  # fmt: skip

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """Without prompts the captions are the prompts; see :class:`AbstractAttack`."""
        self.prompts = filled(self.prompts, target, captions)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, prompts and settings; see :class:`AbstractAttack`."""
        self.prompts = filled(self.prompts, target, lambda: None)
        with_cfg(target, self.cfg_weight)  # refuses before anything is asked, as does what follows
        for prompts in self.prompts.values():
            condition_of(target, prompts[:1] if target.num_classes is None else prompts)
        t, last = self.drawing["timestep"], target.process.num_timesteps
        if t is not None and not 0 <= t < last:
            raise ValueError(f"timestep must lie in [0, {last}) or be null for the last one, got {t}")
        return digest(target.digest, self.prompts, self.cfg_weight, self.drawing)

    def run(self, scene: Scene) -> list[Record]:
        """Take one step under every prompt; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        target = with_cfg(scene.target, self.cfg_weight)
        found = {
            kind: one_step_scores(target, prompts, workers=scene.workers, **self.drawing)
            for kind, prompts in self.prompts.items()
            if prompts
        }
        taken = time.perf_counter() - start
        scores = {word: {kind: own[word] for kind, own in found.items()} for word in UNITS}
        scene.first(lambda: self._write(scene.folder, scores))
        numbers = self._numbers(target, scores, taken)
        seed, seconds = int(self.drawing["seed"]), time.perf_counter() - start
        return [scene.record(PREFIX, number, seed=seed, seconds=seconds) for number in numbers]

    def _numbers(self, target: Target, scores: Mapping[str, Scores], taken: float) -> list[Number]:
        t = target.process.num_timesteps - 1 if self.drawing["timestep"] is None else self.drawing["timestep"]
        settings = {**self.drawing, "timestep": t, "cfg_weight": self.cfg_weight}
        del settings["seed"]  # every record has its own
        numbers = []
        for statistic, own in scores.items():
            numbers += detection_numbers(own, "score", UNITS[statistic], {**settings, "statistic": statistic})
        count = sum(map(len, scores["white_box"].values())) * int(settings["num_generations"])
        calls = denoiser_calls(target, "euler", 1, conditioned=True)
        return [*numbers, *cost_numbers(calls, [taken / count] * count, settings, "generation")]

    def table(self, records: Sequence[Record]) -> Table:
        """One column a statistic."""
        return statistics_table(records, PREFIX, "attack one_step")

    def _write(self, folder: Path, scores: Mapping[str, Scores]) -> None:
        """The picture; and one row a prompt, the largest black-box score first."""
        draw_detection(folder / "images" / "one_step.png", scores, KINDS, "score of a single step")
        rows = [
            (float(black), float(white), prompt, kind)
            for kind in scores["white_box"]
            for prompt, white, black in zip(
                self.prompts[kind], scores["white_box"][kind], scores["black_box"][kind], strict=True
            )
        ]
        with atomic_write(folder / "tables" / "one_step.csv") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["prompt", "prompts", *UNITS])
            for black, white, prompt, kind in sorted(rows, key=lambda row: -row[0]):
                writer.writerow([prompt, kind, f"{white:.6g}", f"{black:.6g}"])
