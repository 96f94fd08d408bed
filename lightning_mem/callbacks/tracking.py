"""Where curves go: ``metrics.csv`` in the run folder, continued on resume, and W&B."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_mem.randomness import derive_seed
from lightning_mem.records import atomic_write


class MetricsCSV(Logger):
    """``metrics.csv``: one file, a row per logged step, continued on resume.

    The column ``step`` counts optimizer steps done. Times (``time/...``) are left to ``results.jsonl`` and W&B, so
    that equal runs have equal files.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.active = True
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Empty: checkpoints go right below the run folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as ``name``."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is in ``config.yaml``."""

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; a column that is new rewrites the header."""
        row = {k: repr(v) for k, v in metrics.items() if not k.startswith("time/") and k not in ("epoch", "step")}
        if not self.active or not row:
            return
        row["step"] = str(int(step or 0))
        if self._columns is None:
            rows = self._read()
            self._columns = list(rows[0]) if rows else []
        if new := set(row) - set(self._columns):
            columns = ["step", *sorted({*self._columns, *new} - {"step"})]
            self._write([*self._read(), row], columns)
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def drop_after(self, step: int, keep_validation: bool) -> None:
        """Remove what a resumed run will log again.

        Args:
            step: Optimizer steps of the checkpoint.
            keep_validation: The checkpoint was written after the validation of its step.
        """
        rows = self._read()
        kept = [row for row in rows if int(row["step"]) <= step]
        if not keep_validation:
            kept = [row for row in kept if int(row["step"]) < step or not _is_validation(row)]
        if len(kept) < len(rows):
            # columns that only dropped rows had would not be there in an uninterrupted run yet
            columns = [c for c in rows[0] if c == "step" or any(row[c] for row in kept)]
            self._write([{c: row[c] for c in columns} for row in kept], columns)


def _is_validation(row: dict[str, str]) -> bool:
    return any(value for key, value in row.items() if key.startswith(("val/", "memorization/", "frechet/")))


class WandbTracking(WandbLogger):
    """W&B in the run folder: all curves over optimizer steps, one W&B run per run folder, also after a resume.

    Args:
        project: W&B project.
        name: Display name; null takes the run folder's.
        offline: Write to disk only (``wandb sync`` uploads later); nothing leaves the machine.
        tags: W&B tags.
        group: W&B group, for studies.
        entity: W&B user or team.
    """

    def __init__(
        self,
        project: str = "lightning-mem",
        name: str | None = None,
        offline: bool = True,
        tags: list[str] | None = None,
        group: str | None = None,
        entity: str | None = None,
    ) -> None:
        self._display_name = name
        self._options: dict[str, Any] = {
            "project": project,
            "offline": offline,
            "tags": tags,
            "group": group,
            "entity": entity,
        }
        self.attach(".")

    def attach(self, folder: str) -> None:
        """Write below this run folder, as the W&B run that belongs to it. The Trainer calls it before any logging."""
        path = Path(folder).absolute()
        super().__init__(
            save_dir=str(path),
            name=self._display_name or path.name,
            id=f"{derive_seed(0, 'wandb', str(path)):016x}",  # the same after a resume: its curves go on
            resume="allow",
            **self._options,
        )

    @property
    def experiment(self) -> Any:
        """The W&B run.

        Raises:
            RuntimeError: If W&B cannot start (no account); it says how to run without.
        """
        if self._experiment is None and not self._offline:
            import wandb

            try:
                run = super().experiment
            except (wandb.errors.UsageError, wandb.errors.AuthenticationError, wandb.errors.CommError) as error:
                raise RuntimeError(
                    f"W&B did not start ({error}): log in with `wandb login`, or keep it on this machine with "
                    "--trainer.logger.init_args.offline true"
                ) from error
        else:
            run = super().experiment
        return run
