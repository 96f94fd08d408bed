"""The verb ``study``: run what a plan still lacks, one ordinary folder per row, then report."""

import datetime
import shutil
import statistics
import sys
import time
from collections import defaultdict
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
from lightning_mem.studies.launch import Stop, last_words, run_row
from lightning_mem.studies.recipe import LAST_FILE, FinishedRuns, data_digest_in, differing, is_finished


def study(
    study: AbstractStudy,
    folder: str,
    dry_run: bool = False,
    train: bool = True,
    reuse: list[str] | None = None,
    *,
    read_config: ReadConfig,
) -> None:
    """Run one recipe many times by a plan, each row in an ordinary folder, and report what came of it.

    Killed and started again it does what is missing: a finished row stays, one that was stopped goes on from its last
    checkpoint, a failed one is tried again. A failed row does not stop those that do not need it.

    Args:
        study: Which study, by ``class_path``; ``--study.help CLASS`` lists its arguments.
        folder: Of the study: run folders by row, ``plan.jsonl``, logs, ``results.jsonl``, pictures.
        dry_run: Only show the rows, which of them are there already, and how long the others will take.
        train: False reports on the finished rows and runs none.
        reuse: Folders below which a finished run with equal settings and images spares a row; null takes the
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
        read_config: See :class:`ReadConfig`.

    Raises:
        ValueError: If a setting is not legal, or a row's folder holds a run with other settings.
    """

    def __init__(self, study: AbstractStudy, folder: Path, reuse: list[str] | None, read_config: ReadConfig) -> None:
        self.study, self.folder = study, folder
        self.plan = Plan(folder, study.rows())
        self.configs: dict[str, dict[str, Any]] = {}
        roots = [folder.parent] if reuse is None else [Path(root) for root in reuse]
        self._finished = FinishedRuns(roots, read_config)
        for entry in self.plan:  # a row stands after those it needs: their folders are known by then
            self.configs[entry.row.name] = read_config(self._options(entry, text=True), entry.row.verb)
            self._look(entry)

    def _look(self, entry: Entry) -> None:
        """Bring an entry in line with the folders there are."""
        name, verb, config = entry.row.name, entry.row.verb, self.configs[entry.row.name]
        wanted = self._finished.deciding(config)
        own = self.folder / name
        shorter = self._check(own, wanted) if (own / "config.yaml").is_file() else False
        place = own if is_finished(own, verb) and not shorter else self._finished.find(config)
        changes: dict[str, Any] = {"state": "planned", "folder": str(own), "reason": ""}
        if place is not None:
            changes |= {"state": "done", "folder": str(place), "data_digest": data_digest_in(place)}
        elif entry.state == "failed":
            changes |= {"state": "failed", "reason": entry.reason}
        self.plan.update(name, digest=digest(wanted), **changes)
        for folder in (own, place or own):
            self._finished.learn(folder, digest(wanted))

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
        """Options of a row's verb; its own settings as text, or in the file that :meth:`_write` wrote."""
        row, files = entry.row, self.study.files(entry.row)
        own = yaml.safe_dump(self._settings(entry), sort_keys=False)
        if row.verb != "fit":  # its target may still have to be trained
            target = row.needs[0]
            first = yaml.safe_dump(self.configs[target]) if text else f"{self.plan[target].folder}/config.yaml"
            files = [first, *files]
        return [part for file in [*files, own if text else str(self._file(entry))] for part in ("--config", file)]

    def _settings(self, entry: Entry) -> dict[str, Any]:
        needed = {name: Path(self.plan[name].folder) for name in entry.row.needs}
        return self.study.settings(entry.row, self.folder, needed)

    def _file(self, entry: Entry) -> Path:
        return self.folder / "rows" / f"{entry.row.name}.yaml"

    def log(self, entry: Entry) -> Path:
        """Where everything goes that a row's process prints."""
        return self.folder / "rows" / f"{entry.row.name}.log"

    def missing(self) -> list[Entry]:
        """Entries that still have to be run."""
        return [entry for entry in self.plan if entry.state != "done"]

    # --- running -------------------------------------------------------------------------------------------------

    def train(self, lock: int) -> list[Entry]:
        """Run what is missing, one row after the other.

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
        row, own = entry.row, self.folder / entry.row.name
        lacking = [name for name in row.needs if self.plan[name].state != "done"]
        if lacking:
            self.plan.update(row.name, state="failed", reason=f"not started: it needs {', '.join(lacking)}")
            self.plan.save()
            return
        options = self._options(entry)
        if (own / "checkpoints" / "last.ckpt").is_file():
            options += ["--ckpt_path", "last"]
        elif row.verb == "fit" and holds_a_run(own):  # killed before its first checkpoint: nothing to continue
            shutil.rmtree(own)
        with atomic_write(self._file(entry)) as file:
            yaml.safe_dump(self._settings(entry), file, sort_keys=False)
        self.plan.update(row.name, state="running", reason="")
        self.plan.save()

        def look() -> None:
            steps = f" step {self._steps(entry)}" if row.verb == "fit" else ""
            bar.set_postfix_str(f"{row.name}{steps}")

        begun = time.monotonic()
        code = run_row(row.verb, options, self.log(entry), stop, lock, look)
        self.plan.update(row.name, seconds=round(entry.seconds + time.monotonic() - begun, 1))
        if code == 0 and row.verb != "fit" and (own / LAST_FILE[row.verb]).is_file():
            with atomic_write(own / "config.yaml") as file:  # says that the row is complete, and which it is
                yaml.safe_dump(self.configs[row.name], file, sort_keys=False)
        if code == 0 and is_finished(own, row.verb):
            self._finished.note_parents(self.configs[row.name], own)
            self.plan.update(row.name, state="done", data_digest=data_digest_in(own))
        elif stop.signal is not None:
            self.plan.update(row.name, state="planned")
        else:
            reason = last_words(self.log(entry)) or f"the process ended with status {code}"
            self.plan.update(row.name, state="failed", reason=reason)
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
        for column in ("row", "verb", "state", "step", "folder"):
            table.add_column(column, overflow="fold")
        for entry in self.plan:
            row, place = entry.row, Path(entry.folder)
            state = "reused" if entry.state == "done" and place != self.folder / row.name else entry.state
            table.add_row(row.name, row.verb, state, self._steps(entry) if row.verb == "fit" else "", str(place))
        words = {"fit": "trainings", "attack": "attacks", "attribute": "attributions"}
        counts = {verb: sum(entry.row.verb == verb for entry in missing) for verb in words}
        to_do = " and ".join(f"{counts[verb]} {word}" for verb, word in words.items() if counts[verb] or verb == "fit")
        table.caption = f"{len(self.plan)} rows, {to_do} to do; time: {self._time(missing)}"
        return table

    def _steps(self, entry: Entry) -> str:
        """Optimizer steps of a training: done, and wanted."""
        last = self.configs[entry.row.name]["trainer"]["max_steps"]
        return f"{last if entry.state == 'done' else step_of(Path(entry.folder))}/{last}"

    def _time(self, missing: Sequence[Entry]) -> str:
        """How long the missing rows will take, by the finished ones of their kind."""
        if not missing:
            return "none"
        speeds, spans = defaultdict(list), defaultdict(list)
        for run in self.runs():
            if (speed := seconds_per_step(run.records)) is not None:
                speeds[run.row.kind].append(speed)
            if seconds := self.plan[run.row.name].seconds:
                spans[run.row.kind].append(seconds)
        left, unknown = 0.0, set()
        for entry in missing:
            name, kind = entry.row.name, entry.row.kind
            if speeds[kind]:
                steps = self.configs[name]["trainer"]["max_steps"] - step_of(Path(entry.folder))
                left += steps * statistics.median(speeds[kind])
            elif spans[kind]:
                left += max(0.0, statistics.median(spans[kind]) - entry.seconds)
            else:
                unknown.add(kind)
        if len(unknown) == len({entry.row.kind for entry in missing}):
            return "unknown until the first row is done"
        known = sum(len(runs) for runs in (speeds | spans).values())
        words = f"about {datetime.timedelta(seconds=round(left))} (at the median speed of {known} finished rows)"
        return words + (f", and that of {' and '.join(sorted(unknown))}, of which none is done" if unknown else "")


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
