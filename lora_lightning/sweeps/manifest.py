"""``sweep.json``: what a sweep is and which jobs it has, in its folder; and that a folder belongs to one sweep."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.whole import write_whole
from lora_lightning.sweeps.locks import holder, lock
from lora_lightning.sweeps.runs import Job, read_json

NAME = "sweep.json"
LOCK = ".{}.lock"
FORMAT = 1
# What makes it this sweep and no other. Where its jobs run may change when it goes on, and the command's wording too.
_IDENTITY = {
    "script": "script",
    "config_name": "configuration",
    "overrides": "overrides",
    "sweeper": "sweeper",
    "metric": "metric",
    "mode": "mode of the metric",
}


@dataclass(frozen=True)
class Entry:
    """A job, as the manifest has it.

    Attributes:
        number: Hydra's number of the job.
        overrides: The job's own settings.
        folder: Its folder, relative to the sweep's.
        same_as: The number of an earlier job with equal overrides, whose result is this one's too; or None.
    """

    number: int
    overrides: tuple[str, ...]
    folder: str
    same_as: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a sweep is.

    Attributes:
        name: The name of its folder.
        command: The program and its arguments, as in ``sys.argv``.
        script: What was run: a file or a module.
        config_name: The primary configuration, or None.
        overrides: Those of the whole sweep as typed, without ``hydra.*`` and ``sweep.*``.
        metric: What jobs are compared by (``optimized_metric``), or None.
        mode: ``"min"`` or ``"max"``: which metric is the better one.
        sweeper: Target of the sweeper.
        launcher: Target of the launcher.
        started: When it was first started, in seconds since 1970.
        version: Of this package, when it was first started.
        jobs: So far; a searching sweeper adds to them.
    """

    name: str
    command: tuple[str, ...]
    script: str
    config_name: str | None
    overrides: tuple[str, ...]
    metric: str | None
    mode: str
    sweeper: str
    launcher: str
    started: float
    version: str
    jobs: tuple[Entry, ...] = ()

    def with_jobs(self, entries: Sequence[Entry]) -> Manifest:
        """The manifest with more jobs; those that it has already stay as they are.

        Raises:
            LoraConfigError: A job of this number has other overrides or another folder.
        """
        known = {entry.number: entry for entry in self.jobs}
        problems = [
            f"job {new.number} is {' '.join(new.overrides) or 'without overrides'} in {new.folder}, "
            f"and was {' '.join(old.overrides) or 'without overrides'} in {old.folder}"
            for new in entries
            if (old := known.get(new.number)) is not None and (old.overrides, old.folder) != (new.overrides, new.folder)
        ]
        if problems:
            raise LoraConfigError(_another(self.name, problems))
        known |= {entry.number: entry for entry in entries}
        return replace(self, jobs=tuple(known[number] for number in sorted(known)))

    def job(self, number: int) -> Entry | None:
        """The job of a number, if there is one."""
        return next((entry for entry in self.jobs if entry.number == number), None)

    def write(self, folder: Path) -> Path:
        """Leave it in the sweep's folder: the whole of it, or what was there before."""
        content = json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False)
        return write_whole(folder / NAME, content + "\n")


def entries(jobs: Sequence[Job], sweep: Path, before: Sequence[Entry] = ()) -> list[Entry]:
    """Jobs as a manifest has them; of several with equal overrides all but the first say which that is.

    Args:
        jobs: The jobs of a batch, in order.
        sweep: The sweep's folder.
        before: The jobs of earlier batches.
    """
    first: dict[frozenset[str], int] = {}
    for entry in before:
        first.setdefault(frozenset(entry.overrides), entry.number)
    made = []
    for job in jobs:
        earliest = first.setdefault(frozenset(job.overrides), job.number)
        folder = os.path.relpath(job.folder, sweep)
        made.append(Entry(job.number, job.overrides, folder, None if earliest == job.number else earliest))
    return made


def read(folder: Path) -> Manifest | None:
    """The manifest in a folder; None where there is none.

    Raises:
        LoraConfigError: It cannot be read, or a later version has written it.
    """
    path = folder / NAME
    if not path.exists():
        return None
    content = read_json(path)
    if content is None:
        raise LoraConfigError(f"{path} is no mapping in JSON: it was not written by a sweep, or is damaged. Delete it")
    if content.get("format") != FORMAT:
        raise LoraConfigError(f"{path} has format {content.get('format')!r}, and format {FORMAT} is understood here")
    try:
        jobs = [Entry(**job | {"overrides": tuple(job["overrides"])}) for job in content["jobs"]]
        known = {field.name: content[field.name] for field in fields(Manifest)}
    except (KeyError, TypeError) as error:
        raise LoraConfigError(f"{path} is not a sweep's manifest: {type(error).__name__}: {error}") from None
    tuples = {key: tuple(known[key]) for key in ("command", "overrides")}
    return Manifest(**known | tuples | {"jobs": tuple(jobs)})


