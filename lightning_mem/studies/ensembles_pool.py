"""Records of several ensembles as one each, and the table of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_mem.records import Record, digest
from lightning_mem.studies.pooling import OVER_SEEDS, pooled_share, seeds_interval


def pooled(ensembles: Sequence[Sequence[Record]]) -> list[Record]:
    """The records of several ensembles as one each: shares and other numbers by their means over seeds.

    One ensemble's stay what they are; those that do not exist in every ensemble are left out of several.
    """
    if len(ensembles) < 2:
        return [replace(record, definition={**record.definition, "seeds": 1}) for own in ensembles for record in own]
    groups: dict[str, list[Record]] = {}
    for own in ensembles:
        for record in own:
            about = {key: value for key, value in record.definition.items() if key != "chance"}
            groups.setdefault(digest(record.name, about), []).append(record)
    found = []
    for own in groups.values():
        values = [record.value for record in own if record.value is not None]
        if len(values) < len(ensembles):
            continue
        low: float | None
        high: float | None
        if own[0].unit == "fraction":
            value, low, high = pooled_share(values, own[0].n)
        else:
            value, (low, high) = math.fsum(values) / len(values), seeds_interval(values)
        about = {**own[0].definition, "seeds": len(own), "interval": OVER_SEEDS}
        found.append(
            replace(
                own[0], value=value, low=low, high=high, n=sum(record.n for record in own), seed=0, data_digest="",
                run="pooled", definition=about,
            )
        )  # fmt: skip
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown: a line a number."""
    lines = ["| number | method | score or object | value | 95 % interval | n |", "|---|---|---|---:|---:|---:|"]
    for record in records:
        about = record.definition
        word = " ".join(str(about[key]) for key in ("score", "of", "bank") if key in about)
        value = "none" if record.value is None else f"{record.value:.4g}"
        ends = "" if record.low is None or record.high is None else f"{record.low:.3g} to {record.high:.3g}"
        name = record.name.rpartition("/")[2]
        lines.append(f"| {name} | {about.get('method', '')} | {word} | {value} | {ends} | {record.n} |")
    return "\n".join(lines)
