"""What membership attacks share: one score per image and timestep, two attackers who read it, and what is recorded."""

import copy
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.conditions import Captions, Conditions, Rule, check_captions, check_rule, conditions_of
from lightning_mem.attacks.loss_scores import RATES, all_verdicts, verdict_numbers
from lightning_mem.attacks.membership_scores import (
    Sides,
    calibration_scores,
    curve_numbers,
    fitted_accuracy,
    image_rows,
    source_indices,
    told_images,
    unresolved,
)
from lightning_mem.attacks.report import short
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target, guidance_settings
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Number, Reference, Scene, Workers
from lightning_mem.evaluation.table import LOOK, write_rows
from lightning_mem.metrics import two_sample_p_value
from lightning_mem.records import Record, digest

SHIFT = 0.01
"""Below this p value members and held-out images are said to differ in kind."""

EXTRAS = ("shift_p_value", "evaluations", "seconds_per_image", "auc_curve")
"""Numbers that belong to no verdict."""


@dataclass(frozen=True)
class Told:
    """Scores of one target.

    Args:
        scores: float64 [m, T] and [n, T] by arm, larger = member; NaN where an image was learned from.
        settings: What each arm is, flat.
        times: The T timesteps.
        seconds: What asking took, for all arms, images and timesteps.
    """

    scores: Mapping[str, Sides]
    settings: Mapping[str, Mapping[str, Any]]
    times: Sequence[int]
    seconds: float

    def tested(self, arm: str) -> Sides:
        """Of the images that were not learned from."""
        own, other = (side[~side.isnan().any(1)] for side in self.scores[arm])
        return own, other


