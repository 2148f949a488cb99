"""How a job of a sweep runs by itself: its command, its environment, and what comes back.

A job is a program of its own, never a call in the sweep's process: Lightning starts the other ranks by the command line
of the first, and that of a sweep would run the whole sweep again in each of them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import CompactHydraException

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import runs
from lora_lightning.sweeps.processes import Process, said
from lora_lightning.sweeps.runs import Work

_RETURNING = "hydra.callbacks.lora_lightning._target_"
RETURNED = "hydra_plugins.lora_lightning.returned.ReturnedValue"

# What says which process of a group this one is. A job that found it would wait for processes that are not its own.
_OTHERS = re.compile(
    r"(LOCAL_|GLOBAL_|NODE_|GROUP_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PL_GLOBAL_SEED"
    r"|PL_SEED_WORKERS|(TORCHELASTIC|SLURM|SRUN|PMI|PMIX|OMPI_COMM)_.*"
)
# Settings of Hydra that are about the sweep and not about a job.
_OF_THE_SWEEP = re.compile(
    r"[+~]*(hydra/(launcher|sweeper)(@.*)?|hydra\.(mode|run\.dir|sweep\.(dir|subdir)|job\.(num|id)|(launcher|sweeper)\b.*)"
    rf"|{re.escape(_RETURNING)})"
)


class JobFailed(CompactHydraException):
    """A job of a sweep has ended without a result; Hydra prints it without a traceback.

    Args:
        message: What there is to say.
        state: ``failed``; or ``interrupted`` or ``not started``, which may go well another time.
    """

    def __init__(self, message: str, *, state: str = "failed") -> None:
        super().__init__(message)
        self.state = state


def job_command(overrides: Sequence[str], folder: Path, *, argv: Sequence[str] | None = None) -> tuple[str, ...]:
    """The command of one job, which runs it in a folder of its own and as a single run.

    Args:
        overrides: The job's settings, as a sweeper gives them.
        folder: Where it leaves everything; absolute.
        argv: How the sweep was started; None: ``sys.argv``. Which configuration is read and Hydra's own settings are
            those of the sweep.

    Returns:
        The program and its arguments.

    Raises:
        LoraConfigError: The sweep was not started from a script.
    """
    argv = sys.argv if argv is None else argv
    flags, of_hydra = settings_in(argv)
    return (
        *program(argv[0]),
        *flags,
        *of_hydra,
        *overrides,
        f"hydra.run.dir={quoted(str(folder))}",
        f"++{_RETURNING}={RETURNED}",
        "hydra.mode=RUN",
    )


def settings_in(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a command says besides the settings of its jobs.

    Args:
        argv: A script and its arguments.

    Returns:
        The flags that tell which configuration is read, and Hydra's own settings but for those of a sweep, the folder
        of a run and what `job_command` adds.
    """
    given = get_args_parser().parse_args(list(argv[1:]))
    flags = [
        word
        for flag in ("config_path", "config_name", "config_dir")
        if (value := getattr(given, flag)) is not None
        for word in (f"--{flag.replace('_', '-')}", value)
    ]
    return flags, [each for each in given.overrides if _is_of_hydra(each) and not _OF_THE_SWEEP.match(_key(each))]


def place_of(job: runs.Job, sweep: Path) -> tuple[str, ...]:
    """Hydra's own settings that a job would have in the sweep's process, for configurations that read them."""
    return (f"hydra.job.num={job.number}", f"hydra.job.id='{job.number}'", f"hydra.sweep.dir={quoted(str(sweep))}")


def clean_environment() -> dict[str, str]:
    """The environment of this process without what places it in a group of processes."""
    return {name: value for name, value in os.environ.items() if not _OTHERS.fullmatch(name)}


def job_variables(sweep: Path, number: int) -> dict[str, str]:
    """What tells a process that it is a job of a sweep.

    Args:
        sweep: The folder of the sweep.
        number: The job's number in it.
    """
    return {runs.SWEEP: str(sweep), runs.JOB: str(number)}


def job_environment(sweep: Path, number: int) -> dict[str, str]:
    """The whole environment of a job; see `clean_environment` and `job_variables`."""
    return clean_environment() | job_variables(sweep, number)


def run_alone(
    overrides: Sequence[str], folder: Path, *, sweep: Path, number: int, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run one job as a process of its own, and wait for it.

    Args:
        overrides: The job's settings.
        folder: Where it leaves everything; absolute.
        sweep: The folder of the sweep.
        number: The job's number in it.
        argv: How the sweep was started; None: ``sys.argv``.

    Returns:
        What it left as its ``result.json``.

    Raises:
        JobFailed: It ended with an error or left no result; with the last lines that it printed.
    """
    job = runs.Job(number, tuple(overrides), folder)
    command = job_command((*overrides, *place_of(job, sweep)), folder, argv=argv)
    process = Process(Work((job,), command, job.log), job_environment(sweep, number))
    try:
        status = process.wait()
    except BaseException:
        process.stop(signal.SIGINT)
        process.wait()
        raise
    result = runs.result_of(job)
    if status or result is None:
        lines = process.last_lines()
        ended = said(status, lines) if status else "it left no result.json"
        raise JobFailed(f"Job {number} ({' '.join(overrides)}): {ended}. The end of {job.log}:\n" + "\n".join(lines))
    return result


def quoted(value: str) -> str:
    r"""A value that Hydra reads as this very text.

    >>> quoted("runs/it's")
    "'runs/it\\'s'"
    """
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), value)
    return "'" + escaped.replace("${", r"\${") + "'"


def program(path: str) -> tuple[str, ...]:
    """How to start a script again: as the module it was started as, or by its file.

    Args:
        path: ``sys.argv[0]``.

    Raises:
        LoraConfigError: There is no such file.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    file = Path(path).resolve()
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file:
        return (sys.executable, "-m", spec.name.removesuffix(".__main__"))
    if not file.is_file():
        raise LoraConfigError(
            f"A sweep starts its script once for each job, and {path!r} is no file that could be started: "
            "run it as `python <file> -m …`"
        )
    return (sys.executable, str(file))


def refuse_ranks(environment: Mapping[str, str]) -> None:
    """Make sure that this is no process of several that each would run the whole sweep.

    Raises:
        LoraConfigError: It is.
    """
    several = environment.get("WORLD_SIZE", "1") not in ("", "1")
    another = any(
        environment.get(name, "0") not in ("", "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    )
    if several or another or any(name.startswith("TORCHELASTIC_") for name in environment):
        raise LoraConfigError(
            "This sweep was started by torchrun, or beside other processes (RANK and WORLD_SIZE are set): each of them "
            "would run all of its jobs. Start it once, with `python` in place of `torchrun …`; its jobs start their "
            "processes themselves, as trainer.devices says"
        )


def _key(override: str) -> str:
    return override.partition("=")[0]


def _is_of_hydra(override: str) -> bool:
    return _key(override).lstrip("+~").startswith(("hydra.", "hydra/"))
