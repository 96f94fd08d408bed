"""SIDE's numbers: every arm measured alike, and compared with the unguided one sample by sample."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.unique_law import expected_unique
from lightning_mem.evaluation import Measure, Measurement
from lightning_mem.evaluation.copies import FEWEST_IMAGES
from lightning_mem.evaluation.numbers import JACKKNIFE, WILSON
from lightning_mem.metrics import bootstrap_interval, jackknife_interval, memorized
from lightning_mem.records import Record
from lightning_mem.types import SampleSet

PREFIX = "attack/side/"

FEWEST_HITS = 10
"""Hits of the unguided arm from which on a ratio to them has an interval: below, a resample may have none."""

NAMES = {"memorization/ratio": "hits", "memorization/copied_images": "unique_images"}
"""What the measurement's numbers are called here; ``_heldout`` stays behind them."""

BOOTSTRAP = "paired bootstrap 95%"


@dataclass(frozen=True)
class Arm:
    """Samples that are scored together.

    Args:
        name: ``definition.surrogate`` of its records.
        samples: The images.
        evaluations: Network evaluations that all of it took, classifier calls at their cost.
        paired: Row i started from the noise of row i of the unguided arm.
        targets: int64 [N], the class each sample was drawn for or picked by; null for none.
        places: Of a selection: int64 [N], the rows of ``pool`` that it took.
        pool: Of a selection: the unguided samples it took from.
        definition: What its numbers depend on besides the samples' settings.
    """

    name: str
    samples: SampleSet
    evaluations: float
    paired: bool = False
    targets: Tensor | None = None
    places: Tensor | None = None
    pool: SampleSet | None = None
    definition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What an arm gave.

    Args:
        arm: The arm.
        records: Its numbers.
        measurement: Of its samples; null where there are none.
        images: int64 [N], group of the nearest training image.
    """

    arm: Arm
    records: list[Record]
    measurement: Measurement | None = None
    images: Tensor | None = None

    @property
    def hits(self) -> Tensor:
        """bool [N]."""
        return torch.zeros(0, dtype=torch.bool) if self.measurement is None else self.measurement.memorized

    def counts(self, rows: int) -> Tensor:
        """How often each image was hit by the first samples; images that were not hit are left out."""
        if self.images is None:
            return torch.zeros(0, dtype=torch.int64)
        return self.images[:rows][self.hits[:rows]].unique(return_counts=True)[1]


def score_arms(arms: list[Arm], measure: Measure, *, step: int, config_digest: str, run: str, seed: int) -> list[Score]:
    """Measure every arm; the first is the unguided one.

    Args:
        arms: See :class:`Arm`.
        measure: Ratio, copied images and scores against the training images and the control.
        step: Optimizer steps of the target.
        config_digest: Of the target's run.
        run: Name of its folder.
        seed: Of the draw.
    """
    about: dict[str, Any] = {"step": step, "config_digest": config_digest, "run": run, "seed": seed}
    scores: list[Score] = []
    for arm in arms:
        if len(arm.samples) == 0:
            scores.append(Score(arm, [_absent(arm, measure, about)]))
            continue
        measurement = measure(arm.samples, **about)
        images = measure.banks.groups["members"][measurement.nearest]
        rule = f"nearest / second nearest < {measure.rules.threshold:.4g}, duplicates grouped"
        records = [found for record in measurement.records if (found := _renamed(record, arm, rule)) is not None]
        score = Score(arm, records, measurement, images)
        base = scores[0] if scores else None
        scores.append(replace(score, records=records + _extra(score, base, measure)))
    fair = next((score for score in scores if score.arm.name == "selection_equal_cost" and len(score.hits)), None)
    if fair is None:
        return scores
    return [
        replace(score, records=[*score.records, _over_selection(score, fair)])
        if score.arm.paired and score.arm.name != "none"
        else score
        for score in scores
    ]


def _over_selection(score: Score, fair: Score) -> Record:
    """Hits of a guided arm over those of the selection that cost as much; a bootstrap over all samples of both."""
    hits, guided = torch.cat([score.hits, fair.hits]), torch.zeros(len(score.hits) + len(fair.hits), dtype=torch.bool)
    guided[: len(score.hits)] = True

    def ratio(hits: Tensor, guided: Tensor) -> Tensor:
        mine, theirs = (((hits & part).sum() / part.sum().clamp(min=1)) for part in (guided, ~guided))
        return mine / theirs.clamp(min=0.5 / len(fair.hits))

    like = next(record for record in score.records if record.name == f"{PREFIX}hits")
    definition = {key: value for key, value in like.definition.items() if key != "interval"}
    named = replace(like, name=f"{PREFIX}gain_over_selection", unit="ratio", low=None, high=None)
    if not fair.hits.any():
        return replace(named, value=None, definition={**definition, "undefined": "the selection has no hit"})
    definition["base_samples"] = len(fair.hits)
    low, high = None, None
    if int(fair.hits.sum()) >= FEWEST_HITS:
        low, high = bootstrap_interval(ratio, hits, guided)
        definition["interval"] = "bootstrap 95%"
    return replace(named, value=float(ratio(hits, guided)), low=low, high=high, definition=definition)


def _renamed(record: Record, arm: Arm, rule: str) -> Record | None:
    """A record of the measurement as one of the attack; null for what is no number of these samples."""
    stem = record.name.removesuffix("_heldout")
    if stem.startswith(("memorization/ams/", "memorization/ums/")):
        name, how = stem.removeprefix("memorization/"), {}
    elif stem in NAMES:
        name, how = NAMES[stem], {"rule": rule}
    else:
        return None
    definition = {**record.definition, **arm.definition, "surrogate": arm.name, **how}
    return replace(record, name=PREFIX + name + record.name[len(stem) :], definition=definition)


def _absent(arm: Arm, measure: Measure, about: dict[str, Any]) -> Record:
    why = "no sample fell into a kept cluster"
    definition = {**arm.samples.settings, **arm.definition, "surrogate": arm.name, "undefined": why}
    digest = measure.reference.members_digest
    weights = arm.samples.weights
    return Record(f"{PREFIX}hits", None, 0, weights=weights, definition=definition, data_digest=digest, **about)


def _extra(score: Score, base: Score | None, measure: Measure) -> list[Record]:
    """Shares of distinct images, numbers per network evaluation, the concave law, and ratios to the unguided arm."""
    n, arm = len(score.hits), score.arm
    by_name = {record.name.removeprefix(PREFIX): record for record in score.records}
    like = by_name["hits"]
    plain = {key: value for key, value in like.definition.items() if key != "interval"}

    def number(
        name: str, value: float | None, ends: tuple[float, float] | None = None, unit: str = "fraction", **more: Any
    ) -> Record:
        low, high = (None, None) if ends is None else ends
        return replace(
            like, name=PREFIX + name, value=value, low=low, high=high, unit=unit, definition={**plain, **more}
        )

    found = []
    for end in ("", "_heldout"):
        images = by_name[f"unique_images{end}"]
        if images.value is not None:
            ends = [None if side is None else side / n for side in (images.low, images.high)]
            unit = "images per sample"
            record = replace(images, name=f"{PREFIX}unique_share{end}", value=images.value / n, unit=unit)
            found.append(replace(record, low=ends[0], high=ends[1]))
    for name, record in (("hits", like), ("unique", by_name["unique_images"])):
        per = (n if name == "hits" else 1) / arm.evaluations
        interval = None if record.low is None or record.high is None else (record.low * per, record.high * per)
        how = {} if interval is None else {"interval": WILSON if name == "hits" else JACKKNIFE}
        unit = f"{'hits' if name == 'hits' else 'images'} per network evaluation"
        found.append(number(f"{name}_per_evaluation", (record.value or 0.0) * per, interval, unit, **how))
    half = n // 2
    if half:
        law = float(expected_unique(score.counts(half), half, torch.tensor(n)))
        found.append(number("unique_predicted", law, unit="images", fitted_on=half))
    if base is not None:
        found += _gains(score, base, measure, number)
    return found


def _gains(score: Score, base: Score, measure: Measure, number: Any) -> list[Record]:
    """Hits and distinct images over those of the unguided arm."""
    arm = score.arm
    if arm.paired:
        mine, theirs, chosen = score.hits, base.hits, torch.ones(len(score.hits), dtype=torch.bool)
    else:
        if arm.pool is None or arm.places is None:
            raise ValueError(f"the arm {arm.name} is neither paired with the unguided one nor taken from a pool")
        distances, _ = measure.banks.search(arm.pool.images, "members", 2)
        theirs = memorized(distances, measure.rules.threshold)
        chosen = torch.zeros(len(theirs), dtype=torch.bool)
        chosen[arm.places] = True
        mine = theirs

    def ratio(a: Tensor, own: Tensor, b: Tensor) -> Tensor:
        # a resample without any hit would divide by 0
        return (a & own).sum() / own.sum().clamp(min=1) / b.double().mean().clamp(min=0.5 / len(b))

    if not theirs.any():
        return [number("ams_gain", None, unit="ratio", undefined="the unguided arm has no hit")]
    interval = None
    if int(theirs.sum()) >= FEWEST_HITS:
        interval = bootstrap_interval(ratio, mine, chosen, theirs)
    how = {} if interval is None else {"interval": BOOTSTRAP}
    found = [number("ams_gain", float(ratio(mine, chosen, theirs)), interval, "ratio", base_samples=len(theirs), **how)]
    if arm.paired and score.images is not None and base.images is not None:
        found.append(_unique_gain(score, base, number))
    return found


def _unique_gain(score: Score, base: Score, number: Any) -> Record:
    """Distinct images over those of the unguided arm, with a block jackknife over the pairs."""

    def distinct(one: Score, rows: Tensor) -> int:
        return 0 if one.images is None else len(one.images[rows][one.hits[rows]].unique())

    def ratio(rows: Tensor) -> float:
        return distinct(score, rows) / max(distinct(base, rows), 0.5)

    n = len(score.hits)
    rows = torch.arange(n)
    fewest = min(distinct(one, rows) for one in (score, base))
    if distinct(base, rows) == 0:
        return number("unique_gain", None, unit="ratio", undefined="the unguided arm has no hit")
    interval = None
    if fewest >= FEWEST_IMAGES and n >= 20:
        low, high = jackknife_interval(ratio, n)
        interval = (max(0.0, low), high)
    how = {} if interval is None else {"interval": JACKKNIFE}
    return number("unique_gain", ratio(rows), interval, "ratio", **how)
