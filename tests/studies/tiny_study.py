"""Studies of the tiny run, whose rows are trained in the test's own process, or only written down."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lightning_mem.data.split import write_members
from lightning_mem.metrics import wilson_interval
from lightning_mem.records import Record, write_records
from lightning_mem.studies import ReadConfig
from lightning_mem.studies.launch import Stop
from lightning_mem.studies.recipe import read_data

TINY = Path(__file__).parent.parent / "tiny.yaml"

FEW = {"class_path": "lightning_mem.callbacks.SampleEvaluation", "init_args": {"num_samples": 64, "num_steps": 2}}
OVERRIDES = {"trainer": {"max_steps": 10, "callbacks": [FEW]}}


def init_args(**changes: Any) -> dict[str, Any]:
    """Of a small study of the tiny run."""
    own = {"config": [str(TINY)], "num_members": [20, 30], "seeds": [0], "overrides": OVERRIDES, "optimum": False}
    return {**own, **changes}


def ratio_curve(steps: list[int], ratios: list[float], n: int = 100) -> list[Record]:
    """Records of a run with this curve and a control that never moves."""
    found = []
    for name, values in (("memorization/ratio", ratios), ("memorization/ratio_heldout", [0.0] * len(steps))):
        for step, value in zip(steps, values, strict=True):
            low, high = wilson_interval(round(value * n), n)
            definition = {"num_samples": n, "bank": "members", "threshold": 1 / 3}
            when = f"2026-01-01T00:{step:02d}:00+00:00" if step < 60 else "2026-01-01T01:00:00+00:00"
            found.append(Record(name, value, n, step, low, high, "ema", definition=definition, when=when))
    return found


class Trainings:
    """Stands in for the processes of rows.

    Args:
        read_config: Of the command line.
    """

    def __init__(self, read_config: ReadConfig) -> None:
        self.read_config = read_config
        self.real = False  # call ``fit`` in this process; else only write what a run of the same options leaves behind
        self.rows: list[str] = []
        self.options: list[list[str]] = []
        self.stop_at: dict[str, int] = {}

    def run(self, verb: str, options: list[str], log: Path, stop: Stop, lock: int, look: Callable[[], None]) -> int:
        """What :func:`lightning_mem.studies.launch.run_row` does."""
        own = yaml.safe_load(Path(options[-3 if "--ckpt_path" in options else -1]).read_text())
        folder = Path(own["trainer"]["default_root_dir"])
        self.rows.append(folder.name)
        self.options.append(list(options))
        steps = self.stop_at.get(folder.name)
        try:
            if self.real:
                self._fit(options, steps)
            else:
                write_run(self.read_config(options), folder)
        except ValueError as error:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"a traceback\nValueError: {error}\n(LIGHTNING_MEM_TRACEBACK=1 shows where)\n")
            return 1
        look()
        if steps is None:
            return 0
        (folder / "summary.json").unlink()  # as after SIGTERM: a checkpoint, no summary
        stop.signal = 15
        return 128 + 15

    @staticmethod
    def _fit(options: list[str], steps: int | None) -> None:
        from lightning_mem.cli import run

        run(["fit", *options, *([] if steps is None else ["--trainer.max_steps", str(steps)])])


def write_run(config: dict[str, Any], folder: Path) -> None:
    """What ``fit`` leaves in its folder, with made-up numbers."""
    data = read_data(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_members(folder / "members.json", data.members, data.heldout, {})
    steps = list(range(5, config["trainer"]["max_steps"] + 1, 5))
    write_records(folder / "results.jsonl", ratio_curve(steps, [0.5] * len(steps)))
    (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.0\n" for step in steps))
    (folder / "summary.json").write_text(json.dumps({"finished": True}))