class AbstractMembership(AbstractAttack):
    """A membership attack: an error per image and timestep, lower = member; the score is its negative.

    Two attackers read the scores. The fixed one was told ``timesteps`` beforehand and takes the higher score for a
    member. The calibrated one picks t among ``candidates``, sign and threshold on half of the images, whose membership
    it knows, and is told on the other half. Records of both, for every arm (``definition.protection``): ``z``, ``auc``,
    ``auc_folded``, ``tpr_at_0.01``, ``tpr_at_0.001``; of the calibrated one ``balanced_accuracy``; ``auc_curve`` at
    every timestep of ``curve``; ``evaluations`` (denoiser calls an image), ``seconds_per_image`` and ``shift_p_value``
    (are members and held-out images of one kind?). ``tables/membership.csv`` has every image's scores beside what the
    ledger says of it.

    Args:
        protection: What the denoiser is protected by, by class_path; null attacks the plain denoiser only.
        setting: Word for ``definition.setting``.
        timesteps: Training timesteps of the fixed attacker, increasing; null takes the method's own.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        curve: Timesteps of ``auc_curve``, increasing; null for none.
        noise_seed: Of noise and split; null takes ``seed_everything``.
        condition: What a text-to-image model is asked about an image under: its ``caption``, or the ``empty`` prompt;
            null for the caption where the data have captions. A class-conditional model is asked under the image's
            label. It stands in ``definition.condition``.
        block: Images of a network call: part of the definition where it is not 64.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target or changes no denoiser
            (a rejection of samples).
    """

    title: str
    default_timesteps: tuple[int, ...]

    def __init__(
        self,
        protection: AbstractAddition | None = None,
        setting: str = "",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        self.timesteps = list(self.default_timesteps if timesteps is None else timesteps)
        self.candidates = self.timesteps if candidates is None else list(candidates)
        self.curve = [] if curve is None else list(curve)
        for word, given in (("timesteps", self.timesteps), ("candidates", self.candidates), ("curve", self.curve)):
            if (not given and word != "curve") or given != sorted(set(given)) or min(given, default=0) < 0:
                raise ValueError(f"{word} must be training timesteps >= 0 in increasing order, got {given}")
        self.protection, self.setting = protection, setting
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if noise_seed is None else noise_seed
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.condition, self.conditions, self.block = condition, Conditions(), block
        self._path = self._captions = ""

    @property
    def times(self) -> list[int]:
        """All timesteps that are asked at."""
        return sorted({*self.timesteps, *self.candidates, *self.curve})

    @property
    def prefix(self) -> str:
        """Of the records' names."""
        return f"attack/{self.name}/"

    @property
    def about(self) -> dict[str, Any]:
        """The method's own settings, flat, for definitions."""
        return {}

    @property
    def _blocks(self) -> dict[str, int]:
        """The size of blocks, where it is another than that of all measurements."""
        return {} if self.block == BLOCK else {"block": self.block}

    @abstractmethod
    def side_errors(
        self, target: Target, images: Tensor, arms: Mapping[str, Sequence[ScoreTerm]], name: str, workers: Workers
    ) -> dict[str, Tensor]:
        """The error of every image at every one of ``times`` by arm, float64 [N, T], lower = member.

        Args:
            target: The model.
            images: uint8 [N, C, H, W].
            arms: Score terms by the arm's name; none for the plain denoiser.
            name: ``members`` or ``heldout``: with the row, the address of an image's noise.
            workers: How blocks are dealt out.
        """

    @abstractmethod
    def evaluations(self, t: int) -> int:
        """Denoiser calls that the error of one image at one timestep takes."""

    def reach(self, times: Sequence[int]) -> int:
        """The largest timestep that is asked at."""
        return max(times)

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """A text-to-image model is asked under captions; see :class:`AbstractAttack`."""
        if target.conditioner is not None and self.condition != "empty":
            found = check_captions(captions(), self.condition)
            self._captions = "" if found is None else digest(found)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, protection and settings; see :class:`AbstractAttack`."""
        last = self.reach(self.times)
        if last >= target.process.num_timesteps:
            raise ValueError(f"timesteps must lie in [0, {target.process.num_timesteps}), got {last}")
        check_rule(target, self.condition)
        self._path = path
        protection = arm_settings(self._terms(target, 1))
        asked = (self.timesteps, self.candidates, self.curve)
        under = [word for word in (self.condition, self._captions) if word] + list(self._blocks.values())
        return digest(target.digest, protection, self.setting, *asked, self.about, self.seed, *under)

    def _terms(self, target: Target, count: int) -> Sequence[ScoreTerm]:
        """Of the protection; refuses one that leaves the denoiser as it is, whose arm would be that of none."""
        if self.protection is None:
            return ()
        terms = self.protection.terms(target, self._path, torch.arange(count))
        if not terms:
            raise ValueError(
                f"{type(self.protection).__name__} changes no denoiser, it judges finished samples: {self.title} asks "
                "the denoiser and has nothing to ask; what such a protection leaves is told by "
                "lightning_mem.attacks.Protections"
            )
        return terms

    def scores(
        self, target: Target, images: Sides, arms: Mapping[str, Sequence[ScoreTerm]], workers: Workers
    ) -> dict[str, Sides]:
        """Scores of all images by arm, float64 [m, T] and [n, T], larger = member.

        Args:
            target: The model.
            images: uint8 [m, C, H, W] and [n, C, H, W].
            arms: Score terms by the arm's name; none for the plain denoiser.
            workers: How blocks are dealt out.

        Raises:
            ValueError: If a score is not finite.
        """
        sides = [
            self.side_errors(target, side, arms, name, workers)
            for side, name in zip(images, ("members", "heldout"), strict=True)
        ]
        for found in (found for side in sides for found in side.values()):
            if not torch.isfinite(found).all():
                raise ValueError(f"{int((~torch.isfinite(found)).sum())} of {found.numel()} scores are not finite")
        return {arm: (-sides[0][arm], -sides[1][arm]) for arm in arms}

    def tell(self, target: Target, images: Sides, workers: Workers) -> Told:
        """Ask the plain denoiser, and the protected one where there is one, about all images."""
        start = time.perf_counter()
        terms = self._terms(target, max(map(len, images)))
        arms: dict[str, Sequence[ScoreTerm]] = {"none": ()}
        settings: dict[str, dict[str, Any]] = {"none": {"protection": "none"}}
        if terms:
            own = arm_settings(terms)
            arms[str(own["protection"])], settings[str(own["protection"])] = terms, own
        found = self.scores(target, images, arms, workers)
        return Told(found, settings, self.times, time.perf_counter() - start)

    def at(self, times: Sequence[int]) -> Self:
        """The same attack at other timesteps, with no curve."""
        other = copy.copy(self)
        other.timesteps = other.candidates = list(times)
        other.curve = []
        return other

    def tell_plain(self, target: Target, images: Sides, workers: Workers) -> Told:
        """Ask the plain denoiser alone."""
        start = time.perf_counter()
        found = self.scores(target, images, {"none": ()}, workers)
        return Told(found, {"none": {"protection": "none"}}, self.times, time.perf_counter() - start)

    def run(self, scene: Scene) -> list[Record]:
        """Ask about all images, then tell them apart; see :class:`AbstractAttack`."""
        reference = scene.reference()
        images = told_images(reference, self.title)
        self.conditions = conditions_of(scene.target, reference, self.condition)
        told = self.tell(scene.target, images, scene.workers)
        numbers = [*self.numbers(told), *self.extra_numbers(told, shift(images, self.title))]
        scene.first(lambda: self.write(scene, reference, told))
        return [self.record(number, scene, reference.members_digest, told.seconds) for number in numbers]

    def numbers(self, told: Told) -> list[Number]:
        """What both attackers reach on every arm."""
        found = []
        for arm in told.scores:
            own, other = told.tested(arm)
            for verdict in all_verdicts(arm, -own, -other, told.times, self.timesteps, self.candidates, self.seed):
                numbers = verdict_numbers(verdict)
                further = {}
                if verdict.attacker == "calibrated":
                    further["candidates"] = " ".join(map(str, self.candidates))
                    known = calibration_scores((own, other), told.times.index(verdict.t), verdict.sign, self.seed)
                    numbers.append(fitted_accuracy(verdict, known))
                found += [self.defined(number, told.settings[arm], further) for number in numbers]
        return found

    def extra_numbers(self, told: Told, p_value: float) -> list[Number]:
        """The curve over timesteps of every arm, what asking cost, and whether the two sides are of one kind."""
        found = []
        for arm in told.scores:
            curve = curve_numbers(told.tested(arm), told.times, self.curve)
            found += [self.defined(number, told.settings[arm]) for number in curve]
        count = sum(map(len, told.scores["none"]))
        about = {**told.settings["none"], "attacker": "none"}
        for t in self.timesteps:
            calls = float(self.evaluations(t))
            found.append(self.defined(Number("evaluations", calls, count, {"t": t}, None, "denoiser calls"), about))
        seconds = told.seconds / count
        asked = {**about, "timesteps": " ".join(map(str, told.times)), "arms": len(told.scores)}
        found.append(self.defined(Number("seconds_per_image", seconds, count, {}, None, "seconds"), asked))
        test = {"test": "kernel two-sample, permutations", "extractor": "pixels"}
        found.append(self.defined(Number("shift_p_value", p_value, count, test, None, "probability"), about))
        return found

    def defined(self, number: Number, *settings: Mapping[str, Any]) -> Number:
        """A number with what it means: arm, setting and the method's own settings."""
        about = {key: value for part in settings for key, value in part.items()}
        asked = {**self.conditions.definition, **self._blocks, **self.about}
        definition = {**about, "setting": self.setting, **asked, **number.definition}
        return Number(number.name, number.value, number.n, definition, number.interval, number.unit)

    def record(self, number: Number, scene: Scene, data_digest: str, seconds: float) -> Record:
        """A number as it is recorded."""
        return scene.record(self.prefix, number, seed=self.seed, data_digest=data_digest, seconds=seconds)

    def write(self, scene: Scene, reference: Reference, told: Told) -> None:
        """``tables/membership.csv``."""
        columns = {"score" if arm == "none" else f"score_{arm}": sides for arm, sides in told.scores.items()}
        write_images(scene, reference, columns, dict.fromkeys(columns, told.times))

    def table(self, records: Sequence[Record]) -> Table:
        """One row an arm and attacker."""
        heldout = max(int(r.definition["num_heldout"]) for r in records if "num_heldout" in r.definition)
        caption = (
            "z: standard errors by which members' mean error is below that of held-out images; 2 or more either way is "
            "a leak; calibrated: t and sign (-: a high error means member) picked on the other half of the images; "
            "intervals of all are in the records"
        )
        caption = "; ".join(filter(None, (caption, unresolved(RATES, heldout))))
        table = Table(title=self.title, title_justify="left", title_style="bold", caption=caption, **LOOK)
        table.caption_justify = "left"
        for heading in ("protection", "attacker", "t", "n", "z", "auc", "tpr at\n0.01", "tpr at\n0.001"):
            table.add_column(
                heading, justify="left" if heading in ("protection", "attacker") else "right", no_wrap=True
            )
        groups: dict[tuple[Any, ...], dict[str, Record]] = {}
        for record in records:
            name, about = record.name.removeprefix(self.prefix), record.definition
            if name not in EXTRAS and "attacker" in about:
                key = about["protection"], about["attacker"], about["t"], about["sign"]
                groups.setdefault(key, {})[name] = record
        for (protection, attacker, t, sign), own in groups.items():
            about = own["z"].definition
            table.add_row(
                protection, attacker, f"{t}{'-' if sign < 0 else ''}", f"{about['num_members']}+{about['num_heldout']}",
                f"{own['z'].value:.1f}", short(own["auc"]), *(f"{own[f'tpr_at_{rate}'].value:.2f}" for rate in RATES),
            )  # fmt: skip
        return table


def arm_settings(terms: Sequence[ScoreTerm]) -> dict[str, Any]:
    """What an arm's protection is, with its name under ``protection``."""
    found = {key: value for key, value in guidance_settings(terms).items() if key != "guidance_clip"}
    return {"protection": found.get("guidance", "none"), **found}


def shift(images: Sides, attack: str) -> float:
    """The p value of members and held-out images being of one kind, by their pixels; warns where it is small."""
    p = two_sample_p_value(*images)
    if p < SHIFT:
        warnings.warn(
            f"members and held-out images differ in more than membership (two-sample test on pixels, p = {p:.3g}): "
            f"{attack} may tell two kinds of images apart; take both from one source by a random draw",
            stacklevel=2,
        )
    return p


def write_images(
    scene: Scene, reference: Reference, columns: Mapping[str, Sides], times: Mapping[str, Sequence[int]]
) -> None:
    """``tables/membership.csv``: scores of every image by column, beside its row of the run's ledger.

    Args:
        scene: Of the attack.
        reference: Its images.
        columns: float64 [m, T] and [n, T] by the column's name.
        times: The T timesteps of each.
    """
    count = len(next(iter(columns.values()))[1])
    indices = source_indices(scene.home, reference, count)
    write_rows(scene.folder / "tables" / "membership.csv", image_rows(columns, times, indices, scene.ledger()))
