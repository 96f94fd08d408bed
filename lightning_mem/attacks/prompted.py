"""Prompted extraction: many generations of each prompt, and the prompts whose generations agree."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.cliques import largest_cliques, tightest, tiled_distances
from lightning_mem.attacks.conditions import Captions
from lightning_mem.attacks.extraction_costs import cost_numbers, denoiser_calls
from lightning_mem.attacks.placement import placed
from lightning_mem.attacks.prompted_report import FOUND, Verdict, draw_found, prompted_numbers, write_prompts
from lightning_mem.attacks.prompts import condition_of, filled, prompt_lists, rows_of, with_cfg
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target, sample
from lightning_mem.evaluation import Scene
from lightning_mem.metrics.eidetic import check_tiles
from lightning_mem.randomness import derive_seed
from lightning_mem.records import Record, digest
from lightning_mem.types import SampleSet

PREFIX = "attack/prompted/"


class PromptedExtraction(AbstractAttack):
    r"""Extracts training images by their captions: a memorized prompt gives nearly the same image again and again.

    For every prompt, ``num_generations`` samples are the vertices of a graph, with an edge where their tiled distance
    (:func:`tiled_distances`) is at most ``delta_edge``. The prompt is flagged where some clique has at least
    ``clique_size`` vertices; flagged prompts are ranked by the mean distance within their tightest such clique, small
    first. What is claimed of a flagged prompt is the clique's medoid. With ``verify``, it counts as extracted where a
    training image lies within ``delta`` of it (tiled), beside the same with held-out images.

    Records: ``attack/prompted/flagged`` (share of the prompts) and ``flagged_heldout`` (of ``heldout_prompts``),
    ``precision`` (share of the flagged that are extracted) and ``precision_heldout``, ``images`` (different training
    images), ``clique_size`` (mean over prompts of the largest), ``evaluations`` (denoiser calls of a generation) and
    ``seconds_per_image`` (of drawing it and searching the graph). ``tables/prompts.csv`` has a row for every prompt, in
    order of rank.

    Prompts are worked through one after the other, each dealt out to all processes; of its generations only those
    nearest the medoid stay, in ``samples/prompts``. A second run goes on with the prompt where the first one stopped.

    Args:
        prompts: A list, or a file: ``.csv`` with a column ``caption``, ``prompt`` or ``text``, else one a line. Of a
            class-conditional target its labels, as text. null takes the captions of the data's members, and those of
            held-out images as the control; of a class-conditional target all its labels.
        heldout_prompts: Prompts of images that were not trained on, likewise: the control; null for none.
        num_generations: Samples of a prompt, at least 2; the paper's number is 500.
        cfg_weight: Of classifier-free guidance, 1 for none; null leaves the target's own (class-conditional models).
        delta_edge: RMS-L2 on [0, 1] up to which two generations are neighbours, in (0, 1). The paper does not tell
            its value: calibrate it by the control.
        clique_size: Vertices from which on a clique flags its prompt, at least 2.
        tiles: Tiles along each side; they must divide both sides of an image.
        delta: Tiled RMS-L2 up to which a training image counts as extracted, in (0, 1).
        verify: Whether to read the training images, after the last sample, and compare.
        kept: Generations of a prompt that stay on disk: those nearest the medoid, itself first.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        sample_seed: Of noise, with the prompt itself; null takes ``seed_everything``.
        block: Images of a network call: part of the definition.
        pictures: How many flagged prompts are shown; 0 for none.

    Raises:
        ValueError: If a number is out of range, there is no prompt, a file has none, or the target takes none.

    Undefined when:
        Generations agree for another reason than memory: a prompt for a blank page, a model that has collapsed. The
        control shows it.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 4.2. The medoid is a
        choice of ours.
    """

    name = "prompted"
    threat_model = (
        "Prompted extraction gives prompts to the target and sees its samples. The prompts are captions that the "
        "attacker knows or guesses; training images are read after the last sample, to check what was found."
    )

    def __init__(
        self,
        prompts: list[str] | str | None = None,
        heldout_prompts: list[str] | str | None = None,
        num_generations: int = 500,
        cfg_weight: float | None = 7.5,
        delta_edge: float = 0.1,
        clique_size: int = 10,
        tiles: int = 4,
        delta: float = 0.15,
        verify: bool = True,
        kept: int = 16,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int | None = None,
        block: int = BLOCK,
        pictures: int = 24,
    ) -> None:
        for word, least, given in (
            ("num_generations", 2, num_generations), ("clique_size", 2, clique_size), ("kept", 1, kept),
            ("block", 1, block), ("pictures", 0, pictures), ("tiles", 1, tiles),
        ):  # fmt: skip
            if given < least:
                raise ValueError(f"{word} must be at least {least}, got {given}")
        if clique_size > num_generations:
            raise ValueError(f"clique_size {clique_size} is more than the {num_generations} generations of a prompt")
        if not 0 < delta_edge < 1 or not 0 < delta < 1:
            raise ValueError(f"delta_edge and delta must lie in (0, 1), got {delta_edge} and {delta}")
        self.prompts = prompt_lists(prompts, heldout_prompts)
        self.rules = {"delta_edge": delta_edge, "clique_size": clique_size, "tiles": tiles}
        self.num_generations, self.cfg_weight, self.block = num_generations, cfg_weight, block
        self.delta, self.verify, self.kept, self.pictures = delta, verify, kept, pictures
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.seed = seed
        self.drawing: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "eta": eta, "block": block}

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """Without prompts the captions are the prompts; see :class:`AbstractAttack`."""
        self.prompts = filled(self.prompts, target, captions)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, prompts and settings; see :class:`AbstractAttack`."""
        self.prompts = filled(self.prompts, target, lambda: None)
        with_cfg(target, self.cfg_weight)  # refuses before anything is drawn, as does what follows
        for prompts in self.prompts.values():
            condition_of(target, prompts[:1] if target.num_classes is None else prompts)
        check_tiles(int(self.rules["tiles"]), *target.codec.pixel_shape(target.shape)[1:])
        return digest(target.digest, self.prompts, self._settings(target), self.delta, self.verify, self.kept)

    def _settings(self, target: Target) -> dict[str, Any]:
        """What a prompt's generations and their cliques depend on, besides the prompt."""
        return {
            **self.drawing, "sample_seed": self.seed, "target": target.digest, "cfg_weight": self.cfg_weight,
            "num_generations": self.num_generations, **self.rules,
        }  # fmt: skip

    def run(self, scene: Scene) -> list[Record]:
        """Work through the prompts, then verify what was flagged; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        target = placed(with_cfg(scene.target, self.cfg_weight), scene.workers.device)
        found = [
            self._prompt(scene, target, prompt, kind) for kind, prompts in self.prompts.items() for prompt in prompts
        ]
        digests = {"members": "", "heldout": ""}
        banks: dict[str, Tensor] = {}
        if self.verify:
            reference = scene.reference()
            banks = {"members": reference.members, "heldout": reference.heldout}
            digests = {"members": reference.members_digest, "heldout": reference.heldout_digest}
            for bank, images in banks.items():
                self._verify(scene, found, bank, images)
        numbers = prompted_numbers(found, self.delta, self._settings(target), banks)
        calls = denoiser_calls(target, self.drawing["sampler"], self.drawing["num_steps"], conditioned=True)
        seconds_each = torch.tensor([verdict.seconds for verdict in found]) / self.num_generations
        each = seconds_each.repeat_interleave(self.num_generations)
        numbers += cost_numbers(calls, each, self._settings(target), "generation")
        ranked = sorted(found, key=lambda verdict: verdict.rank)

        def write() -> None:
            indices = scene.reference().indices[scene.reference().owners] if self.verify else None
            write_prompts(scene.folder / "tables" / "prompts.csv", ranked, indices)
            shown = [verdict for verdict in ranked if verdict.flagged][: self.pictures]
            if shown:
                draw_found(scene.folder / "images" / "flagged.png", shown, banks.get("members"))

        scene.first(write)
        seconds = time.perf_counter() - start
        return [
            scene.record(
                PREFIX, n, seed=self.seed, data_digest=digests[n.definition.get("bank", "members")], seconds=seconds
            )
            for n in numbers
        ]

    def _prompt(self, scene: Scene, target: Target, prompt: str, kind: str) -> Verdict:
        """What one prompt gives; read from its file where it is there."""
        settings = {**self._settings(target), "prompt": prompt}
        file = scene.folder / "samples" / "prompts" / f"{digest(prompt)}.npz"
        # no process comes to the next prompt before all have looked: what is drawn in between is gathered
        kept = SampleSet.load(file) if file.with_suffix(".json").is_file() else None
        if kept is not None and {key: kept.settings.get(key) for key in settings} != settings:
            raise ValueError(
                f"{file} holds another draw ({kept.settings}) than this one ({settings}): remove it or choose another "
                "--out"
            )
        if kept is None:
            start = time.perf_counter()
            images = self._generate(scene, target, prompt)
            distances = tiled_distances(images, tiles=int(self.rules["tiles"]), workers=scene.workers)
            scene.first(lambda: self._sum_up(images, distances, settings, target, start).save(file))
            kept = SampleSet.load(file)
        found = {key: kept.settings[key] for key in FOUND}
        flagged = found["largest"] >= self.rules["clique_size"]
        # nothing else of a prompt stays in memory
        claimed = kept.images[0].clone() if flagged else kept.images.new_empty(0)
        return Verdict(prompt, kind, flagged, claimed, int(kept.addresses[0]), **found)

    def _generate(self, scene: Scene, target: Target, prompt: str) -> Tensor:
        workers, condition = scene.workers, condition_of(target, [prompt])

        def draw(rows: Tensor) -> Tensor:
            own = rows.unique()
            images = sample(
                target, own, seed=derive_seed(self.seed, "prompt", prompt),
                condition=rows_of(condition, torch.zeros_like(own)), **self.drawing,
            )  # fmt: skip
            return images[torch.searchsorted(own, rows)].to(workers.device)

        return workers.in_blocks(self.num_generations, draw, self.block, "drawing generations").cpu()

    def _sum_up(
        self, images: Tensor, distances: Tensor, settings: dict[str, Any], target: Target, start: float
    ) -> SampleSet:
        """The generations nearest the medoid, itself first, and in the settings what was found since ``start``."""
        size = int(self.rules["clique_size"])
        cliques = largest_cliques(distances, float(self.rules["delta_edge"]))
        chosen = tightest(cliques, size)
        vertices = torch.tensor([0]) if chosen is None else torch.tensor(chosen.vertices)
        medoid = 0 if chosen is None else chosen.medoid(distances)
        places = vertices[distances[medoid, vertices].argsort(stable=True)]
        places = torch.cat([torch.tensor([medoid]), places[places != medoid]])[: self.kept]
        edges = int((distances <= self.rules["delta_edge"]).triu(1).sum())
        found = {
            "edges": edges, "largest": len(cliques[0].vertices) if cliques else 1,
            "clique": 1 if chosen is None else len(chosen.vertices),
            "mean_distance": None if chosen is None else chosen.mean_distance,
            "exact": all(clique.exact for clique in cliques), "seconds": time.perf_counter() - start,
        }  # fmt: skip
        return SampleSet(images[places], places, None, target.weights, {**settings, **found})

    def _verify(self, scene: Scene, found: Sequence[Verdict], bank: str, images: Tensor) -> None:
        """Put the nearest image of a bank, and how far it is, into the flagged verdicts."""
        flagged = [verdict for verdict in found if verdict.flagged]
        if not flagged or len(images) == 0:
            return
        claimed = torch.stack([verdict.image for verdict in flagged])
        best, row = torch.full((len(claimed),), torch.inf, dtype=torch.float64), torch.zeros(len(claimed)).long()
        step = max(1, (1 << 28) // images[0].numel())  # of the bank at a time: 2 GiB in float64
        for start in range(0, len(images), step):
            part = images[start : start + step]
            near, which = tiled_distances(claimed, part, int(self.rules["tiles"]), workers=scene.workers).min(1)
            row, best = torch.where(near < best, which + start, row), torch.minimum(near, best)
        for verdict, distance, place in zip(flagged, best.tolist(), row.tolist(), strict=True):
            verdict.nearest[bank] = (distance, place)
