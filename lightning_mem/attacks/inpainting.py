"""The inpainting attack: half of an image is hidden, and a model that knows the image completes it better."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.completions import Completions, Half
from lightning_mem.attacks.conditions import (
    Captions,
    Conditions,
    Rule,
    check_captions,
    check_rule,
    conditions_of,
)
from lightning_mem.attacks.detection_report import statistics_table
from lightning_mem.attacks.extraction_costs import cost_numbers, denoiser_calls
from lightning_mem.attacks.inpainting_report import Side, draw_completions, write_images
from lightning_mem.attacks.loss_scores import loss_z
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation import Scene, Workers
from lightning_mem.metrics import roc
from lightning_mem.randomness import generator
from lightning_mem.records import Record, atomic_write, digest

PREFIX = "attack/inpainting/"


class Inpainting(AbstractAttack):
    r"""Tells members from held-out images by how well the model completes what it is not shown of them.

    Half of an image is hidden and completed ``num_inpaintings`` times; of these the ``kept`` with the lowest loss stay,
    and the image's score is minus their mean distance to the truth over the hidden half: larger = member. The distance
    is to the true image, so this is an audit (of what a partly known image gives away), not an attack in the dark.

    Records, for ``definition.statistic`` ``best`` (the kept) and ``all`` (no choice): ``attack/inpainting/distance``
    and ``distance_heldout`` (means over images), ``auc``, ``tpr_at_0.01`` and ``z`` (standard errors by which members
    are completed better). Without a statistic: ``evaluations`` (denoiser calls of an image, all its completions and
    their losses) and ``seconds_per_image``. ``tables/inpainting.csv`` has a row for every image;
    ``images/inpainting.png`` shows some beside their completions. A second run goes on where the first one stopped.

    Args:
        num_images: Members, and as many held-out images, drawn by address; null for all.
        num_inpaintings: Completions of an image, at least 1. The paper's number is told as 1,000 and as 5,000.
        kept: Completions with the lowest loss that are averaged, at least 1.
        half: Which half is hidden: ``left``, ``right``, ``top``, ``bottom``.
        timestep: Training timestep of the loss by which they are chosen.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1; null for 1, and 0 with other samplers. Without fresh noise an image
            cannot take back what it decided before the seen half had a say: more of them are wrong.
        sample_seed: Of noise and of the drawn images; null takes ``seed_everything``.
        block: Images of a network call: part of the definition.
        condition: What a text-to-image model is asked under; see :class:`AbstractMembership`.
        pictures: How many images of a side are shown beside their completions; 0 for none.

    Raises:
        ValueError: If a number is out of range, a class-conditional target meets images without labels, or a side has
            fewer than 2 images.

    Undefined when:
        Members and held-out images differ in more than membership: an image with an empty half is easy for everybody.

    Source:
        Carlini et al., Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 5.3. That distances
        are averaged over the kept, and not the images, is our reading.
    """

    name = "inpainting"
    threat_model = (
        "The inpainting audit shows the target half of an image and asks it for the rest; it may ask for noise "
        "predictions, to choose among completions. The score needs the whole image."
    )

    def __init__(
        self,
        num_images: int | None = 64,
        num_inpaintings: int = 1000,
        kept: int = 10,
        half: Half = "right",
        timestep: int = 100,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float | None = None,
        sample_seed: int | None = None,
        block: int = BLOCK,
        condition: Rule | None = None,
        pictures: int = 6,
    ) -> None:
        if num_images is not None and num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {num_images}")
        if not 1 <= kept <= num_inpaintings:
            raise ValueError(f"kept must lie in 1 .. num_inpaintings, got {kept} of {num_inpaintings}")
        if block < 1 or pictures < 0:
            raise ValueError(f"block must be at least 1 and pictures at least 0, got {block} and {pictures}")
        self.condition, self.conditions, self._captions = condition, Conditions(), ""
        self.num_images, self.num_inpaintings, self.kept = num_images, num_inpaintings, kept
        self.pictures = pictures
        self.half: Half = half
        self.timestep = timestep
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        eta = float(sampler == "ddim") if eta is None else eta
        self.drawing: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "eta": eta, "block": block}

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """A text-to-image model is asked under captions; see :class:`AbstractAttack`."""
        if target.conditioner is not None and self.condition != "empty":
            found = check_captions(captions(), self.condition)
            self._captions = "" if found is None else digest(found)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target and settings; see :class:`AbstractAttack`."""
        check_rule(target, self.condition)
        if not 0 <= self.timestep < target.process.num_timesteps:
            raise ValueError(f"timestep must lie in [0, {target.process.num_timesteps}), got {self.timestep}")
        if min(target.shape[1:]) < 2:
            raise ValueError(f"an image of {target.shape} in the denoiser's space has no half to hide")
        under = [word for word in (self.condition, self._captions) if word]
        return digest(target.digest, self._definition(), self.num_images, self.seed, *under)

    def _definition(self) -> dict[str, Any]:
        return {
            **self.drawing, "half": self.half, "num_inpaintings": self.num_inpaintings, "kept": self.kept,
            "timestep": self.timestep,
        }  # fmt: skip

    def run(self, scene: Scene) -> list[Record]:
        """Complete both sides' images; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        reference = scene.reference()
        heldout = reference.heldout[: len(reference.heldout) // (2 if reference.mirror else 1)]  # mirror images follow
        sides = {"members": reference.members[: len(reference.indices)], "heldout": heldout}
        if min(map(len, sides.values())) < 2:
            raise ValueError(
                f"the inpainting attack needs at least 2 members and 2 held-out images, got {len(sides['members'])} "
                f"and {len(heldout)}: raise data.num_heldout"
            )
        self.conditions = conditions_of(scene.target, reference, self.condition)
        found, seconds_each = {}, []
        for kind, images in sides.items():
            chosen = torch.randperm(len(images), generator=generator(self.seed, "inpainting images", kind))
            chosen = chosen[: self.num_images].sort().values
            completions = Completions(
                scene.target, images[chosen], self.half, self.num_inpaintings, self.timestep, self.seed, kind,
                self.drawing, scene.workers.device, self.conditions.part(kind, chosen).of(scene.target, kind),
            )  # fmt: skip
            scores, taken = self._all(scene, completions)
            found[kind] = Side(completions, chosen, scores, self.kept)
            seconds_each.append(taken)
        scene.first(lambda: self._write(scene.folder, found))
        seconds = time.perf_counter() - start
        records = [
            record
            for statistic, distances in (
                ("best", {kind: side.best for kind, side in found.items()}),
                ("all", {kind: side.every for kind, side in found.items()}),
            )
            for record in self._records(statistic, distances, scene, seconds)
        ]
        conditioned = self.conditions.kind in ("label", "caption")
        calls = denoiser_calls(
            scene.target, self.drawing["sampler"], self.drawing["num_steps"], conditioned=conditioned, further=1
        )
        about = {**self._definition(), **self.conditions.definition}
        costs = cost_numbers(calls * self.num_inpaintings, torch.cat(seconds_each), about, "image")
        digest_of = reference.members_digest
        records += [scene.record(PREFIX, n, seed=self.seed, data_digest=digest_of, seconds=seconds) for n in costs]
        return records

    def table(self, records: Sequence[Record]) -> Table:
        """One column a statistic."""
        return statistics_table(records, PREFIX, "attack inpainting")

    def _all(self, scene: Scene, completions: Completions) -> tuple[Tensor, Tensor]:
        """Scores [N, completions, 2] and seconds [N], a few images at a time, each group kept in a file."""
        block, count = int(self.drawing["block"]), completions.count
        together = max(1, block // count)
        found, seconds = [], []
        for group in torch.arange(len(completions.images)).split(together):
            file = scene.folder / "parts" / f"{completions.kind}_{int(group[0]):06d}.npz"
            # no process comes to the next group before all have looked: what is scored in between is gathered
            if not file.is_file():
                start = time.perf_counter()
                scores = self._group(completions, group, scene.workers, block)
                taken = time.perf_counter() - start
                scene.first(lambda scores=scores, file=file, taken=taken: _save(file, scores, taken))  # type: ignore[misc]
            with np.load(file, allow_pickle=False) as arrays:
                found.append(torch.from_numpy(arrays["scores"]))
                seconds.append(torch.full((len(group),), float(arrays["seconds"]) / len(group), dtype=torch.float64))
        return torch.cat(found), torch.cat(seconds)

    @staticmethod
    def _group(completions: Completions, group: Tensor, workers: Workers, block: int) -> Tensor:
        count, first = completions.count, int(group[0]) * completions.count

        def compute(rows: Tensor) -> Tensor:
            own = rows.unique()
            return completions.scores(own + first)[torch.searchsorted(own, rows)].to(workers.device)

        return workers.in_blocks(len(group) * count, compute, block).cpu().unflatten(0, (len(group), count))

    def _records(self, statistic: str, distances: dict[str, Tensor], scene: Scene, seconds: float) -> list[Record]:
        members, heldout = distances["members"], distances["heldout"]
        curve, half = roc(-members, -heldout), NormalDist().inv_cdf(0.975)
        n = len(members) + len(heldout)
        about = {
            **self._definition(), **self.conditions.definition, "statistic": statistic, "num_members": len(members),
            "num_heldout": len(heldout), "distance": "rms-l2 of the hidden half",
        }  # fmt: skip
        reference, z = scene.reference(), loss_z(members, heldout)

        def record(name: str, value: float, ends: tuple[float, float], interval: str, unit: str, n: int) -> Record:
            return Record(
                PREFIX + name, value, n, scene.step, *ends, scene.target.weights, self.seed, unit, round(seconds, 3),
                {**about, "interval": interval}, reference.members_digest, scene.config_digest, scene.home.name,
            )  # fmt: skip

        records = []
        for name, own in (("distance", members), ("distance_heldout", heldout)):
            mean, error = float(own.mean()), half * float(own.std()) / len(own) ** 0.5
            records.append(record(name, mean, (mean - error, mean + error), "normal over images", "rms-l2", len(own)))
        return [
            *records,
            record("auc", curve.auc, curve.auc_interval(), "delong", "fraction", n),
            record(
                "tpr_at_0.01", curve.tpr_at(0.01), curve.tpr_interval(0.01), "order statistics and wilson", "fraction",
                len(heldout),
            ),
            record("z", z, (z - half, z + half), "normal", "standard errors", n),
        ]  # fmt: skip

    def _write(self, folder: Path, sides: dict[str, Side]) -> None:
        write_images(folder / "tables" / "inpainting.csv", sides)
        if self.pictures:
            draw_completions(folder / "images" / "inpainting.png", sides, self.pictures)


def _save(file: Path, scores: Tensor, seconds: float) -> None:
    with atomic_write(file, "wb") as opened:
        np.savez(opened, allow_pickle=False, scores=scores.numpy(), seconds=np.float64(seconds))
