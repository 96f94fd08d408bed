"""Records as pictures and tables show them: chosen by definition, written with their interval."""

from collections.abc import Sequence

from lightning_mem.records import Record


def select(records: Sequence[Record], name: str, **definition: object) -> list[Record]:
    """Records of a name whose definition holds these values."""
    wanted = definition.items()
    return [r for r in records if r.name == name and all(r.definition.get(key) == value for key, value in wanted)]


def in_words(record: Record | None, digits: int = 3) -> str:
    """``value [low, high]``; ``none`` for what does not exist."""
    if record is None or record.value is None:
        return "none"
    form = f".{digits}f"
    ends = "" if record.low is None or record.high is None else f" [{record.low:{form}}, {record.high:{form}}]"
    return f"{record.value:{form}}{ends}"
