"""What a sweep has left, read from its folder alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.sweeps import manifest
from lora_lightning.sweeps.manifest import Entry, shortest
from lora_lightning.sweeps.report.reasons import reason_of
from lora_lightning.sweeps.report.values import is_number, settings_of, shown
from lora_lightning.sweeps.runs import PROGRESS, RESULT, Job, read_json, result_of

STOPPED_BY_SWEEP = ("pruned", "halving")  # how `ended_by` begins where the sweep has stopped a job
NOT_REPEATED = "seed"  # jobs that differ in this alone are one setting tried several times


@dataclass(frozen=True)
class Row:
    """One job and what came out of it.

    Attributes:
        number: Its number in the sweep.
        overrides: All its settings, as the sweeper gave them.
        folder: Its folder; absolute.
        state: ``finished``, ``stopped`` (by the sweep, before its end), ``failed``, ``interrupted``, ``unfinished``
            (it has begun and left no result), ``not started`` or ``same`` (another job has the same settings).
        settings: The value of each swept key.
        result: What its ``result.json`` says.
        metric: The value that jobs are compared by; None where it has none that is finite.
        reason: Why it failed or how far it is, in words; empty for a finished one.
        same_as: The number of the job whose settings it has.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    state: str
    settings: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metric: float | None = None
    reason: str = ""
    same_as: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder has it.

    Attributes:
        folder: Where it is; absolute.
        name: What it is called.
        command: What was typed, or nothing where that is not known.
        script: The program of each job, or None where that is not known.
        metric: What jobs are compared by, or None.
        mode: ``min`` or ``max``: which end of the metric is good.
        keys: The settings that were swept, in the order of the overrides.
        rows: The jobs by their number.
    """

    folder: Path
    name: str
    command: tuple[str, ...]
    script: str | None
    metric: str | None
    mode: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]

    @cached_property
    def ranked(self) -> list[Row]:
        """The finished jobs, the best first; those without a finite metric last, and of equal ones the first."""
        return sorted(self.of_state("finished"), key=self.rank)

    @property
    def best(self) -> Row | None:
        """The finished job with the best metric."""
        return self.ranked[0] if self.ranked and self.ranked[0].metric is not None else None

    @cached_property
    def short(self) -> dict[str, str]:
        """Short names of the swept keys."""
        return {key: shortest(key, self.keys) for key in self.keys}

    @property
    def seed_keys(self) -> tuple[str, ...]:
        """The swept keys that are seeds."""
        return tuple(key for key in self.keys if key.rpartition(".")[2] == NOT_REPEATED)

    @property
    def setting_keys(self) -> tuple[str, ...]:
        """The swept keys that are no seeds."""
        return tuple(key for key in self.keys if key not in self.seed_keys)

    def of_state(self, *states: str) -> list[Row]:
        """The jobs in one of some states."""
        return [row for row in self.rows if row.state in states]

    def rank(self, row: Row) -> tuple[bool, float, int]:
        """What jobs are sorted by, the best first."""
        return (row.metric is None, self.cost(row.metric), row.number)

    def cost(self, metric: float | None) -> float:
        """The metric, turned so that less is better; without one the most."""
        return math.inf if metric is None else -metric if self.mode == "max" else metric

    def label(self, row: Row, keys: Sequence[str] | None = None) -> str:
        """What sets a job apart, in a few words."""
        chosen = self.keys if keys is None else keys
        return ", ".join(f"{self.short[key]}={shown(row.settings[key])}" for key in chosen if key in row.settings)

    def inside(self, path: str | Path) -> str:
        """A path as seen from the sweep's folder, where it lies in it."""
        path = Path(path)
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def collect(folder: Path, *, metric: str | None = None, mode: str | None = None) -> Sweep:
    """Read a sweep from its folder: the manifest, and of each job what it has left.

    Args:
        folder: The sweep's folder: of this package's launchers, or of a plain Hydra multirun whose jobs left results.
        metric: What to compare jobs by; None: what the sweep says.
        mode: ``min`` or ``max``; None: what the sweep says.

    Raises:
        LoraConfigError: It is no folder of a sweep.
    """
    folder = folder.absolute()
    if mode not in (None, "min", "max"):
        raise LoraConfigError(f"mode must be min or max, got {mode!r}")
    known = manifest.read(folder)
    entries = _found(folder) if known is None else known.jobs
    jobs = {entry: Job(entry.number, entry.overrides, folder / entry.folder) for entry in entries}
    configs = {entry.number: _config(job.folder) for entry, job in jobs.items()}
    results = {entry.number: result_of(job) or {} for entry, job in jobs.items()}
    keys = _swept([settings_of(entry.overrides) for entry in entries])
    first = next((config for config in configs.values() if config), {})
    metric = metric or (known.metric if known is not None else first.get("optimized_metric"))
    if metric is None and any(is_number(result.get("value")) for result in results.values()):
        metric = "value"  # what somebody's own script has returned
    if mode is None:
        mode = known.mode if known is not None else (first.get("sweep") or {}).get("mode", "min")
    rows = []
    for entry, job in jobs.items():
        result = results[job.number]
        state = _state(job, result) if entry.same_as is None else "same"
        rows.append(
            Row(
                number=job.number,
                overrides=job.overrides,
                folder=job.folder,
                state=state,
                settings=_settings(keys, job.overrides, configs[job.number]),
                result=result,
                metric=_finite(result.get(metric)) if metric else None,
                reason=reason_of(state, result, read_json(job.folder / PROGRESS), job.log),
                same_as=entry.same_as,
            )
        )
    return Sweep(
        folder=folder,
        name=folder.name if known is None else known.name,
        command=() if known is None else known.command,
        script=None if known is None else known.script,
        metric=metric,
        mode=mode or "min",
        keys=keys,
        rows=tuple(sorted(rows, key=lambda row: row.number)),
    )


