"""Protections over seeds: every number of every arm pooled, and the ratios of targets that were trained otherwise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_mem.attacks.protection_scores import PREFIX, UNGUIDED, UNPROTECTED, copy_reduction, share_of
from lightning_mem.records import Record
from lightning_mem.studies.base import Run
from lightning_mem.studies.pooling import pooled_ratio, pooled_record, pooled_share, seeds_interval
from lightning_mem.studies.protection_rows import PLAIN

LOSS = "attack/loss/"

SHARES = ("ratio", "near_copies", "accepted", "ams/")
"""Starts of names of shares of independent samples; they have Wilson's interval over all samples too."""

OF_POOLED = "ends of both pooled shares' intervals"

INDEPENDENT = "log t over seeds, with both distances' own errors 95%"

Key = tuple[Any, ...]


def told_apart(record: Record) -> Key:
    """What makes two records of different seeds the same number.

    The calibrated attacker's t and sign are its own choice in every seed.
    """
    about = record.definition
    t = about.get("t") if about.get("attacker") == "fixed" else None
    words = ("attack", "protection", "training", "setting", "attacker")
    return record.name, *(about.get(word, "") for word in words), t


def pooled(runs: Sequence[Run]) -> list[Record]:
    """Every number of the attacks, over the seeds that have it; what was trained otherwise under its own name.

    Args:
        runs: Finished rows of :class:`ProtectionChains`.
    """
    attacks = [run for run in runs if run.row.kind.startswith("attack:")]
    groups = [[run for run in runs if run.row.kind == kind] for kind in _kinds(attacks)]
    groups.append([run for run in runs if run.row.kind.startswith("loss:")])
    found = [_under_its_name(record) for group in groups for record in _pooled(group)]
    for kind in _kinds(attacks):
        training = kind.partition(":")[2]
        if training != PLAIN:
            found += _frechet_ratios(attacks, training)
    return [*found, *_reductions(found)]


def _kinds(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.row.kind for run in runs))


def _pooled(runs: Sequence[Run]) -> list[Record]:
    groups: dict[Key, list[Record]] = {}
    for run in runs:
        for record in run.records:
            if record.name.startswith((PREFIX, LOSS)) and not record.name.endswith("/copy_reduction"):
                groups.setdefault(told_apart(record), []).append(record)
    pooled_ones = [_one(own) for own in groups.values()]
    return [record for record in pooled_ones if record is not None]


def _one(own: Sequence[Record]) -> Record | None:
    """One number over the seeds; null where a seed could not tell it."""
    values = [record.value for record in own if record.value is not None]
    if len(values) < len(own):
        return None
    what = own[0].name.rpartition("/")[2] if own[0].name.startswith(LOSS) else _what(own[0])
    n = sum(record.n for record in own)
    ends = [(record.low, record.high) for record in own if record.low is not None and record.high is not None]
    whole = ends if len(ends) == len(own) else []
    about: dict[str, Any] = {"seeds": len(own)}
    sizes = {record.definition.get("bank_size") for record in own}
    if len(sizes) == 1 and None not in sizes:
        about["bank_size"] = sizes.pop()
    if what.startswith(SHARES):
        mean, low, high = pooled_share(values, min(record.n for record in own))
        return pooled_record(own, mean, low, high, n, about)
    if own[0].unit == "ratio":
        return pooled_record(own, *pooled_ratio(values, whole), n, about)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return pooled_record(own, mean, own[0].low, own[0].high, n, about)
    low, high = seeds_interval(values)
    about["interval"] = "t over seeds 95%"
    if what in ("z", "auc", "auc_folded") and whole:  # images of different seeds overlap little: errors add up
        half = math.sqrt(math.fsum(((b - a) / 2) ** 2 for a, b in whole)) / len(whole)
        low, high = min(low, mean - half), max(high, mean + half)
        about["interval"] = "t over seeds, never narrower than over images, 95%"
    if own[0].unit == "fraction":
        low, high = max(low, 0.0), min(high, 1.0)
    return pooled_record(own, mean, low, high, n, about)


def _what(record: Record) -> str:
    return record.name.removeprefix(f"{PREFIX}{record.definition.get('protection', '')}/")


