"""What a protection brings: copies, nearness to real images, and cost, arm by arm, beside no protection."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_mem.attacks.protection_costs import Cost, middle
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.evaluation import Accepted, Comparison, Measure, Measurement, Number, Rules
from lightning_mem.evaluation.copies import ratio
from lightning_mem.evaluation.numbers import JACKKNIFE, absent, share
from lightning_mem.evaluation.quality import INTERVAL_DIM, space_of
from lightning_mem.metrics import (
    bootstrap_interval,
    frechet_distance_from_features,
    jackknife_interval,
)
from lightning_mem.records import Record

PREFIX = "defense/"
UNGUIDED, UNPROTECTED = "unguided", "none"

NEAR = 1 / 2
"""Cut of near copies: a laxer rule than that of a copy, so that a protection cannot just step over its edge."""

MEASURED = (
    "memorization/ratio", "memorization/copied_images", "memorization/nearest_mean", "memorization/ams/",
    "memorization/ums/", "frechet/", "fid/", "precision/", "recall/", "density/", "coverage/",
)  # fmt: skip
"""What is kept of a measurement; ``memorization/`` is left out of the names."""

OF_THE_ENDS = "ends of both shares' wilson 95%"


@dataclass(frozen=True)
class Arm:
    """Samples of one attack under one protection.

    Args:
        attack: ``unguided``, or the name of a guidance.
        protection: ``none``, or its name.
        drawn: The samples, and after how many tries each was accepted.
        judged: Samples could be rejected.
        cost: Of a draw; null where it was not measured.
        definition: What its numbers mean besides the samples' settings.
    """

    attack: str
    protection: str
    drawn: Accepted
    judged: bool = False
    cost: Cost | None = None
    definition: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        """A number's definition with the arm's; the rule that a protection follows is its ``protection_method``."""
        found = {("protection_method" if key == "protection" else key): value for key, value in definition.items()}
        return {**found, "attack": self.attack, "protection": self.protection, **self.definition}


@dataclass(frozen=True)
class Scored:
    """An arm with its numbers.

    Args:
        arm: The arm.
        measurement: Of its samples.
        records: Its numbers.
        features: Of its samples, float32 [N, d] by extractor.
    """

    arm: Arm
    measurement: Measurement
    records: list[Record]
    features: Mapping[str, Tensor]

    def record(self, what: str) -> Record:
        """The record of a number.

        Raises:
            KeyError: If there is none.
        """
        for record in self.records:
            if record.name == f"{PREFIX}{self.arm.protection}/{what}":
                return record
        raise KeyError(what)


def score_arms(arms: Sequence[Arm], measure: Measure, **about: Any) -> list[Scored]:
    """Measure every arm, and compare it with the unprotected arm of its attack, which comes before it.

    Args:
        arms: See :class:`Arm`.
        measure: Against the training images and the control.
        **about: Of every record: step, config_digest, run, seed.
    """
    found: list[Scored] = []
    bases: dict[str, Scored] = {}
    for arm in arms:
        scored = _scored(arm, measure, bases.get(arm.attack), about)
        bases.setdefault(arm.attack, scored)
        found.append(scored)
    return found


def _scored(arm: Arm, measure: Measure, base: Scored | None, about: Mapping[str, Any]) -> Scored:
    samples, prefix = arm.drawn.samples, f"{PREFIX}{arm.protection}/"
    measurement = measure(samples, **about)
    records = [
        replace(
            record, name=prefix + record.name.removeprefix("memorization/"), definition=arm.describe(record.definition)
        )
        for record in measurement.records
        if record.name.startswith(MEASURED) and not record.name.endswith(("_unseen", "/floor"))
    ]
    comparison = Comparison(samples, measure.banks, Rules(NEAR, measure.rules.delta))
    features = {extractor.name: comparison.features(extractor) for extractor in measure.extractors}
    scored = Scored(arm, measurement, records, features)
    like = scored.record("ratio")
    numbers = [
        replace(number, name=number.name.replace("memorization/ratio", "near_copies"))
        for number in ratio(comparison)
        if not number.name.endswith("_unseen")
    ]
    common = comparison.common
    numbers += _drawing(arm, common)
    if base is not None:
        numbers.append(_reduction(like, base.record("ratio"), common))
        numbers += _frechet_ratios(scored, base, measure, common)
    if arm.cost is not None:
        numbers += _costs(arm, arm.cost, None if base is None else base.arm, common)
    records += [told(number, prefix, like, arm.describe(number.definition)) for number in numbers]
    return scored


def told(number: Number, prefix: str, like: Record, definition: Mapping[str, Any]) -> Record:
    """A number as a record, with the run's fields of another."""
    low, high = number.interval or (None, None)
    return replace(
        like, name=prefix + number.name, value=number.value, low=low, high=high, n=number.n, unit=number.unit,
        definition=dict(definition),
    )  # fmt: skip


