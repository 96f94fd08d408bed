"""Records on the screen, one row a number, with its interval, beside its held-out control; and rows as a file."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lightning_mem.records import Record, atomic_write

CONTROLS = (("_heldout", ""), ("/heldout", "/train"))
"""End of a control's key, and of the key it is the control of."""

LOOK: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1), "pad_edge": False, "show_edge": False}
"""Narrow enough for 80 columns."""

COUNTED = ("images", "samples")
"""Units of whole numbers."""


def owner(name: str, names: set[str]) -> str | None:
    """The key that a record is the control of; null where it is none."""
    for end, other in CONTROLS:
        if name.endswith(end) and (own := name.removesuffix(end) + other) in names:
            return own
    return None


def shown(record: Record | None) -> str:
    """``value [low, high]``, as far as there is one."""
    if record is None:
        return ""
    if record.value is None:
        return "none"
    digits = "g" if record.unit in COUNTED else ".3f" if abs(record.value) < 10 else ".2f"
    if record.low is None or record.high is None:
        return f"{record.value:{digits}}"
    ends = ".1f" if record.unit in COUNTED else digits
    return f"{record.value:{digits}} [{record.low:{ends}}, {record.high:{ends}}]"


def records_table(records: Sequence[Record], title: str) -> Table:
    """The records of one measurement as a table; what has no value says why below it."""
    names = {record.name for record in records}
    controls = {own: record for record in records if (own := owner(record.name, names)) is not None}
    rows = [record for record in records if owner(record.name, names) is None]
    why = {str(record.definition["undefined"]): record for record in rows if "undefined" in record.definition}
    caption = "\n".join(f"{record.name}: {reason}" for reason, record in why.items())
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption or None, **LOOK)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for heading in ("training images", "held-out control"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for record in rows:
        part = record.name.split("/")[0]
        if before == "memorization" != part:
            table.add_section()
        before = part
        style = "bold" if record.name.endswith("memorization/ratio") else ""
        table.add_row(record.name, shown(record), shown(controls.get(record.name)), style=style)
    return table


def curve_table(checkpoints: Sequence[Sequence[Record]], title: str) -> Table:
    """One row a checkpoint: ratio, its control, copied images, and the first Fréchet distance to held-out images."""
    names = {record.name for records in checkpoints for record in records}
    frechet = sorted(name for name in names if name.startswith("frechet/") and name.endswith("/heldout"))[:1]
    wanted = {
        "memorization/ratio": "memorization ratio", "memorization/ratio_heldout": "held-out control",
        "memorization/copied_images": "copied images", **dict.fromkeys(frechet, "Fréchet, held-out"),
    }  # fmt: skip
    keys = [key for key in wanted if key in names]
    table = Table(title=title, title_justify="left", title_style="bold", **LOOK)
    for heading in ("step", "weights", *(wanted[key] for key in keys)):
        table.add_column(heading, justify="right", no_wrap=True)
    for records in checkpoints:
        found = {record.name: record for record in records}
        table.add_row(str(records[0].step), records[0].weights, *(shown(found.get(key)) for key in keys))
    return table


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with equal keys as CSV; nothing where there are none."""
    rows = list(rows)
    if rows:
        with atomic_write(path) as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
