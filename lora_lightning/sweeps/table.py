"""What stands on the screen while a sweep runs: one table of its jobs, or in a file a line for each event."""

from __future__ import annotations

import heapq
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_lightning.sweeps.devices import Pool, Slot
from lora_lightning.sweeps.engine import Outcome, Watch
from lora_lightning.sweeps.manifest import short_overrides
from lora_lightning.sweeps.runs import PROGRESS, Job, Work, read_json

_EVERY = 0.5  # seconds between two looks at the jobs' files
_AROUND = 6  # lines of the screen that are not rows of the table
_IN_FULL = 5  # failed jobs whose last lines are shown
# In the order in which they get the rows of a screen that has too few.
_STYLES = {
    "running": "cyan",
    "failed": "bold red",
    "interrupted": "yellow",
    "finished": "green",
    "waiting": "dim",
    "not started": "dim",
}
_COUNTED = ("finished", "running", "waiting", "failed", "interrupted", "not started")


@dataclass
class Row:
    """A job, as far as it is known."""

    job: Job
    name: str
    state: str = "waiting"
    began: float = 0.0  # seconds since 1970
    progress: Mapping[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None

    def look(self) -> None:
        """Read how far it is; what an earlier start has left says nothing."""
        found = read_json(self.job.folder / PROGRESS) or {}
        if _number(found, "time") >= self.began:
            self.progress = found

    def figure(self, key: str) -> float | None:
        """A figure of its result, or of its progress while it has none."""
        for content in (self.outcome.result if self.outcome else None, self.progress):
            if isinstance(value := (content or {}).get(key), (int, float)):
                return float(value)
        return None

    def left(self, now: float) -> float | None:
        """Seconds until it ends, as it expects itself."""
        left = self.figure("seconds_left")
        return None if left is None else max(0.0, left - max(0.0, now - _number(self.progress, "time")))


class LiveTable(Watch):
    """Shows the jobs of a sweep, and at the end why some have failed.

    Args:
        console: Where; None: standard output. What is no terminal gets a line for each event.
        metric: The result that is told of a finished job.
    """

    def __init__(self, console: Console | None = None, *, metric: str | None = "val_loss") -> None:
        self.console = Console() if console is None else console
        self.metric = metric or "val_loss"
        self._live: Live | None = None
        self._rows: dict[int, Row] = {}
        self._works: Sequence[Work] = ()
        self._pool: Pool | None = None
        self._looked = self._began = 0.0

    # ---- what the engine tells

    def begin(self, works: Sequence[Work], pool: Pool) -> None:
        """Show all jobs as waiting."""
        jobs = sorted((job for work in works for job in work.jobs), key=lambda job: job.number)
        names = short_overrides(jobs)
        self._rows = {job.number: Row(job, name) for job, name in zip(jobs, names, strict=True)}
        self._works, self._pool, self._began = works, pool, time.time()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
            self._draw()
        else:
            self._line(f"{_count(len(jobs))}. Here {pool.described()}")

    def started(self, work: Work, slot: Slot) -> None:
        """Its jobs run."""
        for job in work.jobs:
            row = self._rows[job.number]
            row.state, row.began = "running", time.time()
        if self._live is not None:
            self._draw()
            return
        names = [f"job {job.number} ({self._rows[job.number].name})" for job in work.jobs]
        together = "together " if len(names) > 1 else ""
        self._line(f"{', '.join(names)} started {together}on {slot}")

    def ended(self, outcome: Outcome) -> None:
        """It has ended."""
        row = self._rows[outcome.job.number]
        row.look()
        row.state, row.outcome = outcome.state, outcome
        if outcome.state == "not started":
            return  # told together, at the end
        if self._live is not None:
            self._draw()
            return
        value = row.figure(self.metric)
        by = (outcome.result or {}).get("ended_by")
        why = [outcome.reason, None if value is None else f"{self.metric} {value:.4f}", by]
        told = ", ".join(filter(None, why if outcome.state == "finished" else why[:1]))
        ended = sum(each.outcome is not None for each in self._rows.values())
        left = self._left(time.time())
        about = f", about {clock(left)} left" if left else ""
        self._line(
            f"job {row.job.number} ({row.name}) {outcome.state} after {clock(outcome.seconds)}"
            f"{': ' if told else ''}{told} ({ended} of {len(self._rows)} have ended{about})"
        )

    def told(self, message: str) -> None:
        """Above the table, or a line."""
        self._line(message)

    def look(self) -> None:
        """Draw anew, now and then."""
        if self._live is not None and time.monotonic() - self._looked >= _EVERY:
            self._draw()

    def end(self) -> None:
        """Leave the last table, and tell of those that have failed."""
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None
        else:
            self._line(self._summary(time.time()).plain)
        failed = [row.outcome for row in self._rows.values() if row.outcome and row.state == "failed"]
        if failed:
            self.console.print(
                failures(failed, {number: row.name for number, row in self._rows.items()}), soft_wrap=True
            )

    # ---- drawing

    def render(self) -> RenderableType:
        """The line of all and the table, as much of it as the screen has rows."""
        now = time.time()
        rows, rest = chosen(list(self._rows.values()), max(3, self.console.height - _AROUND))
        table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("Job", no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column("State", no_wrap=True, overflow="ellipsis", max_width=28)
        for name in ("Step", "Loss", "Val loss", "Time", "Left"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row, now))
        shown: list[RenderableType] = [self._summary(now), table]
        if rest:
            counted = ", ".join(f"{number} {state}" for state, number in _counted(rest))
            shown.append(Text(f"… and {len(rest)} more: {counted}", style="dim"))
        return Group(*shown)

    def _draw(self) -> None:
        self._looked = time.monotonic()
        for row in self._rows.values():
            if row.state == "running":
                row.look()
        if self._live is not None:
            self._live.update(self.render(), refresh=True)

    def _summary(self, now: float) -> Text:
        rows = list(self._rows.values())
        text = Text(f"{_count(len(rows))}: ", style="bold")
        for index, (state, number) in enumerate(_counted(rows)):
            text.append(" · " if index else "", style="not bold")
            text.append(f"{number} {state}", style=f"not bold {_STYLES[state]}")
        left = self._left(now)
        about = f", about {clock(left)} left" if left else ""
        text.append(f"   {clock(now - self._began)} so far{about}", style="not bold")
        return text

    def _left(self, now: float) -> float | None:
        """Seconds until all have ended; None where nothing is known yet, or nothing is left."""
        taken: list[float] = []  # by whole pieces of work
        running: list[tuple[float, float | None]] = []  # how long so far, and how long still
        waiting: list[Work] = []
        for work in self._works:
            rows = [self._rows[job.number] for job in work.jobs]
            states = {row.state for row in rows}
            if "running" in states:
                lefts = [left for row in rows if row.state == "running" and (left := row.left(now)) is not None]
                running.append((now - rows[0].began, max(lefts, default=None)))
            elif "waiting" in states:
                waiting.append(work)
            elif "finished" in states:
                taken.append(max(row.outcome.seconds for row in rows if row.outcome))
        places = self._pool.places(waiting[0]) if waiting and self._pool else len(running)
        return time_left(taken, running, len(waiting), places)

    def _line(self, text: str) -> None:
        stamp = "" if self._live is not None else time.strftime("[%H:%M:%S] ")
        self.console.print(Text(f"{stamp}{text}"), soft_wrap=True)


def time_left(
    taken: Sequence[float], running: Sequence[tuple[float, float | None]], waiting: int, places: int
) -> float | None:
    """How long a sweep goes on, if those that wait take as long as the others.

    Args:
        taken: Seconds that each one took that has finished.
        running: Of those that run, the seconds so far, and until they end where that is known.
        waiting: How many wait.
        places: How many run at once.

    Returns:
        Seconds; None where nothing is known yet, or nothing is left.

    >>> time_left([10.0], [(4.0, None)], waiting=3, places=2)  # 0 + 10, 6 + 10, 10 + 10
    20.0
    """
    known = list(taken) or [so_far + left for so_far, left in running if left is not None]
    if not known or not (running or waiting):
        return None
    usual = statistics.fmean(known)
    ends = [max(0.0, usual - so_far) if left is None else left for so_far, left in running]
    ends += [0.0] * (max(1, places) - len(ends))
    heapq.heapify(ends)
    for _ in range(waiting):
        heapq.heapreplace(ends, ends[0] + usual)
    return max(ends)


def chosen(rows: Sequence[Row], most: int) -> tuple[list[Row], list[Row]]:
    """The rows that are shown, in order of their numbers, and the rest: first what runs, and then what has failed."""
    if len(rows) <= most:
        return list(rows), []
    order = list(_STYLES)
    ranked = sorted(rows, key=lambda row: (order.index(row.state), row.job.number))
    return sorted(ranked[:most], key=lambda row: row.job.number), ranked[most:]


def failures(outcomes: Sequence[Outcome], names: Mapping[int, str]) -> RenderableType:
    """Why jobs have failed: of the first ones the last lines that they printed, of all the reason and the log."""
    shown: list[RenderableType] = [Text(f"\n{_count(len(outcomes))} failed", style="bold red")]
    for index, outcome in enumerate(outcomes):
        number = outcome.job.number
        shown.append(Text(f"Job {number} ({names.get(number, '')}): {outcome.reason}", style="red"))
        if index < _IN_FULL and outcome.lines:
            shown.append(Text("\n".join(f"    {line}" for line in outcome.lines), style="dim"))
        if outcome.log is not None:
            shown.append(Text(f"    All of it: {outcome.log}"))
    return Group(*shown)


def clock(seconds: float) -> str:
    """A time as on a clock.

    >>> clock(5), clock(83.6), clock(7384)
    ('0:05', '1:23', '2:03:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cells(row: Row, now: float) -> list[RenderableType]:
    outcome = row.outcome
    state = (outcome.result or {}).get("ended_by") if outcome and row.state == "finished" else None
    step, steps = row.figure("step"), row.figure("steps")
    if outcome and outcome.result and "steps" in outcome.result:
        step, steps = row.figure("steps"), None  # in a result these are the steps done
    seconds = now - row.began if row.state == "running" else outcome.seconds if outcome else None
    left = row.left(now) if row.state == "running" else None
    return [
        str(row.job.number),
        Text(row.name),
        Text(state or row.state, style=_STYLES[row.state]),
        "" if step is None else f"{step:.0f}" + (f"/{steps:.0f}" if steps else ""),
        _shown(row.figure("loss")),
        _shown(row.figure("val_loss")),
        clock(seconds) if seconds else "",
        clock(left) if left is not None else "",
    ]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _number(content: Mapping[str, Any], key: str) -> float:
    value = content.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _counted(rows: Iterable[Row]) -> list[tuple[str, int]]:
    counts = Counter(row.state for row in rows)
    return [(state, counts[state]) for state in _COUNTED if counts[state]]


def _count(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"
