"""One table: every attack against every protection, over seeds, with what it costs in quality, calls and time."""

from collections.abc import Sequence
from pathlib import Path

from lightning_mem.attacks.protection_picture import draw_frontier
from lightning_mem.attacks.protection_report import markdown
from lightning_mem.records import Record, atomic_write
from lightning_mem.studies.base import Run
from lightning_mem.studies.protection_pool import LOSS, pooled
from lightning_mem.studies.protection_rows import ProtectionChains
from lightning_mem.studies.shown import in_words


class ProtectionTable(ProtectionChains):
    r"""What do attacks get out of a target, unprotected, protected, and trained otherwise, and at what price?

    Per seed a chain: the target, the random-label classifiers of its protections, the surrogate of SIDE where asked
    for, :class:`lightning_mem.attacks.Protections`, and the loss attack on chosen protections; targets trained
    otherwise (on deduplicated members, stopped early) stand beside the protections under their names. All arms of all
    targets start from the same noise. Pooled over seeds:

    * ``defense/<name>/copy_reduction``: pooled share of copies without protection over the pooled share with it,
      which counts as at least 1/n for the n samples of one arm of one seed; its ends are the ends of both;
    * ``defense/<name>/frechet_ratio``: the geometric mean over seeds; of targets trained otherwise the errors of both
      distances are independent;
    * every other number: the mean, with Student's interval over seeds, for shares never narrower than Wilson's over
      samples;
    * ``attack/loss/...`` per ``definition.setting``.

    Writes ``protections.md`` and ``frontier.png``.

    Source:
        The table is ours: neither SIDE, arXiv:2410.02467, nor CPSample, arXiv:2409.07025, tries one against the other.
    """

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool the attacks; see the class."""
        records = pooled(runs)
        if not records:
            return records
        text = markdown(records) + _membership(records)
        with atomic_write(folder / "protections.md") as file:
            file.write(text)
        draw_frontier(records, folder / "frontier.png")
        print(f"{text}\nopen {folder / 'frontier.png'}, {folder / 'protections.md'} and {folder / 'results.jsonl'}")
        return records


SHOWN = ("z", "auc", "auc_folded", "tpr_at_0.01", "tpr_at_0.001")
"""Numbers of the loss attack in the table."""


def _membership(records: Sequence[Record]) -> str:
    """The loss attack in Markdown: one line a setting, protection and attacker."""
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if record.name.removeprefix(LOSS) in SHOWN:
            about = record.definition
            key = tuple(str(about.get(word, "")) for word in ("setting", "protection", "attacker", "t"))
            rows.setdefault(key, {})[record.name.removeprefix(LOSS)] = record
    if not rows:
        return ""
    names = list(dict.fromkeys(name for own in rows.values() for name in own))
    heads = ["setting", "protection", "attacker", "t", *names]
    lines = ["", "| " + " | ".join(heads) + " |", "|---|---|---|---:|" + "---:|" * len(names)]
    for key, own in rows.items():
        lines.append("| " + " | ".join([*key, *(in_words(own.get(name)) for name in names)]) + " |")
    return "\n".join(lines) + "\n"
