"""What jobs of one machine run on: a pool of GPUs and of shares of the CPU, and who has what."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.runs import Job, Work

VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CPU = ""


@dataclass(frozen=True)
class Slot:
    """The place of one piece of work.

    Attributes:
        gpus: Its GPUs, as the driver or the user names them; none on a CPU.
        threads: How many threads each of its processes may use.
    """

    gpus: tuple[str, ...]
    threads: int

    def environment(self, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The variables that keep a process in its place; fewer threads, where the user has said so, stay."""
        return {VISIBLE: ",".join(self.gpus)} | {
            name: str(min(self.threads, _count(inherited.get(name), self.threads))) for name in _THREADS
        }

    def __str__(self) -> str:
        if not self.gpus:
            return f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"GPU {','.join(gpu if len(gpu) < 12 else f'{gpu[:11]}…' for gpu in self.gpus)}"


class Pool:
    """The devices of a machine, each of which several jobs may share; the CPU is one device.

    Args:
        jobs_per_device: How many jobs share a device.
        gpus: The GPUs there are; None: those that this process sees.
        cores: The CPU cores there are; None: those that this process may use.

    Raises:
        LoraConfigError: No job would ever run.
    """

    def __init__(
        self, jobs_per_device: int = 1, *, gpus: Iterable[str] | None = None, cores: int | None = None
    ) -> None:
        if isinstance(jobs_per_device, bool) or not isinstance(jobs_per_device, int) or jobs_per_device < 1:
            raise LoraConfigError(f"jobs_per_device must be a whole number from 1 on, got {jobs_per_device!r}")
        self.jobs_per_device = jobs_per_device
        self.gpus = visible_gpus() if gpus is None else tuple(gpus)
        self.cores = usable_cores() if cores is None else cores
        self._jobs = Counter(dict.fromkeys((*self.gpus, _CPU), 0))

    def check(self, works: Iterable[Work | Job]) -> None:
        """Make sure that each job can ever get its devices.

        Raises:
            LoraConfigError: Some cannot; with all of them and what there is.
        """
        problems = []
        for job in _jobs(works):
            if job.devices < 1:
                problems.append(f"job {job.number} is to have {job.devices} devices")
            elif job.accelerator != "cpu" and job.devices > len(self.gpus):
                problems.append(f"job {job.number} needs {_gpus(job.devices)}")
        if problems:
            shown = "\n".join(f"  - {each}" for each in problems[:10])
            more = f"\n  - and {len(problems) - 10} more jobs" if len(problems) > 10 else ""
            raise LoraConfigError(
                f"More devices per job than there are. Here {self.described()}:\n{shown}{more}\n"
                "Give each job fewer with trainer.devices, or none with trainer=cpu"
            )

    def take(self, work: Work | Job) -> Slot | None:
        """A place for a job (or several that are trained together); None while there is none.

        Those GPUs are taken that the fewest jobs share.
        """
        if _accelerator(work) == "cpu":
            if self._jobs[_CPU] >= self.jobs_per_device:
                return None
            self._jobs[_CPU] += 1
            return Slot((), self._threads(self.jobs_per_device * work.devices))
        free = [gpu for gpu in self.gpus if self._jobs[gpu] < self.jobs_per_device]
        if len(free) < work.devices:
            return None
        taken = sorted(free, key=lambda gpu: self._jobs[gpu])[: work.devices]  # in their order, where it is the same
        self._jobs.update(taken)
        return Slot(
            tuple(gpu for gpu in self.gpus if gpu in taken), self._threads(self.jobs_per_device * len(self.gpus))
        )

    def give_back(self, slot: Slot) -> None:
        """Make a place free for others."""
        self._jobs.subtract(slot.gpus or (_CPU,))

    def places(self, work: Work | Job) -> int:
        """How many such jobs run at once, at most."""
        if _accelerator(work) == "cpu":
            return self.jobs_per_device
        return len(self.gpus) * self.jobs_per_device // max(1, work.devices)

    def described(self) -> str:
        """What there is, in words."""
        shared = f", {self.jobs_per_device} jobs on each" if self.jobs_per_device > 1 else ""
        cores = f"{self.cores} CPU core{'s' if self.cores != 1 else ''}"
        if self.gpus:
            return f"are {_gpus(len(self.gpus))} ({', '.join(self.gpus)}) and {cores}{shared}"
        hidden = f" ({VISIBLE} hides any there are)" if VISIBLE in os.environ else ""
        return f"is no GPU{hidden}, and {cores}{shared}"

    def _threads(self, processes: int) -> int:
        return max(1, self.cores // max(1, processes))


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that they have in ``CUDA_VISIBLE_DEVICES``.

    Indices, UUIDs and names of MIG instances stay as they are. As for CUDA the list ends at the first ``-1``, and an
    empty one is none. Without the variable it is what the machine has.
    """
    given = environment.get(VISIBLE)
    if given is None:
        return _gpus_of_machine()
    names: list[str] = []
    for name in (each.strip() for each in given.split(",")):
        if not name or name.startswith("-") or name == "NoDevFiles":
            break
        if name not in names:
            names.append(name)
    return tuple(names)


@functools.cache
def _gpus_of_machine() -> tuple[str, ...]:
    """Asked of the driver, without torch."""
    try:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        out = None
    if out is not None and out.returncode == 0:
        return listed_gpus(out.stdout)
    folder = Path("/proc/driver/nvidia/gpus")
    return tuple(str(index) for index in range(len(list(folder.iterdir())))) if folder.is_dir() else ()


def listed_gpus(text: str) -> tuple[str, ...]:
    r"""The names of the GPUs that ``nvidia-smi -L`` lists; of one that is split, its MIG instances.

    >>> listed_gpus("GPU 0: NVIDIA H100 (UUID: GPU-aa)\nGPU 1: NVIDIA H100 (UUID: GPU-bb)")
    ('0', '1')
    >>> listed_gpus("GPU 0: NVIDIA H100 (UUID: GPU-aa)\n  MIG 1g.10gb     Device  0: (UUID: MIG-cc)")
    ('MIG-cc',)
    """
    names: dict[str, list[str]] = {}
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            names[gpu[1]] = []
        elif names and (instance := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line)):
            names[next(reversed(names))].append(instance[1])
    return tuple(name for gpu, instances in names.items() for name in instances or [gpu])


def meant(devices: Any, accelerator: str | None = "auto", *, gpus: int | None = None) -> tuple[str, int]:
    """What a Trainer's ``accelerator`` and ``devices`` mean on this machine.

    Args:
        devices: A number, a list of indices, either of them as text, ``auto`` or -1: all there are; on a CPU one.
        accelerator: ``auto``: a GPU if there is one. Others than GPUs (``mps``) are shared as the CPU is.
        gpus: How many GPUs there are; None: those that this process sees.

    Returns:
        ``"cpu"`` or ``"gpu"``, and how many of them. At least one, so that a job whose GPU is missing is told of.

    Raises:
        LoraConfigError: It means nothing.

    >>> meant(-1, "gpu", gpus=8), meant("auto", "auto", gpus=0), meant([0, 3], "cuda", gpus=8), meant("2", "cpu")
    (('gpu', 8), ('cpu', 1), ('gpu', 2), ('cpu', 2))
    """
    gpus = len(visible_gpus()) if gpus is None else gpus
    name = str(accelerator or "auto").lower()
    kind = "gpu" if name in ("gpu", "cuda") or (name == "auto" and gpus) else "cpu"
    number = devices
    if isinstance(devices, str) and re.fullmatch(r"[\d\s,\[\]]*\d[\d\s,\[\]]*", devices):
        indices = [each for each in re.split(r"[\s,\[\]]+", devices) if each]
        number = int(devices) if devices.strip().isdigit() else len(indices)
    elif isinstance(devices, (list, tuple)) or type(devices).__name__ == "ListConfig":
        number = len(devices)
    if number in (None, "auto", -1, "-1"):
        number = max(1, gpus) if kind == "gpu" else 1
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise LoraConfigError(
            f"trainer.devices must be a number from 1 on, a list of indices, -1 or auto, got {devices!r}"
        )
    return kind, number


def _jobs(works: Iterable[Work | Job]) -> Iterable[Job]:
    for each in works:
        yield from each.jobs if isinstance(each, Work) else (each,)


def _accelerator(work: Work | Job) -> str:
    return work.accelerator if isinstance(work, Job) else work.jobs[0].accelerator


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number != 1 else ''}"


def _count(value: str | None, otherwise: int) -> int:
    """A variable's number; of a list (one for each level of nesting) the first."""
    first = (value or "").partition(",")[0].strip()
    return max(1, int(first)) if first.isdigit() else otherwise
