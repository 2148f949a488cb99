"""``sweep.dry_run=true``: the jobs of a sweep and how long they would take, with nothing of it started.

How fast jobs are is found out by a trial run of a few steps, one for all jobs of the same model, data and Trainer;
where a job with the very same ones has finished already, it has taken what it has taken.
"""

from __future__ import annotations

import heapq
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_lightning.cli.sweep.again import to_go_on
from lora_lightning.cli.sweep.command import clean_environment, job_command, job_variables
from lora_lightning.cli.sweep.compose import Composed, hydra_config, is_ours
from lora_lightning.sweeps import runs
from lora_lightning.sweeps.devices import Pool, Slot
from lora_lightning.sweeps.length import length
from lora_lightning.sweeps.manifest import entries, short_overrides

_STEPS = 5
_BATCHES = 2
_PACE = "lora_lightning.sweeps.pace.Pace"
_LENGTH = {"max_steps", "max_epochs", "limit_val_batches", "val_check_interval", "check_val_every_n_epoch"}
# Settings that are no matter of speed.
_ELSEWHERE = {"default_root_dir", "seed", "num_sanity_val_steps"}


def list_jobs(jobs: Sequence[Composed], pool: Pool, folder: Path) -> None:
    """Print the jobs of a batch: what sets each apart, its devices, its state, and how long it would take.

    Args:
        jobs: All of them, with their devices.
        pool: The devices there are.
        folder: The sweep's folder; nothing is written there.
    """
    same_as = {each.number: each.same_as for each in entries([each.job for each in jobs], folder)}
    states = {each.job.number: _state(each, same_as[each.job.number]) for each in jobs}
    left = [each for each in jobs if states[each.job.number].startswith("would")]
    seconds, problems = expected(left, [each for each in jobs if states[each.job.number] == "finished"], pool)
    table = Table("job", "settings", "devices", "state", "takes about")
    for each, short in zip(jobs, short_overrides([each.job for each in jobs]), strict=True):
        number = each.job.number
        devices = f"{each.job.devices} {each.job.accelerator.upper()}"
        table.add_row(
            str(number), Text(short), devices, states[number], _told(seconds.get(number)) if each in left else ""
        )
    console = Console()
    console.print(table)
    console.print("\n".join([_summary(left, seconds, pool), *problems]), soft_wrap=True, highlight=False)


def expected(jobs: Sequence[Composed], finished: Sequence[Composed], pool: Pool) -> tuple[dict[int, float], list[str]]:
    """The seconds that jobs would take, by their number, as far as they can be told.

    Args:
        jobs: To be told of.
        finished: Jobs of the same sweep that have finished.
        pool: The devices, of which trial runs get what the jobs would.

    Returns:
        The seconds, and what went wrong with trial runs.
    """
    taken = {_key(each, but=_ELSEWHERE): _seconds_of(each) for each in finished if is_ours(each.config)}
    trials: dict[str, dict[str, Any] | str] = {}
    found: dict[int, float] = {}
    for each in filter(lambda job: is_ours(job.config), jobs):
        seconds = taken.get(_key(each, but=_ELSEWHERE))
        if seconds is None:
            key = _key(each, but=_ELSEWHERE | _LENGTH)
            if key not in trials:
                print(f"Trying {_STEPS} steps of job {each.job.number} …", flush=True)
                trials[key] = _trial(each, pool)
            trial = trials[key]
            seconds = None if isinstance(trial, str) else _from_trial(each, trial)
        if seconds is not None:
            found[each.job.number] = seconds
    return found, [trial for trial in trials.values() if isinstance(trial, str)]


def makespan(jobs: Sequence[runs.Job], seconds: Mapping[int, float], pool: Pool) -> float:
    """How long jobs take together, started in order as places become free."""
    now = 0.0
    running: list[tuple[float, int, Slot]] = []
    for job in jobs:
        while (slot := pool.take(job)) is None:
            now, _, free = heapq.heappop(running)
            pool.give_back(free)
        heapq.heappush(running, (now + seconds[job.number], job.number, slot))
    for _, _, slot in running:
        pool.give_back(slot)
    return max((end for end, _, _ in running), default=0.0)