def _under_its_name(record: Record) -> Record:
    """``defense/none/...`` of a target that was trained otherwise as ``defense/<training>/...``."""
    training = record.definition.get("training", PLAIN)
    if training == PLAIN or not record.name.startswith(PREFIX):
        return record
    if record.name.startswith(f"{PREFIX}floor/"):
        return replace(record, name=record.name.replace("floor/", f"floor/{training}/"))
    name = f"{PREFIX}{training}/{_what(record)}"
    return replace(record, name=name, definition={**record.definition, "protection": training})


def _frechet_ratios(attacks: Sequence[Run], training: str) -> list[Record]:
    """Distances to held-out images over those of the plain target of the same seed; both have errors of their own."""
    found = []
    plain = {run.row.seed: run.records for run in attacks if run.row.kind == f"attack:{PLAIN}"}
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for run in attacks:
        if run.row.kind != f"attack:{training}" or run.row.seed not in plain:
            continue
        for record in run.records:
            if not ("/frechet/" in record.name and record.name.endswith("/heldout") and record.value):
                continue
            key = told_apart(record)[:3]
            base = next((other for other in plain[run.row.seed] if told_apart(other)[:3] == key), None)
            if base is not None and base.value:
                pairs.setdefault(str(record.definition["attack"]), []).append((record, base))
    for attack, both in pairs.items():
        first = both[0][0].definition["extractor"]
        both = [pair for pair in both if pair[0].definition["extractor"] == first]
        ratios = [(own.value or 0.0) / (base.value or 1.0) for own, base in both]
        ends = [_independent(own, base) for own, base in both]
        known = [pair for pair in ends if pair is not None]
        value, low, high = pooled_ratio(ratios, known if len(known) == len(ends) else ())
        about = {
            "seeds": len(both), "attack": attack, "protection": training, "training": training,
            "interval": INDEPENDENT,
        }  # fmt: skip
        record = pooled_record([own for own, _ in both], value, low, high, sum(own.n for own, _ in both), about)
        found.append(replace(record, name=f"{PREFIX}{training}/frechet_ratio", unit="ratio"))
    return found


def _independent(own: Record, base: Record) -> tuple[float, float] | None:
    """Interval of a ratio of two distances whose errors are independent; null where one has none, or it reaches 0."""
    error = 0.0
    for record in (own, base):
        if record.low is None or record.high is None or record.low <= 0:
            return None
        error += (math.log(record.high / record.low) / 2) ** 2
    middle = math.log((own.value or 1.0) / (base.value or 1.0))
    return math.exp(middle - math.sqrt(error)), math.exp(middle + math.sqrt(error))


def _reductions(found: Sequence[Record]) -> list[Record]:
    """Copies without protection over those with it, of the pooled shares; fewer than one in an arm counts as one."""
    ratios = {
        (str(record.definition["attack"]), str(record.definition["protection"])): record
        for record in found
        if record.name.startswith(PREFIX) and _what(record) == "ratio"
    }
    reductions = []
    for (attack, protection), record in ratios.items():
        base = ratios.get((attack, UNPROTECTED))
        if protection == UNPROTECTED or base is None or not base.value or record.value is None:
            continue
        own_n = record.n // int(record.definition["seeds"])
        value, low, high = copy_reduction(share_of(base), share_of(record), own_n)
        definition = {**record.definition, "base": base.value, "samples_of_an_arm": own_n, "interval": OF_POOLED}
        name = f"{PREFIX}{protection}/copy_reduction"
        reductions.append(
            replace(record, name=name, value=value, low=low, high=high, unit="ratio", definition=definition)
        )
    return reductions


def of_arm(records: Sequence[Record], protection: str, what: str, **about: Any) -> Record | None:
    """A pooled number of an unguided arm; null where there is none.

    Args:
        records: Pooled ones.
        protection: Name of the protection.
        what: Of the number.
        **about: What its definition must say besides.
    """
    wanted: Mapping[str, Any] = {"attack": UNGUIDED, **about}
    for record in records:
        if record.name == f"{PREFIX}{protection}/{what}" and all(
            record.definition.get(key) == value for key, value in wanted.items()
        ):
            return record
    return None
