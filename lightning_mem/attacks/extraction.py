"""Generate and filter: draw much, keep what lies too near one training image, and say how often that errs."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.extraction_costs import cost_numbers, denoiser_calls
from lightning_mem.attacks.extraction_report import draw_triplets, extraction_table, write_extracted
from lightning_mem.attacks.extraction_scores import Extracted, Nearness, Rule, eidetic_numbers, numbers_under
from lightning_mem.diffusion import Sampler, ScoreTerm, Target, guidance_settings
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Banks, Number, Scene
from lightning_mem.records import Record, digest
from lightning_mem.types import SampleSet

PREFIX = "attack/extraction/"


class Extraction(AbstractAttack):
    r"""Extracts training images from many samples: those that lie much nearer to one than to its surroundings.

    .. math:: \ell(\hat x) = \frac{d_1}{\alpha\,\frac{1}{n}\sum_{j=1}^{n} d_j} < \text{cut}

    over the n nearest training images of the generation. Records, each under ``definition.rule`` and
    ``definition.cut``: ``attack/extraction/generations`` (share of them), ``.../images`` (how many different training
    images), ``.../generations_equal`` beside its held-out control on banks of one size, ``.../precision`` (1 - control
    / found), ``.../images_by_repeats`` (share of the images that stand ``definition.repeats`` times among the training
    images; only where some are repeated), and ``.../eidetic_images`` ((k, l2, delta)-eidetic: at most k training images
    lie within delta of it, itself included). Without a rule: ``.../evaluations`` (denoiser calls of the sampler, a
    generation) and ``.../seconds_per_image`` (of drawing and searching). ``tables/extracted.csv`` has a row for every
    extracted image.

    The generations are drawn and searched in parts; no more than one part is ever in memory, and a second run goes on
    with the part at which the first one stopped.

    Args:
        num_samples: How many are drawn.
        protection: What they are drawn under, by class_path, such as
            ``lightning_mem.defenses.CPSampleProtection``; null draws the target's own samples.
        cuts: Of the normalized L2, positive: where the literature cuts is not settled.
        neighbors: n; fewer where a bank is smaller.
        alpha: Positive.
        delta: RMS-L2 on [0, 1] of the eidetic counts and of the plain rule, in (0, 1).
        eidetic_k: Values of k, at least 1.
        part: Samples of a part: a file of its own, and what is in memory at a time.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        sample_seed: Of noise and labels; null takes ``seed_everything``.
        pictures: How many extracted images are shown beside their nearest and second nearest; 0 for none.

    Raises:
        ValueError: If a number is out of range, the protection rejects finished samples or does not belong to the
            target, or there are not two different training images.

    Undefined when:
        Banks of different sizes are compared: the normalized L2 depends on the size. Near-duplicates among the
        training images hide copies of them from it, but not from the plain rule.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 5.1 (adaptive
        distance) and 4.1 (eidetic memorization).
    """

    name = "extraction"
    threat_model = (
        "Extraction sees samples of the target and nothing else. Training images are read after the last sample, to "
        "say which samples are copies; an attacker without them would rank samples by how often they come."
    )

    def __init__(
        self,
        num_samples: int = 4096,
        protection: AbstractAddition | None = None,
        cuts: list[float] | None = None,
        neighbors: int = 50,
        alpha: float = 0.5,
        delta: float = 0.15,
        eidetic_k: list[int] | None = None,
        part: int = 4096,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int | None = None,
        pictures: int = 24,
    ) -> None:
        self.cuts = [1.0, 1.4] if cuts is None else list(cuts)
        self.eidetic_k = [1, 10] if eidetic_k is None else list(eidetic_k)
        for word, least, given in (
            ("num_samples", 1, num_samples), ("neighbors", 2, neighbors), ("part", 1, part), ("pictures", 0, pictures),
        ):  # fmt: skip
            if given < least:
                raise ValueError(f"{word} must be at least {least}, got {given}")
        if not self.cuts or min(self.cuts) <= 0 or len(set(self.cuts)) < len(self.cuts):
            raise ValueError(f"cuts must be different positive numbers, got {self.cuts}")
        if any(k < 1 for k in self.eidetic_k):
            raise ValueError(f"eidetic_k must be at least 1 (an image is within delta of itself), got {self.eidetic_k}")
        if not 0 < delta < 1 or not alpha > 0:
            raise ValueError(f"delta must lie in (0, 1) and alpha be positive, got {delta} and {alpha}")
        self.num_samples, self.part, self.pictures = num_samples, part, pictures
        self.protection, self._path = protection, ""
        self.neighbors, self.alpha, self.delta = neighbors, alpha, delta
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.drawing: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target and settings; see :class:`AbstractAttack`."""
        self._path = path
        rules = (self.cuts, self.neighbors, self.alpha, self.delta, self.eidetic_k)
        protection = guidance_settings(self._terms(target, 0, 1))
        if self.protection is not None and self.protection.judge(target, path) is not None:
            raise ValueError(
                "extraction draws every sample once: a protection that rejects finished samples is measured by "
                "lightning_mem.attacks.Protections"
            )
        return digest(target.digest, self.drawing, self.num_samples, self.part, rules, protection)

    def _terms(self, target: Target, first: int, count: int) -> Sequence[ScoreTerm]:
        rows = torch.arange(first, first + count)
        return () if self.protection is None else self.protection.terms(target, self._path, rows)

    def run(self, scene: Scene) -> list[Record]:
        """Draw every part, then search them one after the other; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        unseen = [not self._begun(scene.folder, first) for first in self._firsts]
        scene.first(lambda: None)  # all have looked before the first one draws
        settings: dict[str, Any] = {}
        drawing = dict.fromkeys(self._firsts, math.nan)
        for first, whole in zip(self._firsts, unseen, strict=True):
            begin, count = time.perf_counter(), min(self.part, self.num_samples - first)
            terms = self._terms(scene.target, first, count)
            settings = scene.draw(self._file(first), count, first=first, guidance=terms, **self.drawing).settings
            if whole:
                drawing[first] = time.perf_counter() - begin
        banks = Banks(scene.reference(), [], scene.workers)
        if banks.distinct("members") < 2:
            raise ValueError(f"extraction needs two different training images, got {banks.distinct('members')}")
        near = self._search(scene, banks, settings, drawing)
        rules: list[tuple[Rule, float]] = [("normalized_l2", cut) for cut in self.cuts]
        rules.append(("rms_l2", self.delta))
        about = {
            "num_samples": self.num_samples, "protection": settings.get("guidance", "none"), **settings,
            "neighbors": min(self.neighbors, banks.distinct("members")), "alpha": self.alpha,
        }  # fmt: skip
        numbers = [number for rule, cut in rules for number in numbers_under(near, banks, rule, cut, about)]
        numbers += eidetic_numbers(near, banks, self.delta, self.eidetic_k, about)
        calls = denoiser_calls(
            scene.target, self.drawing["sampler"], self.drawing["num_steps"],
            conditioned=scene.target.num_classes is not None,
        )  # fmt: skip
        numbers += cost_numbers(calls, near.seconds, about | banks.describe("members"), "generation")
        scene.first(lambda: self._write(scene.folder, near, banks, rules))
        seconds = time.perf_counter() - start
        return [self._record(number, scene, seconds) for number in numbers]

    def table(self, records: Sequence[Record]) -> Table:
        """One row a rule and cut."""
        return extraction_table(records, PREFIX)

    @property
    def _firsts(self) -> range:
        """Address of the first sample of each part."""
        return range(0, self.num_samples, self.part)

    @staticmethod
    def _file(first: int) -> str:
        return f"part{first:09d}"

    def _begun(self, folder: Path, first: int) -> bool:
        """Whether some of a part is on the disk."""
        return any((folder / "samples" / f"{self._file(first)}{end}").exists() for end in (".npz", ".blocks"))

    def _load(self, folder: Path, first: int) -> SampleSet:
        return SampleSet.load(folder / "samples" / f"{self._file(first)}.npz")

    def _search(self, scene: Scene, banks: Banks, settings: dict[str, Any], drawing: Mapping[int, float]) -> Nearness:
        """Search part by part; what was found is kept in a file a part, and not searched again."""
        reference = banks.reference
        searched = digest(
            settings, self.num_samples, self.part, self.neighbors, self.alpha, reference.mirror,
            reference.members_digest, reference.heldout_digest, reference.members.shape, reference.heldout.shape,
        )  # fmt: skip
        found = []
        for first in self._firsts:
            file = scene.folder / "parts" / searched / f"{self._file(first)}.npz"
            # no process comes to the next part before all have looked: what is searched in between is gathered
            if not file.is_file():
                begin = time.perf_counter()
                near = Nearness.of(self._load(scene.folder, first), banks, self.neighbors, self.alpha)
                near.seconds.fill_((drawing[first] + time.perf_counter() - begin) / len(near))
                scene.first(lambda near=near, file=file: near.save(file))  # type: ignore[misc]
            found.append(Nearness.load(file))
        return Nearness.join(found)

    def _write(self, folder: Path, near: Nearness, banks: Banks, rules: list[tuple[Rule, float]]) -> None:
        found = [Extracted.under(near, banks, rule, cut) for rule, cut in rules]
        write_extracted(folder / "tables" / "extracted.csv", near, banks, found, self.delta)

        def images_at(places: Tensor) -> Tensor:
            shown = torch.empty(len(places), *banks.images("members").shape[1:], dtype=torch.uint8)
            for part in (places // self.part).unique().tolist():
                own = places // self.part == part
                shown[own] = self._load(folder, part * self.part).images[places[own] % self.part]
            return shown

        if self.pictures:
            draw_triplets(folder / "images" / "extracted.png", near, banks, images_at, self.pictures)

    def _record(self, number: Number, scene: Scene, seconds: float) -> Record:
        reference = scene.reference()
        heldout = number.definition.get("bank") == "heldout"
        digest_of = reference.heldout_digest if heldout else reference.members_digest
        return scene.record(PREFIX, number, seed=self.drawing["seed"], data_digest=digest_of, seconds=seconds)
