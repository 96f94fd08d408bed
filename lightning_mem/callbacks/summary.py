"""What a run came to: a table on the screen and ``summary.json``, from the records alone."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_mem.evaluation.curves import curve, onset
from lightning_mem.evaluation.ledger import read_ledger
from lightning_mem.records import atomic_write, read_records

FILES = ("results.jsonl", "metrics.csv", "ledger.csv")


def summarize(
    folder: str | Path,
    best_checkpoint: str | None = None,
    evaluation_share: float | None = None,
    metrics_share: float | None = None,
) -> dict[str, Any]:
    """The summary of a run folder.

    Args:
        folder: Run folder with ``results.jsonl``.
        best_checkpoint: Path of the best checkpoint, if one was kept.
        evaluation_share: Share of the training time that evaluations took, in [0, 1].
        metrics_share: What measuring took, over what drawing the samples it measured took.
    """
    folder = Path(folder)
    records = read_records(folder / "results.jsonl")

    def last(name: str) -> dict[str, Any] | None:
        found = curve(records, name)
        if not found:
            return None
        record = found[-1]
        return {"value": record.value, "low": record.low, "high": record.high, "n": record.n, "step": record.step}

    ratios = curve(records, "memorization/ratio")
    highest = max(ratios, key=lambda record: record.value or 0.0, default=None)
    rows = read_ledger(folder / "ledger.csv")
    final = max((int(row["step"]) for row in rows), default=0)
    copied = [row for row in rows if int(row["step"]) == final and row["weights"] == rows[-1]["weights"]][:5]
    names = sorted({record.name for record in records})
    images = sorted(str(path.relative_to(folder)) for path in (folder / "images").glob("*.png"))
    pairs = [name for name in images if "pairs" in name]
    return {
        "finished": True,
        "run": folder.name,
        "step": ratios[-1].step if ratios else None,
        "memorization/ratio": last("memorization/ratio"),
        "memorization/ratio_heldout": last("memorization/ratio_heldout"),
        "memorization/normalized_l2_unseen": last("memorization/normalized_l2_unseen"),
        "highest_ratio": None if highest is None else {"value": highest.value, "step": highest.step},
        "onset_step": onset(records),
        "frechet": {name: last(name) for name in names if name.startswith("frechet/")},
        "best_checkpoint": best_checkpoint,
        "evaluation_share": evaluation_share,
        "metrics_share": metrics_share,
        "most_copied": [
            {"index": int(row["index"]), "copies": int(row["copies"]), "nearest": float(row["nearest"])}
            for row in copied
        ],
        "open": [*images[:1], *pairs[-1:], *[name for name in FILES if (folder / name).exists()]],
    }


def _shown(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "none: no held-out images"
    ends = "" if entry["low"] is None else f"  [{entry['low']:.3f}, {entry['high']:.3f}]"
    return f"{entry['value']:.3f}{ends}  (n = {entry['n']}, step {entry['step']})"


class RunSummary(Callback):
    """At the end of ``fit``: a table on the screen, ``summary.json``, and the onset in W&B's summary."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, on the first process."""
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        kept = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((str(Path(path).name) for path in kept if path), None)
        shares = [trainer.callback_metrics.get(f"time/{name}_share") for name in ("evaluation", "metrics")]
        summary = summarize(
            folder,
            None if best is None else f"checkpoints/{best}",
            *[None if share is None else round(float(share), 4) for share in shares],
        )
        if not hasattr(pl_module, "target"):  # a classifier, which draws nothing
            values = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
            summary["validation"] = {name: value for name, value in values.items() if name.startswith("val/")}
            summary["step"] = trainer.global_step
        with atomic_write(folder / "summary.json") as file:
            json.dump(summary, file, indent=1)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary["onset_step"] = summary["onset_step"]
        Console().print(summary_table(summary, folder))


def summary_table(summary: dict[str, Any], folder: Path) -> Table:
    """The summary as a table for the screen."""
    table = Table(title=f"{folder}", show_header=False, title_justify="left")
    draws = "validation" not in summary
    if draws:
        table.add_row("memorization ratio", _shown(summary["memorization/ratio"]))
        table.add_row("  held-out control", _shown(summary["memorization/ratio_heldout"]))
        table.add_row("  onset", "none" if summary["onset_step"] is None else f"step {summary['onset_step']}")
    for name, value in summary.get("validation", {}).items():
        table.add_row(name, f"{value:.3f}")
    for name, entry in summary["frechet"].items():
        table.add_row(f"{name}", _shown(entry))
    table.add_row("best checkpoint", summary["best_checkpoint"] or "none")
    if summary["evaluation_share"] is not None:
        table.add_row("time spent on evaluations", f"{summary['evaluation_share']:.0%}")
    if summary["metrics_share"] is not None:
        table.add_row("  metrics over sampling", f"{summary['metrics_share']:.3f}")
    if draws:
        copied = ", ".join(f"#{row['index']} x{row['copies']}" for row in summary["most_copied"])
        table.add_row("most copied images", copied or "none")
    table.add_row("open", "\n".join(str(folder / name) for name in summary["open"]))
    return table
