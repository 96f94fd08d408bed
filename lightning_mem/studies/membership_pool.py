"""Records of the study of membership, pooled over seeds under the attacks' own names."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record, digest
from lightning_mem.studies.base import Run
from lightning_mem.studies.pooling import pooled_share, seeds_interval

REPEATED = "repeated"
"""``definition.training`` of a target some of whose members repeat."""


def pooled_ratios(runs: Sequence[Run], size: int, training: str = "") -> list[Record]:
    """How much the targets copy at their last step."""
    last = [rows[-1] for run in runs if (rows := curve(run.records, "memorization/ratio"))]
    if not last:
        return []
    mean, low, high = pooled_share([record.value or 0.0 for record in last], last[0].n)
    return [_pooled(last, mean, low, high, size, training)]


def pooled_attacks(runs: Sequence[Run], size: int, training: str = "") -> list[Record]:
    """Every number of the attacks, over the seeds that have it; a calibrated attacker may choose another t by seed."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        for record in run.records:
            if record.name.startswith("attack/") and record.value is not None:
                groups.setdefault(_key(record), []).append(record)
    found = []
    for own in groups.values():
        values = [record.value for record in own if record.value is not None]
        mean, (low, high) = sum(values) / len(values), _ends(own, values)
        found.append(_pooled(own, mean, low, high, size, training))
    return found


def _key(record: Record) -> str:
    """What a record of one seed has in common with those of the others."""
    free = {"t", "sign"} if record.definition.get("attacker") == "calibrated" else set()
    about = {key: value for key, value in record.definition.items() if key not in free}
    return digest(record.name, record.step, record.weights, about)


def _ends(own: Sequence[Record], values: Sequence[float]) -> tuple[float | None, float | None]:
    """An interval over seeds that is not narrower than the images of all seeds together allow."""
    if len(values) < 2:
        return own[0].low, own[0].high
    mean = sum(values) / len(values)
    low, high = seeds_interval(values)
    ends = [(r.low, r.high) for r in own if r.low is not None and r.high is not None]
    if len(ends) == len(own):
        below, above = (
            (sum((value - end) ** 2 for value, end in zip(values, side, strict=True)) ** 0.5) / len(values)
            for side in zip(*ends, strict=True)
        )
        low, high = min(low, mean - below), max(high, mean + above)
    if own[0].unit == "fraction":
        low, high = max(0.0, low), min(1.0, high)
    return low, high


def _pooled(
    own: Sequence[Record], value: float, low: float | None, high: float | None, size: int, training: str = ""
) -> Record:
    """A record of all seeds; its definition keeps what is equal in all of theirs."""
    first = own[0].definition
    kept = {
        key: value
        for key, value in first.items()
        if all(record.definition.get(key) == value for record in own) and "digest" not in key
    }
    tested = {f"tested_{key}": kept[key] for key in ("num_members", "num_heldout") if key in kept}
    kept.pop("num_heldout", None)
    method = {} if low is None else {"interval": "t over seeds, with the images', 95%"}
    kept |= {"training": training} if training else {}
    about = {**kept, **(method if len(own) > 1 else {}), **tested, "num_members": size, "seeds": len(own)}
    return replace(
        own[0], value=value, low=low, high=high, n=sum(record.n for record in own), seed=0, seconds=0.0,
        data_digest="", config_digest="", run="pooled", definition=about,
    )  # fmt: skip
