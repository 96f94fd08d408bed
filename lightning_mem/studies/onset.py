"""When copying begins in a run, by two definitions."""

from collections.abc import Sequence

from lightning_mem.evaluation.curves import curve, onset
from lightning_mem.records import Record

SEPARATED = "separated from the control"
"""The rule of every run's summary; its steps lie on the grid of evaluations, and it feels the number of samples."""


def first_reach(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    r"""Where a curve first reaches a level, by linear interpolation from the point before.

    .. math:: s_{i-1} + (s_i - s_{i-1}) \frac{\ell - v_{i-1}}{v_i - v_{i-1}}

    Args:
        steps: Ascending, at least one; before the first the curve is taken to be 0 at step 0.
        values: As many.
        level: :math:`\ell`, above 0.

    Returns:
        The place; null where the curve stays below.

    Raises:
        ValueError: If the numbers of steps and values differ, or the level is not above 0.
    """
    if len(steps) != len(values) or level <= 0:
        raise ValueError(f"steps and values must be equally many and level above 0, got {steps}, {values}, {level}")
    before, below = 0.0, 0.0
    for step, value in zip(steps, values, strict=True):
        if value >= level:
            return before + (step - before) * (level - below) / (value - below)
        before, below = float(step), value
    return None


def onsets(runs: Sequence[Sequence[Record]], ratio: float) -> dict[str, list[float | None]]:
    """Onset of each run by two definitions: the rule of its summary, and the ratio reaching a given share.

    Args:
        runs: Records of each run.
        ratio: Of the second definition, in (0, 1).

    Returns:
        Steps by definition, in the order of the runs; null where a run never got there.
    """
    reached = []
    for records in runs:
        rows = curve(records, "memorization/ratio")
        reached.append(first_reach([row.step for row in rows], [row.value or 0.0 for row in rows], ratio))
    return {SEPARATED: [onset(records) for records in runs], f"ratio reaches {ratio:g}": reached}
