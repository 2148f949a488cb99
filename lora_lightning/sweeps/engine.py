"""Runs the jobs of a sweep on the devices there are: starts each when it has a place, and says how each ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from lora_lightning.sweeps.devices import Pool, Slot
from lora_lightning.sweeps.processes import PATIENCE, HeldError, Process, last_lines, said
from lora_lightning.sweeps.runs import RESULT, Job, Work, result_of

State = Literal["finished", "failed", "interrupted", "not started"]
_TURN = 0.1  # seconds between two looks at the processes
_RESULTS = 1.0  # and at the results of jobs that share a process
_ONE_SIGNAL = 1.0  # seconds within which Ctrl-C may arrive twice, by way of a launcher


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: The job.
        state: ``finished``, ``failed``, ``interrupted`` (it was told to end, and may go on another time) or
            ``not started``.
        seconds: Between its start and its end, this time.
        result: Its ``result.json`` if it has left one this time.
        reason: Why it has not finished, in words; None where it has.
        lines: The end of what it has printed, where it has not finished.
        log: Where all of that is.
    """

    job: Job
    state: State
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    reason: str | None = None
    lines: tuple[str, ...] = ()
    log: Path | None = None


class SweepInterrupted(KeyboardInterrupt):
    """A signal has ended the sweep, and all of its jobs.

    Attributes:
        number: The signal.
        outcomes: How each job ended, by its number.
    """

    def __init__(self, number: int, outcomes: dict[int, Outcome]) -> None:
        super().__init__(f"{signal.Signals(number).name} has ended the sweep")
        self.number = number
        self.outcomes = outcomes


class Watch:
    """Is told of what happens, as it happens. This one takes no notice."""

    def begin(self, works: Sequence[Work], pool: Pool) -> None:
        """All jobs are known, and none has started."""

    def started(self, work: Work, slot: Slot) -> None:
        """A piece of work has a place and runs."""

    def ended(self, outcome: Outcome) -> None:
        """A job has ended, or will not be started."""

    def told(self, message: str) -> None:
        """Something else that people want to know."""

    def look(self) -> None:
        """Some tenths of a second have gone by."""

    def end(self) -> None:
        """All jobs have ended. Called in any case, after an error too."""


def run(
    works: Sequence[Work],
    pool: Pool,
    *,
    fail_fast: bool = False,
    watch: Watch | None = None,
    environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE,
) -> dict[int, Outcome]:
    """Run pieces of work, each as soon as it has a place, in order.

    One that waits for more devices than are free is not overtaken by one that would take them from it. Ctrl-C,
    SIGTERM and SIGHUP (unless they are ignored) are passed on to the jobs, which save and end, and no more are started.
    A second one kills all at once.

    Args:
        works: What to run. Jobs that share a process have an outcome each, told as soon as there is a result.
        pool: The devices.
        fail_fast: Whether the first job that fails ends the others.
        watch: Is told of everything.
        environment: The variables of all jobs, before those of each; None: those of this process.
        patience: Seconds that jobs have to save and end.

    Returns:
        The outcome of each job by its number.

    Raises:
        LoraConfigError: Jobs need more devices than there are; none was started.
        SweepInterrupted: After a signal, once all jobs have ended; it has the outcomes.
    """
    pool.check(works)
    return _Run(
        works, pool, fail_fast, watch or Watch(), os.environ if environment is None else environment, patience
    )()


@dataclass(eq=False)
class _Running:
    process: Process
    slot: Slot
    # Of each job: what told its earlier result, and how long its log was.
    before: dict[int, tuple[tuple[int, int, int] | None, int]]
    since: float = field(default_factory=time.monotonic)
    looked: float = 0.0


