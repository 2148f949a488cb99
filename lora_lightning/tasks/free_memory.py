"""How much memory a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lora_lightning.layers.chunks import free_bytes


def free_memory(device: torch.device, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process may still take: of the GPU; on a CPU what the machine, and its container, have left."""
    if device.type == "cuda":
        return free_bytes(device)
    return min([psutil.virtual_memory().available, *_left_in_container(cgroup)])


def _left_in_container(cgroup: Path) -> Iterator[int]:
    """What is left below the limit of a control group, if there is one; files that were read are given up for it."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (cgroup / limit).read_text().strip(), int((cgroup / used).read_text())
            lines = (cgroup / limit).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        if most.isdigit():  # else "max"
            yield max(0, int(most) - now + files)
