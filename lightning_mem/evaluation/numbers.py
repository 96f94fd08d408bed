"""Numbers before they are records: what a metric found, of how many, under which definition."""

from dataclasses import dataclass
from typing import Any

from lightning_mem.metrics import wilson_interval

WILSON, JACKKNIFE = "wilson 95%", "block jackknife 95%"
"""Interval methods, as they stand in a definition."""


@dataclass(frozen=True)
class Number:
    """One number of a measurement.

    Args:
        name: The logged key.
        value: The number; null where it does not exist.
        n: How many samples (or images) it rests on.
        definition: Flat: what makes the number mean what it means.
        interval: 95 % interval; null where no honest one exists.
        unit: e.g. ``fraction`` or ``rms-l2``.
    """

    name: str
    value: float | None
    n: int
    definition: dict[str, Any]
    interval: tuple[float, float] | None = None
    unit: str = "fraction"


def share(name: str, hits: int, n: int, definition: dict[str, Any]) -> Number:
    """A counted share with Wilson's interval."""
    return Number(name, hits / n, n, {**definition, "interval": WILSON}, wilson_interval(hits, n))


def absent(name: str, why: str, definition: dict[str, Any], unit: str = "fraction") -> Number:
    """A number that does not exist, and why."""
    return Number(name, None, 0, {**definition, "undefined": why}, None, unit)
