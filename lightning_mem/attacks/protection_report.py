"""What the protections' attack leaves beside its records: the table on the screen and in Markdown, rows of samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from lightning_mem.attacks.protection_picture import draw_frontier, draw_gallery
from lightning_mem.attacks.protection_scores import PREFIX, Scored
from lightning_mem.attacks.report import sample_rows, short
from lightning_mem.evaluation import Measure
from lightning_mem.evaluation.table import LOOK, write_rows
from lightning_mem.records import Record, atomic_write

Rows = Mapping[tuple[str, str], Mapping[str, Record]]
"""Records of an arm (attack, protection) by what they say: the first extractor's, the fixed attacker's last t."""


def by_arm(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """The arms of some records, in order; floors are left out."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        about = record.definition
        if not record.name.startswith(PREFIX) or "attack" not in about:
            continue
        own = found.setdefault((str(about["attack"]), str(about["protection"])), {})
        what = record.name.removeprefix(f"{PREFIX}{about['protection']}/")
        if about.get("attacker") == "calibrated":
            what = f"calibrated/{what}"
        if what not in own or "t" in about:  # several t: the last
            own[what] = record
    return found


def _first(own: Mapping[str, Record], start: str, end: str) -> Record | None:
    return next((record for what, record in own.items() if what.startswith(start) and what.endswith(end)), None)


def protections_table(records: Sequence[Record]) -> Table:
    """One row an arm: copies and their control, reduction, Fréchet ratio, z of the loss attack, calls and time."""
    arms = by_arm(records)
    times = sorted({record.definition["t"] for own in arms.values() for what, record in own.items() if what == "z"})
    caption = (
        "copies: share of samples, beside the held-out control; fewer: times fewer than without protection; "
        "Fréchet: distance to held-out images over that without protection; z: of the loss attack"
        f"{f' at t = {times[-1]}' if times else ''}; calls: of the denoiser a sample; time: over that without it"
    )
    table = Table(title="Protections", title_justify="left", title_style="bold", caption=caption, **LOOK)
    table.caption_justify = "left"
    for heading in ("attack", "protection", "copies", "held\nout", "fewer", "Fréchet", "z", "calls", "time"):
        left = heading in ("attack", "protection")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    before = ""
    for (attack, protection), own in arms.items():
        if before not in ("", attack):
            table.add_section()
        shown = [short(own.get("ratio")).partition(" ")[0], short(own.get("ratio_heldout")).partition(" ")[0]]
        table.add_row(
            "" if attack == before else attack, protection, *shown, _number(own.get("copy_reduction"), ".3g"),
            _number(own.get("frechet_ratio"), ".2f"), _number(own.get("z"), ".1f"),
            _number(own.get("evaluations"), ".3g"), _number(own.get("time_ratio"), ".2f"),
        )  # fmt: skip
        before = attack
    return table


def _number(record: Record | None, digits: str) -> str:
    return "" if record is None or record.value is None else f"{record.value:{digits}}"


def markdown(records: Sequence[Record]) -> str:
    """The whole table as Markdown: a row an arm, every number with its interval; the floors below."""
    arms = by_arm(records)
    columns = {
        "copies": ("ratio", ""), "control": ("ratio_heldout", ""), "near copies": ("near_copies", ""),
        "copied images": ("copied_images", ""), "AMS high": ("ams/", "/high"), "UMS high": ("ums/", "/high"),
        "times fewer": ("copy_reduction", ""), "Fréchet, train": ("frechet/", "/train"),
        "Fréchet, held-out": ("frechet/", "/heldout"), "Fréchet ratio": ("frechet_ratio", ""),
        "precision": ("precision/", "/heldout"), "recall": ("recall/", "/heldout"), "z": ("z", ""),
        "AUC": ("auc", ""), "AUC, calibrated": ("calibrated/auc_folded", ""), "TPR at 0.01": ("tpr_at_0.01", ""),
        "gate rate": ("gate_rate", ""), "accepted": ("accepted", ""), "tries": ("tries", ""),
        "denoiser calls": ("evaluations", ""), "classifier calls": ("classifier_evaluations", ""),
        "classifier gradients": ("classifier_gradients", ""), "seconds": ("seconds", ""), "time": ("time_ratio", ""),
    }  # fmt: skip
    cells: dict[str, list[str]] = {}
    for heading, (start, end) in columns.items():
        found = [own.get(start) if not end else _first(own, start, end) for own in arms.values()]
        if any(record is not None for record in found):
            cells[heading] = [_cell(record) for record in found]
    lines = ["| attack | protection | " + " | ".join(cells) + " |", "|---|---|" + "---:|" * len(cells)]
    for place, (attack, protection) in enumerate(arms):
        lines.append(f"| {attack} | {protection} | " + " | ".join(column[place] for column in cells.values()) + " |")
    floors = [record for record in records if record.name.startswith(f"{PREFIX}floor/")]
    lines += ["", *(_floor(record) for record in floors)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.value is None:
        return "none"
    ends = "" if record.low is None or record.high is None else f" [{record.low:.3g}, {record.high:.3g}]"
    return f"{record.value:.3g}{ends}"


def _floor(record: Record) -> str:
    about = record.definition
    size = f" ({about['bank_size']})" if "bank_size" in about else ""  # targets trained otherwise differ in theirs
    return (
        f"- Fréchet distance of {about['queries']} ({record.n}) to held-out images{size}, {about['extractor']}: "
        f"{_cell(record)}"
    )


def write_report(
    scores: Sequence[Scored], records: Sequence[Record], measure: Measure, folder: Path, pictures: bool
) -> None:
    """Write ``tables/`` and ``images/``.

    Args:
        scores: Of the arms.
        records: All of them, with floors and membership.
        measure: What they were measured with.
        folder: Of the attack.
        pictures: Whether to draw.
    """
    for score in scores:
        arm, found = score.arm, score.measurement
        rows = list(sample_rows(arm.drawn.samples, found, measure.reference))
        if arm.judged:
            for row, accepted, tries in zip(rows, arm.drawn.accepted.tolist(), arm.drawn.tries.tolist(), strict=True):
                row.update(accepted=int(accepted), tries=tries)
        if arm.drawn.samples.gate_rate is not None:
            for row, rate in zip(rows, arm.drawn.samples.gate_rate.tolist(), strict=True):
                row["gate_rate"] = f"{rate:.6f}"
        write_rows(folder / "tables" / f"samples_{arm.protection}@{arm.attack}.csv", rows)
    with atomic_write(folder / "tables" / "protections.md") as file:
        file.write(markdown(records))
    if pictures:
        draw_gallery(scores, folder / "images" / "gallery.png")
        draw_frontier(records, folder / "images" / "frontier.png")
