"""The verb ``study``: train what a plan still lacks, one ordinary run folder per row, then report."""

import datetime
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightning_mem.callbacks.run_folder import holds_a_run
from lightning_mem.data.plan import Entry, Plan, claimed
from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record, atomic_write, digest, read_records
from lightning_mem.studies.base import AbstractStudy, ReadConfig, Run
from lightning_mem.studies.launch import Stop, last_words, train_row
from lightning_mem.studies.recipe import FinishedRuns, data_digest_in, deciding, differing, is_finished


def study(
    study: AbstractStudy,
    folder: str,
    dry_run: bool = False,
    train: bool = True,
    reuse: list[str] | None = None,
    *,
    read_config: ReadConfig,
) -> None:
    """Train one recipe many times by a plan, each as an ordinary run folder, and report what came of it.

    Killed and started again it does what is missing: a finished row stays, one that was stopped goes on from its last
    checkpoint, a failed one is tried again. A failed row does not stop the others.

    Args:
        study: Which study, by ``class_path``; ``--study.help CLASS`` lists its arguments.
        folder: Of the study: run folders by row, ``plan.jsonl``, logs, ``results.jsonl``, pictures.
        dry_run: Only show the rows, which of them are there already, and how long the others will take.
        train: False reports on the finished rows and trains none.
        reuse: Folders below which a finished run with equal settings and images spares a training; null takes the
            folder that holds ``folder``. An empty list looks nowhere but in ``folder`` itself.
        read_config: Given by the command line.

    Raises:
        ValueError: If a setting is not legal, a row's folder holds another run, or another process works on the
            folder.
        SystemExit: With status 1 if a row failed; with 128 + the signal's number if it was stopped.
    """
    if dry_run:
        Console().print(Work(study, Path(folder), reuse, read_config).table())
        return
    with claimed(folder) as lock:
        work = Work(study, Path(folder), reuse, read_config)
        work.plan.save()
        failed = work.train(lock) if train else []
        if not work.report():
            sys.exit(f"nothing to report: none of the {len(work.plan)} rows is finished")
    if not train and work.missing():
        print(f"{len(work.missing())} of {len(work.plan)} rows are not finished: they are not in these numbers")
    if failed:
        lines = [f"{entry.row.name}: {entry.reason} (log: {work.log(entry)})" for entry in failed]
        sys.exit(f"{len(failed)} of {len(work.plan)} rows failed; start again to try them again:\n" + "\n".join(lines))