def _mean(name: str, values: Tensor, definition: Mapping[str, Any], unit: str = "fraction") -> Number:
    """A mean over samples, with a bootstrap where they differ."""
    values, ends, how = values.double(), None, {}
    if len(values) > 1 and values.min() < values.max():
        ends, how = bootstrap_interval(Tensor.mean, values), {"interval": "bootstrap 95%"}
    return Number(name, float(values.mean()), len(values), {**definition, **how}, ends, unit)


def _drawing(arm: Arm, common: Mapping[str, Any]) -> Iterator[Number]:
    """What drawing itself said: how often protections acted, and how many draws a sample took."""
    drawn = arm.drawn
    if drawn.samples.gate_rate is not None:
        yield _mean("gate_rate", drawn.samples.gate_rate, common)
    if arm.judged:
        yield share("accepted", int(drawn.accepted.sum()), len(drawn.accepted), dict(common))
        yield _mean("tries", drawn.tries, common, "draws per sample")


def copy_reduction(
    base: tuple[float, float, float], protected: tuple[float, float, float], n: int
) -> tuple[float, float, float]:
    r"""How many times fewer copies, and between which ends.

    .. math:: \frac{b}{\max(p, 1/n)}, \qquad \text{low} = \frac{b_\text{low}}{p_\text{high}}, \qquad
        \text{high} = \frac{b_\text{high}}{\max(p_\text{low}, 1/n)}

    Args:
        base: Share of copies without protection, and the ends of its interval.
        protected: The same with it.
        n: Samples of the protected arm: less than one copy among them cannot be told from none.

    Returns:
        Value, low and high.

    Raises:
        ValueError: If n is below 1, or a share is not in order or outside [0, 1].
    """
    for share_, low, high in (base, protected):
        if not 0 <= low <= share_ <= high <= 1:
            raise ValueError(f"a share must lie in its interval within [0, 1], got {share_} in [{low}, {high}]")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    floor = 1 / n
    return base[0] / max(protected[0], floor), base[1] / max(protected[2], floor), base[2] / max(protected[1], floor)


def share_of(record: Record) -> tuple[float, float, float]:
    """A share and the ends of its interval; the share itself where an end is not known."""
    value = float(record.value or 0.0)
    return value, value if record.low is None else record.low, value if record.high is None else record.high


def _reduction(own: Record, base: Record, common: Mapping[str, Any]) -> Number:
    if not base.value or own.value is None:
        return absent("copy_reduction", "the unprotected arm has no copy", dict(common), "ratio")
    value, *ends = copy_reduction(share_of(base), share_of(own), own.n)
    definition = {
        **common, "base": base.value, "threshold": own.definition["threshold"], "bank": "members",
        "bank_size": own.definition["bank_size"], "interval": OF_THE_ENDS,
    }  # fmt: skip
    return Number("copy_reduction", value, own.n, definition, (ends[0], ends[1]), "ratio")


def frechet_ratio(own: Tensor, base: Tensor, real: Tensor) -> tuple[float, tuple[float, float] | None]:
    r"""Fréchet distance of protected samples to real images over that of unprotected ones from the same noise.

    The interval is a block jackknife of the logarithm that leaves the same samples out of both arms.

    Args:
        own: [N, d] features of protected samples; row i started from the noise of row i of ``base``.
        base: [N, d] features of unprotected ones.
        real: [M, d] features of real images.

    Returns:
        The ratio and its 95 % interval; no interval for fewer than 40 samples or more than 512 features.

    Raises:
        ValueError: If the arms are not paired, or a distance is 0.
    """
    if own.shape != base.shape:
        raise ValueError(f"both arms must have the same samples and features, got {own.shape} and {base.shape}")

    def log_ratio(rows: Tensor) -> float:
        above, below = (frechet_distance_from_features(part[rows], real) for part in (own, base))
        if min(above, below) <= 0:
            raise ValueError("a Fréchet distance is 0: the ratio does not exist")
        return math.log(above / below)

    value, ends = math.exp(log_ratio(torch.arange(len(own)))), None
    if own.shape[1] <= INTERVAL_DIM and len(own) >= 40:
        low, high = jackknife_interval(log_ratio, len(own))
        ends = (math.exp(low), math.exp(high))
    return value, ends