class _Run:
    def __init__(
        self,
        works: Sequence[Work],
        pool: Pool,
        fail_fast: bool,
        watch: Watch,
        environment: Mapping[str, str],
        patience: float,
    ) -> None:
        self.works, self.pool, self.fail_fast, self.watch = works, pool, fail_fast, watch
        self.environment, self.patience = environment, patience
        self.waiting = list(works)
        self.running: list[_Running] = []
        self.outcomes: dict[int, Outcome] = {}
        self.stopped: str | None = None  # why no more are started

    def __call__(self) -> dict[int, Outcome]:
        with _Signals() as signals:
            try:
                self.watch.begin(self.works, self.pool)
                while self.waiting or self.running:
                    self._heed(signals)
                    self._collect()
                    if self.stopped is None:
                        self._start()
                    self.watch.look()
                    if self.running or self.waiting:
                        time.sleep(_TURN)
            finally:
                self._end_all()
                self.watch.end()
        if signals.first:
            raise SweepInterrupted(signals.first, self.outcomes)
        return self.outcomes

    # ---- starting

    def _start(self) -> None:
        full: set[str] = set()  # kinds of devices of which none is given to those who come later
        for work in tuple(self.waiting):
            kind = work.jobs[0].accelerator
            slot = None if kind in full else self.pool.take(work)
            if slot is None:
                full.add(kind)
                continue
            if not self._started(work, slot):
                self.pool.give_back(slot)

    def _started(self, work: Work, slot: Slot) -> bool:
        before = {job.number: (_stamp(job), _size(job.log)) for job in work.jobs}
        environment = {**self.environment, **slot.environment(self.environment)}
        self.waiting.remove(work)
        try:
            process = Process(work, environment, self.patience)
        except HeldError as error:
            self._drop(work, "failed", str(error))
            return False
        except OSError as error:
            self._drop(work, "failed", f"could not be started: {error}")
            return False
        self.running.append(_Running(process, slot, before))
        self.watch.started(work, slot)
        return True

    # ---- ending

    def _collect(self) -> None:
        for each in tuple(self.running):
            status = each.process.status()
            if status is None:
                self._collect_early(each)
                continue
            self.running.remove(each)
            self.pool.give_back(each.slot)
            for job in each.process.work.jobs:
                if job.number not in self.outcomes:
                    self._settle(self._outcome(each, job, status))

    def _collect_early(self, each: _Running) -> None:
        """Jobs that share a process end one by one."""
        jobs = each.process.work.jobs
        if len(jobs) == 1 or time.monotonic() - each.looked < _RESULTS:
            return
        each.looked = time.monotonic()
        for job in jobs:
            if job.number not in self.outcomes and _fresh_result(job, each) is not None:
                self._settle(self._outcome(each, job, None))

    def _outcome(self, each: _Running, job: Job, status: int | None) -> Outcome:
        work = each.process.work
        result = _fresh_result(job, each)
        seconds = time.monotonic() - each.since
        own = len(work.jobs) > 1 and job.log.exists()
        log = job.log if own else work.log
        if result is not None and result.get("status") == "finished":
            return Outcome(job, "finished", seconds, result, log=log)
        lines = last_lines(log, since=each.before[job.number][1]) if own else each.process.last_lines()
        state: State = "failed"
        told = (result or {}).get("error")
        reason = told if isinstance(told, str) else said(status, lines) if status else None
        if self.stopped is not None:
            state, reason = "interrupted", self.stopped
        elif result is not None and result.get("status") == "interrupted":
            state, reason = "interrupted", reason or "it was told to end"
        elif reason is None:
            reason = f"it ended without a whole {RESULT}" if result is None else f"its status is {result.get('status')}"
        return Outcome(job, state, seconds, result, reason, tuple(lines), log)

    def _settle(self, outcome: Outcome) -> None:
        self.outcomes[outcome.job.number] = outcome
        self.watch.ended(outcome)
        if outcome.state == "failed" and self.fail_fast and self.stopped is None:
            self._stop(f"job {outcome.job.number} failed, and fail_fast ends the others", signal.SIGTERM)

    def _drop(self, work: Work, state: State, reason: str) -> None:
        for job in work.jobs:
            self._settle(Outcome(job, state, reason=reason))

    # ---- stopping

    def _heed(self, signals: _Signals) -> None:
        number = signals.news()
        if number and signals.again:
            self.watch.told(f"{signal.Signals(number).name} again: all jobs are killed")
            for each in self.running:
                each.process.kill()
        elif number:
            name = signal.Signals(number).name
            if self.running:
                self.watch.told(
                    f"{name}: {_jobs(self.running)} told to save and end, for which there are {self.patience:.0f} "
                    "seconds; once more kills at once"
                )
            self._stop(f"{name} ended the sweep", number)

    def _stop(self, why: str, number: int) -> None:
        self.stopped = why
        for each in self.running:
            each.process.stop(number)
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            self._drop(work, "not started", why)

    def _end_all(self) -> None:
        """After an error of the sweep's own nothing goes on without it."""
        for each in self.running:
            each.process.stop(signal.SIGTERM)
        for each in self.running:
            each.process.wait()


class _Signals:
    """Notes the signals that end a sweep, while it runs."""

    def __init__(self) -> None:
        self.first, self.again = 0, False
        self._at = 0.0
        self._news = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to it alone
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)

    def news(self) -> int:
        """The signal that has come since this was last asked, or 0."""
        number, self._news = self._news, 0
        return number

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.first:
            self.first, self._at, self._news = number, now, number
        elif now - self._at > _ONE_SIGNAL:
            self.again, self._news = True, number


def _jobs(running: Sequence[_Running]) -> str:
    number = sum(len(each.process.work.jobs) for each in running)
    return f"{number} running job{' is' if number == 1 else 's are'}"


def _fresh_result(job: Job, each: _Running) -> dict[str, Any] | None:
    """The result that a job has left since it was started; one of an earlier start says nothing."""
    return None if _stamp(job) == each.before[job.number][0] else result_of(job)


def _stamp(job: Job) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = (job.folder / RESULT).stat()
        return found.st_mtime_ns, found.st_ino, found.st_size
    return None


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