def check_metric(sweep: Sweep) -> None:
    """Make sure that finished jobs report what they are compared by; a value that is not finite is a report too.

    Raises:
        LoraConfigError: None of them does; with what they do report.
    """
    finished = sweep.of_state("finished", "stopped")
    if sweep.metric is None or not finished or any(sweep.metric in row.result for row in finished):
        return
    known = sorted({key for row in finished for key, value in row.result.items() if is_number(value)})
    there_are = f"they report {', '.join(known)}" if known else "they report no number at all"
    raise LoraConfigError(
        f"No job of {sweep.folder} reports {sweep.metric!r}{did_you_mean(sweep.metric, known)}; {there_are}. "
        f"To compare them by another: python scripts/sweep_report.py {sweep.folder} --metric <one of these>"
    )


def _found(folder: Path) -> list[Entry]:
    """The jobs of a sweep without a manifest: the folders in it that have settings and a result."""
    overrides = sorted(folder.glob("*/.hydra/overrides.yaml"))
    places = [path.parent.parent for path in overrides if (path.parent.parent / RESULT).is_file()]
    if not places:
        what = f"it has no {manifest.NAME}, and no folder in it has {RESULT} and .hydra/overrides.yaml"
        raise LoraConfigError(
            f"{folder} is no folder of a sweep: {what if folder.is_dir() else 'there is no such folder'}. "
            "Name the one that all runs of a --multirun lie in, as in outputs/<name>/sweep_<date and time>"
        )
    numbered = all(place.name.isdecimal() for place in places)
    return [
        Entry(int(place.name) if numbered else index, _lines(place / ".hydra" / "overrides.yaml"), place.name)
        for index, place in enumerate(places)
    ]


def _lines(path: Path) -> tuple[str, ...]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    return tuple(map(str, content)) if isinstance(content, list) else ()


def _config(folder: Path) -> dict[str, Any]:
    """The resolved settings of a job, or nothing where it has left none that can be read."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, ValueError, OmegaConfBaseException):
        return {}
    except Exception as error:  # YAML's own errors, of a file that was broken off
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        return {}
    return content if isinstance(content, dict) else {}


def _swept(settings: list[dict[str, Any]]) -> tuple[str, ...]:
    """The keys in which jobs differ; all of them where none do."""
    keys = list(dict.fromkeys(key for each in settings for key in each))
    missing = object()
    differing = [key for key in keys if len({repr(each.get(key, missing)) for each in settings}) > 1]
    return tuple(differing or keys)


def _settings(keys: Sequence[str], overrides: Sequence[str], config: dict[str, Any]) -> dict[str, Any]:
    """The job's value of each swept key: what was given, else what its configuration came to; a group has none."""
    given = settings_of(overrides)
    found = {}
    for key in keys:
        if key in given:
            found[key] = given[key]
            continue
        node: Any = config
        for part in key.split("."):
            node = node.get(part, ...) if isinstance(node, dict) else ...
        if node is not ... and not isinstance(node, dict):
            found[key] = str(node) if isinstance(node, list) else node
    return found


def _state(job: Job, result: dict[str, Any]) -> str:
    if not result:
        begun = (job.folder / PROGRESS).is_file() or job.log.is_file()
        return "unfinished" if begun else "not started"
    if result.get("status") == "finished":
        return "stopped" if str(result.get("ended_by") or "").startswith(STOPPED_BY_SWEEP) else "finished"
    return "interrupted" if result.get("status") == "interrupted" else "failed"


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else None
