"""Records of a run that never was: a curve of ratios and its control."""

from lightning_mem.records import Record


def record(name: str, step: int, low: float, high: float, n: int = 100) -> Record:
    return Record(name=name, value=(low + high) / 2, n=n, step=step, low=low, high=high)


def curve(lows: list[float], control: float = 0.03, n: int = 100) -> list[Record]:
    rows = []
    for i, low in enumerate(lows):
        rows.append(record("memorization/ratio", 10 * i, low, low + 0.1))
        rows.append(record("memorization/ratio_heldout", 10 * i, 0.0, control, n))
    return rows
