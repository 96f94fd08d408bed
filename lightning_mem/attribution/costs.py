"""What methods cost, as numbers and in tables, beside what they reach."""

from collections.abc import Mapping
from typing import Any

from lightning_mem.evaluation import Number
from lightning_mem.records import Record

COSTS = (
    ("trainings", "trainings", 1.0),
    ("gradients", "gradients", 1.0),
    ("evaluations", "calls", 1.0),
    ("seconds", "s", 1.0),
    ("bytes", "MB", 1e6),
)
"""Kinds of cost, the heading of each, and what its unit there is."""

UNITS = {"bytes": "bytes", "seconds": "seconds", "trainings": "trainings", "gradients": "gradients"}
"""Of records; other costs are counts."""


def cost_numbers(name: str, cost: Mapping[str, float], about: Mapping[str, Any]) -> list[Number]:
    """What a method took, one number a kind of cost."""
    return [
        Number(f"{name}/{kind}", value, 1, dict(about), None, UNITS.get(kind, "count")) for kind, value in cost.items()
    ]


def rounded(record: Record | None, unit: float = 1.0) -> str:
    """A cost or rank in a table."""
    if record is None or record.value is None:
        return ""
    value = record.value / unit
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.2f}"


def shortly(record: Record | None) -> str:
    """``0.63 [.56, .68]``, as far as there is one."""
    if record is None or record.value is None:
        return "none"
    if record.low is None or record.high is None:
        return f"{record.value:.2f}"
    low, high = (f"{end:.2f}".replace("0.", ".", 1) for end in (record.low, record.high))
    return f"{record.value:.2f} [{low}, {high}]"