def _frechet_ratios(own: Scored, base: Scored, measure: Measure, common: Mapping[str, Any]) -> Iterator[Number]:
    if len(measure.reference.heldout) < 2:
        return
    for extractor in measure.extractors:
        real = measure.banks.features("heldout", extractor)
        mine, theirs = (scored.features[extractor.name] for scored in (own, base))
        definition = {**common, **space_of(extractor), "bank": "heldout", "bank_size": len(real)}
        try:
            value, ends = frechet_ratio(mine, theirs, real)
        except ValueError as error:  # all that was drawn is still worth telling
            yield absent("frechet_ratio", str(error), definition, "ratio")
            continue
        how = {} if ends is None else {"interval": f"{JACKKNIFE} of the logarithm, paired"}
        yield Number("frechet_ratio", value, len(mine), {**definition, **how}, ends, "ratio")


def _costs(arm: Arm, cost: Cost, base: Arm | None, common: Mapping[str, Any]) -> Iterator[Number]:
    """Calls and seconds of a sample; a rejected one pays for all its draws."""
    tries, n = _mean("tries", arm.drawn.tries, common), len(arm.drawn.samples)
    draws = tries.value or 1.0
    least, most = tries.interval or (draws, draws)

    def number(
        name: str, value: float, unit: str, ends: tuple[float, float] | None = None, rows: int = n, **more: Any
    ) -> Number:
        span = None if ends is None else (ends[0] * least, ends[1] * most)
        return Number(name, value * draws, rows, {**common, **more}, span, unit)

    def of_draws(name: str, value: float, unit: str) -> Number:
        if tries.interval is None:
            return number(name, value, unit)
        return number(name, value, unit, (value, value), interval="bootstrap 95%")

    yield of_draws("evaluations", cost.evaluations, "network evaluations per sample")
    yield of_draws("classifier_evaluations", cost.classifier_evaluations, "classifier evaluations per sample")
    # a gate opens on other samples than those of the block that was counted, so the block only stands for them
    yield number(
        "classifier_gradients", cost.classifier_gradients, "classifier gradients per sample", rows=min(BLOCK, n)
    )
    if not cost.seconds:
        return
    timed = torch.tensor(cost.seconds, dtype=torch.float64)
    others = None if base is None or base.cost is None else torch.tensor(base.cost.seconds, dtype=torch.float64)
    for name, values, unit in (
        ("seconds", timed / BLOCK, "seconds per sample"),
        ("time_ratio", None if others is None else timed / others, "ratio"),
    ):
        if values is not None:
            value, ends, level = middle(values)
            more = {"interval": f"order statistics {100 * level:.3g}%", "turns": len(values), "timed_block": BLOCK}
            yield number(name, value, unit, ends, len(values), **more)


def floors(measure: Measure, like: Record, common: Mapping[str, Any], at_most: int) -> list[Record]:
    """``floor/members`` and ``floor/fresh``: what real images score as the arms do, as Fréchet distances to held-out.

    Args:
        measure: With the training images and the control.
        like: Of the run's records, for its fields.
        common: What every definition says.
        at_most: Fresh images that are asked for, the number of samples of an arm.
    """
    reference = measure.reference
    if len(reference.heldout) < 2:
        return []
    sets = {"members": reference.members[: len(reference.indices)]}
    if reference.fresh is not None:
        sets["fresh"] = reference.fresh(at_most)
    found, words = [], {"members": "training images", "fresh": "fresh images"}
    for extractor in measure.extractors:
        real = measure.banks.features("heldout", extractor)
        for name, images in sets.items():
            if len(images) < 2:
                continue
            # where mirror images count, an image is left out of the jackknife together with its mirror image
            turned = [images, images.flip(-1)] if reference.mirror else [images]
            features = torch.stack([measure.banks.extract(part, extractor) for part in turned], 1)

            def distance(rows: Tensor, features: Tensor = features, real: Tensor = real) -> float:
                return frechet_distance_from_features(features[rows].flatten(0, 1), real)

            n = len(images)
            definition = {
                **common, **space_of(extractor), "queries": words[name], "num_samples": n, "bank": "heldout",
                "bank_size": len(real),
            }  # fmt: skip
            ends = None
            if features.shape[2] <= INTERVAL_DIM and n >= 40:
                ends, definition["interval"] = jackknife_interval(distance, n), JACKKNIFE
            value = distance(torch.arange(n))
            number = Number(f"floor/{name}", value, n, definition, ends, "squared distance")
            found.append(told(number, PREFIX, like, definition))
    return found