def _state(job: Composed, same_as: int | None) -> str:
    if same_as is not None:
        return f"as job {same_as}"
    if runs.is_finished(job.job):
        return "finished"
    return "would go on" if to_go_on(job.job.folder, job.config) else "would run"


def _summary(left: Sequence[Composed], seconds: Mapping[int, float], pool: Pool) -> str:
    if not left:
        return "Nothing is left to run."
    known = [each.job for each in left if each.job.number in seconds]
    if not known:
        return f"{len(left)} jobs would run; how long they take is not known."
    places = max(pool.places(job) for job in known)
    at_once = f", up to {places} at once" if places > 1 else ", one after another"
    missing = f"; of {len(left) - len(known)} more it is not known" if len(known) < len(left) else ""
    together = _told(makespan(known, seconds, pool))
    return f"{len(known)} jobs would take about {together}{at_once}{missing}. Nothing was started."


def _told(seconds: float | None) -> str:
    """A time in words.

    >>> _told(42.3), _told(600), _told(7300), _told(None)
    ('42 s', '10 min', '2 h 2 min', '?')
    """
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# ---- how fast


def _key(job: Composed, but: set[str]) -> str:
    """What decides how long a job takes, as text."""
    with hydra_config(job.config):
        parts = {part: OmegaConf.to_container(job.config[part], resolve=True) for part in ("model", "data", "trainer")}
    kept = {
        part: {key: value for key, value in settings.items() if key not in but}  # type: ignore[union-attr]
        for part, settings in parts.items()
    }
    return json.dumps([kept, job.job.accelerator, job.job.devices], sort_keys=True)


def _seconds_of(job: Composed) -> float | None:
    """From the start of a finished job, when Hydra left its settings, to its result."""
    settings = job.job.folder / ".hydra" / "overrides.yaml"
    if not settings.is_file():
        return None
    return (job.job.folder / runs.RESULT).stat().st_mtime - settings.stat().st_mtime


def _from_trial(job: Composed, trial: Mapping[str, Any]) -> float | None:
    with hydra_config(job.config):
        trainer = OmegaConf.to_container(job.config.trainer, resolve=True)
        test = bool(job.config.get("test"))
    run = length(trainer, trial["batches"], trial["val_batches"])  # type: ignore[arg-type]  # a group is a dict
    if run is None:
        return None
    validation = run.val_batches + (trial["val_batches"] if test else 0)
    return trial["around"] + run.steps * trial["step"] + validation * (trial["val_batch"] or 0.0)


def _trial(job: Composed, pool: Pool) -> dict[str, Any] | str:
    """What a trial run has measured and, as ``around``, the seconds beside its steps; or how it failed."""
    slot = pool.take(job.job)
    if slot is None:
        raise RuntimeError(f"a pool in which nothing runs has no place for {job.job}")
    try:
        with tempfile.TemporaryDirectory(prefix="lora-trial-") as folder:
            place, log = Path(folder) / str(job.job.number), Path(folder) / "log.txt"
            pace = Path(folder) / "pace.json"
            overrides = [each for each in job.overrides if not each.lstrip("+~").startswith("logger")]
            begun = time.monotonic()
            with log.open("wb") as output:
                status = subprocess.run(
                    job_command([*overrides, *_of_trial(job.config, pace)], place),
                    env=clean_environment() | slot.environment() | job_variables(Path(folder), job.job.number),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                ).returncode
            seconds = time.monotonic() - begun
            found = runs.read_json(pace)
            if status or found is None:
                last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                return f"The trial of job {job.job.number} ended with status {status}:\n" + "\n".join(last)
    finally:
        pool.give_back(slot)
    return found | {"around": max(0.0, seconds - found["measured"])}


def _of_trial(config: DictConfig, pace: Path) -> list[str]:
    batches = [f"trainer.limit_val_batches={_BATCHES}"] if config.trainer.limit_val_batches != 0 else []
    return [
        "logger=csv",
        f"trainer.max_steps={_STEPS}",
        "trainer.max_epochs=-1",
        f"trainer.num_sanity_val_steps={_BATCHES}",
        *batches,
        "test=false",
        "optimized_metric=null",
        f"+callbacks.pace={{_target_: {_PACE}, path: '{pace}'}}",
    ]
