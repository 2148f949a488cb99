"""How things are measured: interleaved turns, ratios within a turn, memory, saved tensors, profiles. Needs only torch.

A machine's speed drifts (clock, neighbours, memory), so contenders take turns, A B C and then C B A, and a ratio is
taken between two times of the same turn; the median of those ratios is what is told, with their quartiles.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

MB = 2**20


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of some figures, and how many there are."""
    low, middle, high = quartiles(values)
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles; all the same for a single value."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(times: Mapping[str, Sequence[float]], of: str, against: str) -> dict[str, Any]:
    """How long one takes against another: the spread of the ratios within each turn."""
    return spread([a / b for a, b in zip(times[of], times[against], strict=True)])


def interleave(
    turns: Mapping[str, Callable[[int], float]],
    rounds: int,
    *,
    warmup: int = 1,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[str, list[float]]:
    """Let contenders take turns.

    Args:
        turns: A function a contender that runs its n-th turn and returns the seconds it took.
        rounds: How many turns of each are kept.
        warmup: How many turns before those are thrown away.
        go_on: Asked before every round after the first two kept ones; False ends the measuring.

    Returns:
        The seconds of each contender's turns, in order, equally many for all.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(-warmup, rounds):
        if number >= 2 and not go_on():
            break
        names = list(turns)
        for name in names if number % 2 == 0 else reversed(names):
            seconds = turns[name](number)
            if number >= 0:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that a function takes: by CUDA's own events on a GPU (what waits for the CPU is in it), else by clock."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


# ---- memory


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process that are in memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status: peak memory can be measured on Linux only")


def peak_of(run: Callable[[], Any]) -> dict[str, int]:
    """What a function costs this process in memory; to mean anything the process must be a fresh one.

    ``getrusage`` is no help here: a process inherits its parent's peak when it is started.

    Returns:
        ``before`` and ``peak``, in bytes.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident()
    run()
    return {"before": before, "peak": resident("VmHWM")}


def saved_bytes(run: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """The most bytes that autograd keeps for backward at any one time while a function runs.

    Each storage counts once and whole, however many views of it are saved, and weights do not count: they are there
    anyway. Deterministic, unlike what an allocator holds.

    Args:
        run: One step, forward and backward.
        known: Tensors that do not count.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    held: dict[int, list[int]] = {}  # storage -> [how many saved tensors are in it, its bytes]
    now = most = 0

    class Held:
        """A saved tensor, counted for as long as the graph keeps it."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            if self.key in ignored:
                return
            entry = held.setdefault(self.key, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                now += entry[1]
                most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            if self.key not in ignored:
                entry = held[self.key]
                entry[0] -= 1
                if not entry[0]:
                    now -= held.pop(self.key)[1]

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda packed: packed.tensor):
        run()
    return most


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """All parameters and buffers of some modules."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


# ---- where the time goes


def profile(run: Callable[[], Any], device: str = "cpu", top: int = 14) -> dict[str, Any]:
    """Which operations a step's time goes to.

    Returns:
        ``seconds`` of the profiled step, ``ops`` (name, share of the time spent in operations, calls), the largest
        first and what is left as ``other``.
    """
    gpu = device != "cpu"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as told:
        seconds = timed(run, device)
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    # On a GPU only kernels count: operations of the CPU and marks around kernels repeat the kernels' time.
    rows = [
        (row.key.removeprefix("aten::"), getattr(row, key), row.count)
        for row in told.key_averages()
        if not gpu
        or (row.device_type != torch.autograd.DeviceType.CPU and not getattr(row, "is_user_annotation", False))
    ]
    rows.sort(key=lambda row: -row[1])
    whole = sum(row[1] for row in rows) or 1.0
    ops = [{"op": name[:60], "share": value / whole, "calls": calls} for name, value, calls in rows[:top]]
    rest = rows[top:]
    if rest:
        calls = sum(row[2] for row in rest)
        ops.append({"op": "other", "share": sum(row[1] for row in rest) / whole, "calls": calls})
    return {"seconds": seconds, "ops": ops}


# ---- what it was measured on


def machine() -> dict[str, Any]:
    """Processor, cores and versions; no host name and no path."""
    import platform
    from datetime import date
    from importlib import metadata

    told: dict[str, Any] = {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
        told["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    for name in ("torch", "transformers", "lightning", "peft", "liger-kernel", "unsloth"):
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            told[name] = None
    return told


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
