"""The machine: devices, which precision is fast on them, memory, disks."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from lora_lightning.reports.doctor.check import Finding

_GB = 1e9
_TYPES = ("float32", "bfloat16", "float16")


def devices() -> Finding:
    """GPUs, or how many cores of the processor this process may use."""
    import torch

    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{each.name} ({each.total_memory / _GB:.0f} GB)" for each in seen)
        return Finding("ok", f"{listed}; CUDA {torch.version.cuda}")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{allowed} processor cores ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if torch.backends.mps.is_available():
        return Finding("ok", f"Apple GPU (MPS); {text}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "warning",
            f"{text}; there is an NVIDIA driver, which torch {torch.__version__} does not use",
            "install a torch with CUDA (https://pytorch.org/get-started), or look at CUDA_VISIBLE_DEVICES",
        )
    return Finding("ok", text)


def precision() -> Finding:
    """How fast products of matrices are in each type, measured, and whether the type is the machine's own."""
    import torch

    from lora_lightning.tasks.dtype import is_native, likely_device

    device = likely_device()
    rates = {name: _rate(getattr(torch, name), device) for name in _TYPES}
    listed = ", ".join(
        f"{name} {'not at all' if rate is None else f'{rate / 1e9:,.0f} GFLOP/s'}" for name, rate in rates.items()
    )
    return Finding("ok", f"{listed}: take {_advised(rates, is_native(torch.bfloat16, device))}")


def _advised(rates: Mapping[str, float | None], is_native: bool) -> str:
    """Which precision to take, and why.

    Args:
        rates: Operations a second by the type's name; None where the device has none.
        is_native: Whether the device computes in bfloat16 by itself.
    """
    single, half = rates["float32"] or 0.0, rates["bfloat16"]
    if half is None:
        why = "does not run"
    elif half * 1.2 < single:
        why = f"is {single / half:.1f} times slower"
    elif half < single * 1.2:
        why = "is no faster"
    elif is_native:
        return "trainer.precision=bf16-mixed, or a base in bfloat16 (model.dtype=auto)"
    else:
        why = "is only emulated"
    how = "model.dtype=float32" if is_native else "model.dtype=auto takes it by itself"
    return f"float32 ({how}); bfloat16 {why} here"


def _rate(dtype: object, device: object) -> float | None:
    """Operations a second of a product of two matrices; None where the device cannot make it."""
    import torch

    size = 4096 if getattr(device, "type", "") == "cuda" else 384
    try:
        one = torch.ones(size, size, device=device, dtype=dtype)  # type: ignore[call-overload]
        taken = []
        for _ in range(5):  # the best of them: others may be using the machine
            begun = time.perf_counter()
            (one @ one)[0, 0].item()
            taken.append(time.perf_counter() - begun)
    except RuntimeError:
        return None
    return 2 * size**3 / min(taken)


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """What is free of the machine's memory, or of the container's where that has a limit below it."""
    import psutil
    import torch

    from lora_lightning.tasks.free_memory import free_memory

    free, machine = free_memory(torch.device("cpu"), cgroup), psutil.virtual_memory()
    text = f"{free / _GB:.1f} of {machine.total / _GB:.1f} GB free"
    if free < 0.9 * machine.available:
        text += f" below this container's limit ({machine.available / _GB:.1f} on the machine)"
    if free < 3e9:
        return Finding("warning", text, "the demo wants 3 GB; smaller: data.batch_size=1 data.max_length=128")
    return Finding("ok", text)


def disk() -> Finding:
    """What is free where runs, models and temporary files go, and of the memory that loader processes share."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {"here": Path.cwd(), "cache": cache, "temporary files": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(_there(place)).free for name, place in places.items()}
    shared = Path("/dev/shm")
    if shared.is_dir():
        free["/dev/shm"] = shutil.disk_usage(shared).free
    text = ", ".join(f"{name} {size / _GB:.1f} GB" for name, size in free.items()) + " free"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("failure", f"{text}; {Path.cwd()} cannot be written to", "run in a folder of your own")
    if low := [name for name, size in free.items() if size < 2e9 and name != "/dev/shm"]:
        return Finding("warning", text, f"make room ({', '.join(low)}): a run of the demo takes 0.2 GB, models more")
    if free.get("/dev/shm", 1e9) < 256e6:
        remedy = "keep data.num_workers=0, or start the container with --shm-size=2g"
        return Finding("warning", text, remedy)
    return Finding("ok", text)


def _there(place: Path) -> Path:
    """The nearest folder on the way to a place that exists."""
    return next(each for each in (place, *place.parents) if each.exists())
