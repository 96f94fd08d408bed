"""One row as a process of its own, which a signal stops softly."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

POLL_SECONDS = 1.0


class Stop:
    """Ctrl-C and SIGTERM while a study runs: the child finishes its step and saves; then the study ends."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        # a terminal sends Ctrl-C to the child as well; SIGTERM on top of it asks for the same soft stop
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take both signals over, and give them back."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_row(verb: str, options: Sequence[str], log: Path, stop: Stop, lock: int, look: Callable[[], None]) -> int:
    """Run ``python -m lightning_mem <verb>`` with these options to its end.

    Args:
        verb: ``fit``, ``attack`` or ``attribute``.
        options: Of the verb.
        log: File that everything it prints is added to.
        stop: Told about the process, so that a signal reaches it.
        lock: Descriptor that the process inherits; see :func:`lightning_mem.data.plan.claimed`.
        look: Called about once a second.

    Returns:
        Its exit status; 0 is success.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lightning_mem", verb, *options]
    with log.open("ab") as out:
        stop.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, pass_fds=[lock])
        if stop.signal is not None:  # it came between two rows
            stop.child.terminate()
        while True:
            try:
                return stop.child.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                look()


def last_words(log: Path) -> str:
    """The last line of a log that says something, at most 300 characters; empty without one."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    words = [line.strip() for line in lines if line.strip() and "LIGHTNING_MEM_TRACEBACK" not in line]
    return words[-1][-300:] if words else ""