def open_sweep(folder: Path, new: Manifest) -> Manifest:
    """Begin a sweep in a folder, or go on with the same one.

    Args:
        folder: The sweep's folder.
        new: What is to be run now.

    Returns:
        What is in the folder from now on: of a sweep that goes on its first start and its jobs, which were there.

    Raises:
        LoraConfigError: The folder belongs to another sweep; with what is different.
    """
    old = read(folder)
    if old is not None:
        if problems := differences(old, new):
            raise LoraConfigError(_another(str(folder), problems))
        new = replace(new, started=old.started, version=old.version, jobs=old.jobs).with_jobs(new.jobs)
    new.write(folder)
    return new


def differences(old: Manifest, new: Manifest) -> list[str]:
    """In what two sweeps are not the same, in words; nothing where one may go on with the other."""
    found = []
    for key, word in _IDENTITY.items():
        was, now = getattr(old, key), getattr(new, key)
        if was == now:
            continue
        if key != "overrides":
            found.append(f"{word}: was {was}, is {now}")
        elif sorted(was) == sorted(now):
            found.append(f"{word}: the same in another order, which numbers the jobs otherwise: was {' '.join(was)}")
        else:
            gone, come = ([each for each in a if each not in b] for a, b in ((was, now), (now, was)))
            parts = [f"{' '.join(each)} {how}" for each, how in ((gone, "is gone"), (come, "is new")) if each]
            found.append(f"{word}: {', '.join(parts) or 'some are there more often'}")
    return found


@contextlib.contextmanager
def alone_in(folder: Path, what: str = "sweep") -> Iterator[None]:
    """Hold a folder, so that no second process runs the same sweep.

    Args:
        folder: The sweep's; made if need be.
        what: What is held: the ``sweep``, or the ``search`` that launches one batch of it after the other.

    Raises:
        LoraConfigError: Another process holds it; with which one.
    """
    path = folder / LOCK.format(what)
    descriptor = lock(path, f"process {os.getpid()} on {socket.gethostname()}")
    if descriptor is None:
        raise LoraConfigError(
            f"{folder}: this {what} is being run by {holder(path) or 'another process'} at this moment. "
            f"Wait until it has ended, or end it; started again, a {what} goes on where it was"
        )
    try:
        yield
    finally:
        os.close(descriptor)


def _another(folder: str, problems: Sequence[str]) -> str:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"{folder} is the folder of another sweep:\n{listed}\nName another folder with hydra.sweep.dir, or delete "
        "this one if its results are not needed"
    )


# Any: jobs of a sweep and entries of a manifest alike
def short_overrides(jobs: Sequence[Any]) -> list[str]:
    """What sets each of several jobs apart, short enough for a table's column or a name.

    What all jobs have in common is left out; of a key the last part is kept, or as many as tell it from the others;
    long values lose their middle. Different jobs are told apart by what is left.

    Args:
        jobs: What has ``overrides``: a `Job`, an `Entry`.

    Returns:
        A text for each job, like ``"r=8 lr=0.001"``.

    >>> from types import SimpleNamespace
    >>> grid = [["lora.r=8", "optimizer.lr=1e-3", "seed=1"], ["lora.r=16", "optimizer.lr=1e-3", "seed=1"]]
    >>> short_overrides([SimpleNamespace(overrides=each) for each in grid])
    ['r=8', 'r=16']
    """
    each_one = [tuple(job.overrides) for job in jobs]
    if not each_one:
        return []
    common = set.intersection(*map(set, each_one))
    own = [tuple(text for text in texts if text not in common) for texts in each_one]
    if not any(own):  # one job, or the same one again and again
        own = each_one
    keys = {_key(text) for texts in own for text in texts}
    names = {key: shortest(key, keys) for key in keys}
    short = [" ".join(_short(text, names) for text in texts) or "defaults" for texts in own]
    told_apart = len(set(short)) == len({frozenset(texts) for texts in own})
    return short if told_apart else [" ".join(texts) or "defaults" for texts in own]


_LONGEST = 28


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def shortest(key: str, keys: Collection[str]) -> str:
    """The shortest ending of a key that tells it from other keys.

    >>> [shortest(key, ["lora.r", "data.name", "model.name"]) for key in ("lora.r", "data.name")]
    ['r', 'data.name']
    """
    parts = key.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(other == key or not f".{other}".endswith(f".{ending}") for other in keys):
            return ending
    return key


def _short(override: str, names: dict[str, str]) -> str:
    if override.startswith("~"):
        return f"no {names[_key(override)]}"
    value = override.partition("=")[2].strip("'\"")
    if len(value) > _LONGEST and "/" in value:
        value = "…/" + value.rstrip("/").rpartition("/")[2]
    if len(value) > _LONGEST:
        half = _LONGEST // 2
        value = f"{value[: half - 1]}…{value[-half:]}"
    return f"{names[_key(override)]}={value}"
