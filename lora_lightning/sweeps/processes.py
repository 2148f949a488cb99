"""The processes of one piece of work: started with their guard, asked to end, and what is left of their log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_lightning.sweeps.locks import holder, is_locked, lock, note
from lora_lightning.sweeps.runs import Job, Work

LOCK = ".job.lock"
PATIENCE = 60.0
"""Seconds that a job has to save and end, before it is ended."""
_GUARD = Path(__file__).with_name("guard.py")
_LOG_END = 64 * 1024
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_AS_ERROR = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Warning)\b(: .*)?$")


class HeldError(RuntimeError):
    """A process of an earlier sweep still runs in a job's folder."""


class Process:
    """A piece of work that runs, with everything that it starts.

    It has no terminal and an empty standard input, writes into its log behind what is there, and is in a session of its
    own under a guard (see :mod:`lora_lightning.sweeps.guard`), which ends it when this process ends, in whatever way.
    While any of it lives, the folders of its jobs are locked.

    Args:
        work: What to start.
        environment: All of its variables, save those of the work itself.
        patience: Seconds that it has to end once it is asked to.

    Raises:
        HeldError: A job's folder is locked; nothing was started.
        OSError: It cannot be started.
    """

    def __init__(self, work: Work, environment: Mapping[str, str], patience: float = PATIENCE) -> None:
        self.work = work
        locks = _take(work.jobs)
        try:
            work.log.parent.mkdir(parents=True, exist_ok=True)
            with open(work.log, "ab") as log:
                self._log_begins = log.tell()
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", _GUARD, ",".join(map(str, locks)), str(patience), *work.command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**environment, **dict(work.environment)},
                    start_new_session=True,
                    pass_fds=locks,
                )
            for each in locks:
                note(each, f"process {self._guard.pid}")
        finally:
            for each in locks:
                os.close(each)  # the guard has them from here on

    @property
    def pid(self) -> int:
        """Of the guard, below which all the others are."""
        return self._guard.pid

    def status(self) -> int | None:
        """None while any of it lives; then its exit status, or the negative number of the signal that ended it."""
        return self._guard.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to save and end, with SIGINT or SIGTERM; what has not ended after its patience is ended."""
        self._ask(b"I" if number == signal.SIGINT else b"T")

    def kill(self) -> None:
        """End all of it at once."""
        self._ask(b"K")

    def wait(self, timeout: float | None = None) -> int:
        """Its status, once all of it has ended.

        Raises:
            subprocess.TimeoutExpired: It has not, within so many seconds.
        """
        return self._guard.wait(timeout)

    def last_lines(self, most: int = 20) -> list[str]:
        """The end of what it has printed since it was started."""
        return last_lines(self.work.log, most, since=self._log_begins)

    def _ask(self, letter: bytes) -> None:
        if self._guard.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._guard.stdin.write(letter)
                self._guard.stdin.flush()


def _take(jobs: Sequence[Job]) -> list[int]:
    taken: list[int] = []
    try:
        for job in jobs:
            descriptor = lock(job.folder / LOCK, f"process {os.getpid()}")
            if descriptor is None:
                raise HeldError(
                    f"{holder(job.folder / LOCK) or 'a process'} of an earlier sweep still runs in {job.folder}"
                )
            taken.append(descriptor)
    except BaseException:
        for each in taken:
            os.close(each)
        raise
    return taken


def still_running(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in whose folders a process of an earlier sweep still runs, such as one that is saving."""
    return [job for job in jobs if is_locked(job.folder / LOCK)]


def wait_for_earlier(jobs: Sequence[Job], tell: Callable[[str], None], patience: float = 2 * PATIENCE) -> list[Job]:
    """Wait for processes of an earlier, killed sweep, which save before they end.

    Args:
        jobs: Those of this sweep.
        tell: Called with a line for people if there is something to wait for.
        patience: Seconds to wait at most.

    Returns:
        The jobs whose folders are still held after that.
    """
    until = time.monotonic() + patience
    if held := still_running(jobs):
        names = ", ".join(f"job {job.number} ({holder(job.folder / LOCK)})" for job in held)
        tell(f"Waiting for what an earlier start of this sweep has left running, which saves before it ends: {names}")
    while held and time.monotonic() < until:
        time.sleep(0.2)
        held = still_running(held)
    return held


def last_lines(log: Path, most: int = 20, *, since: int = 0) -> list[str]:
    """The end of a log as it would stand on a screen: of a line that was written over the last state, no colours.

    Args:
        log: The file; one that is not there has no lines.
        most: How many lines.
        since: Where to begin, in bytes.
    """
    try:
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - _LOG_END))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in _ESCAPES.sub("", text).split("\n"):
        shown = next((part for part in reversed(line.split("\r")) if part.strip()), "").rstrip()
        if shown:
            lines.append(shown)
    return lines[-most:]


def said(status: int, lines: Sequence[str]) -> str:
    """An exit status in words, with the error that it came of where the log's last lines name one.

    >>> said(1, ["Traceback (most recent call last):", "ValueError: no rows"])
    'exit status 1: ValueError: no rows'
    >>> said(-9, [])
    'killed by SIGKILL; the machine may have had no memory left'
    """
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"killed by {name}" + ("; the machine may have had no memory left" if name == "SIGKILL" else "")
    error = next((line for line in reversed(lines) if _AS_ERROR.match(line)), None)
    return f"exit status {status}" + (f": {error}" if error else "")