class Work:
    """A study's plan, with what is already there.

    Args:
        study: The study.
        folder: Its folder.
        reuse: See :func:`study`.
        read_config: See :data:`ReadConfig`.

    Raises:
        ValueError: If a setting is not legal, or a row's folder holds a run with other settings.
    """

    def __init__(self, study: AbstractStudy, folder: Path, reuse: list[str] | None, read_config: ReadConfig) -> None:
        self.study, self.folder = study, folder
        self.plan = Plan(folder, study.rows())
        self.configs = {entry.row.name: read_config(self._options(entry, text=True)) for entry in self.plan}
        roots = [folder.parent] if reuse is None else [Path(root) for root in reuse]
        self._finished = FinishedRuns(roots, read_config)
        for entry in self.plan:
            self._look(entry)

    def _look(self, entry: Entry) -> None:
        """Bring an entry in line with the run folders there are."""
        name, config = entry.row.name, self.configs[entry.row.name]
        wanted = deciding(config)
        own = self.folder / name
        shorter = self._check(own, wanted) if (own / "config.yaml").is_file() else False
        place = own if is_finished(own) and not shorter else self._finished.find(config)
        changes: dict[str, Any] = {"state": "planned", "folder": str(own), "reason": ""}
        if place is not None:
            changes |= {"state": "done", "folder": str(place), "data_digest": data_digest_in(place)}
        elif entry.state == "failed":
            changes |= {"state": "failed", "reason": entry.reason}
        self.plan.update(name, digest=digest(wanted), **changes)

    def _check(self, own: Path, wanted: dict[str, Any]) -> bool:
        """Whether a row's own run was meant to end earlier; it goes on then. Any other difference is refused."""
        there = self._finished.settings_of(own)
        keys = ["it cannot be read"] if there is None else differing(there, wanted)
        if there is not None and keys == ["trainer.max_steps"]:
            steps = [settings["trainer"]["max_steps"] for settings in (there, wanted)]
            if steps[0] < steps[1]:
                return True
        if keys:
            raise ValueError(
                f"{own} holds a run with another configuration than its row ({', '.join(keys)}): name another study "
                "folder with --folder, or move this run away"
            )
        return False

    def _options(self, entry: Entry, text: bool = False) -> list[str]:
        """Options of ``fit`` for a row; its own settings as text, or in the file that :meth:`_write` wrote."""
        own = yaml.safe_dump(self.study.settings(entry.row, self.folder), sort_keys=False)
        files = [*self.study.config, own if text else str(self._file(entry))]
        return [part for file in files for part in ("--config", file)]

    def _file(self, entry: Entry) -> Path:
        return self.folder / "rows" / f"{entry.row.name}.yaml"

    def log(self, entry: Entry) -> Path:
        """Where everything goes that a row's process prints."""
        return self.folder / "rows" / f"{entry.row.name}.log"

    def missing(self) -> list[Entry]:
        """Entries that still have to be trained."""
        return [entry for entry in self.plan if entry.state != "done"]

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, lock: int) -> list[Entry]:
        """Train what is missing, one row after the other.

        Args:
            lock: See :func:`lightning_mem.data.plan.claimed`.

        Returns:
            The entries that failed.

        Raises:
            SystemExit: If a signal stopped it; the plan is saved.
        """
        missing = self.missing()
        done = len(self.plan) - len(missing)
        with Stop().listening() as stop, tqdm(total=len(self.plan), initial=done, desc="rows", unit="row") as bar:
            for entry in missing:
                self._train(entry, stop, lock, bar)
                if stop.signal is not None:
                    break
                bar.update()
        if stop.signal is not None:
            print(f"stopped; the same command continues ({self.plan.path})", file=sys.stderr)
            sys.exit(128 + stop.signal)
        return [entry for entry in self.plan if entry.state == "failed"]

    def _train(self, entry: Entry, stop: Stop, lock: int, bar: "tqdm[Any]") -> None:
        name, own = entry.row.name, self.folder / entry.row.name
        options = self._options(entry)
        if (own / "checkpoints" / "last.ckpt").is_file():
            options += ["--ckpt_path", "last"]
        elif holds_a_run(own):  # killed before its first checkpoint: nothing to continue
            shutil.rmtree(own)
        with atomic_write(self._file(entry)) as file:
            yaml.safe_dump(self.study.settings(entry.row, self.folder), file, sort_keys=False)
        self.plan.update(name, state="running", reason="")
        self.plan.save()
        last = self.configs[name]["trainer"]["max_steps"]

        def look() -> None:
            bar.set_postfix_str(f"{name} step {step_of(own)}/{last}")

        code = train_row(options, self.log(entry), stop, lock, look)
        if code == 0 and is_finished(own):
            self.plan.update(name, state="done", data_digest=data_digest_in(own))
        elif stop.signal is not None:
            self.plan.update(name, state="planned")
        else:
            reason = last_words(self.log(entry)) or f"the process ended with status {code}"
            self.plan.update(name, state="failed", reason=reason)
        self.plan.save()

    # --- showing -------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """The finished rows."""
        return [
            Run(entry.row, Path(entry.folder), self.configs[entry.row.name], records_of(Path(entry.folder)))
            for entry in self.plan
            if entry.state == "done"
        ]

    def report(self) -> list[Record]:
        """Pool what is finished into ``results.jsonl`` of the study's folder; nothing without a finished row."""
        runs = self.runs()
        if not runs:
            return []
        records = self.study.report(runs, self.folder)
        with atomic_write(self.folder / "results.jsonl") as file:
            file.writelines(record.to_json() + "\n" for record in records)
        return records

    def table(self) -> Table:
        """Rows, what is there, and the time that is left, for the screen."""
        missing = self.missing()
        table = Table(title=f"{self.folder}", title_justify="left", caption_justify="left")
        for column in ("row", "state", "step", "run folder"):
            table.add_column(column, overflow="fold")
        for entry in self.plan:
            place = Path(entry.folder)
            state = "reused" if entry.state == "done" and place != self.folder / entry.row.name else entry.state
            last = self.configs[entry.row.name]["trainer"]["max_steps"]
            table.add_row(
                entry.row.name, state, f"{last if entry.state == 'done' else step_of(place)}/{last}", str(place)
            )
        table.caption = f"{len(self.plan)} rows, {len(missing)} trainings to do; time: {self._time(missing)}"
        return table

    def _time(self, missing: Sequence[Entry]) -> str:
        """How long the missing trainings will take, by the speed of the finished ones."""
        left = sum(
            self.configs[entry.row.name]["trainer"]["max_steps"] - step_of(Path(entry.folder)) for entry in missing
        )
        speeds = [speed for run in self.runs() if (speed := seconds_per_step(run.records)) is not None]
        if not missing:
            return "none"
        if not speeds:
            return "unknown until the first row is done"
        span = datetime.timedelta(seconds=round(left * statistics.median(speeds)))
        return f"about {span} (at the median speed of {len(speeds)} finished rows)"


def records_of(folder: Path) -> list[Record]:
    """Everything a run measured."""
    return read_records(folder / "results.jsonl")


def step_of(folder: Path) -> int:
    """The last optimizer step a run has logged; 0 without one."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        first = file.read().decode(errors="replace").splitlines()[-1].partition(",")[0]
    return int(first) if first.isdigit() else 0


def seconds_per_step(records: Sequence[Record]) -> float | None:
    """Speed of a run between its first and its last evaluation; null with fewer than two."""
    rows = curve(records, "memorization/ratio")
    if len(rows) < 2 or rows[-1].step == rows[0].step:
        return None
    spans = [datetime.datetime.fromisoformat(row.when) for row in (rows[0], rows[-1])]
    return (spans[1] - spans[0]).total_seconds() / (rows[-1].step - rows[0].step)
