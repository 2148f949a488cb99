"""Whether this machine can do what the project does: one check a function, each within a limit of time."""

from __future__ import annotations

from lora_lightning.reports.doctor.check import Check, Finding, examine
from lora_lightning.reports.doctor.machine import devices, disk, memory, precision
from lora_lightning.reports.doctor.network import hub, tokens
from lora_lightning.reports.doctor.packages import extras, packages, python
from lora_lightning.reports.doctor.running import processes, training

CHECKS = (
    Check("python", python, 10),
    Check("packages", packages, 10),
    Check("extras", extras, 10),
    Check("devices", devices, 60),
    Check("precision", precision, 30),
    Check("memory", memory, 10),
    Check("disk", disk, 10),
    Check("processes", processes, 240, "warning"),
    Check("hub", hub, 15, "warning"),
    Check("tokens", tokens, 10),
    Check("training", training, 240),
)
"""In the order in which they are told: what others rest upon comes first."""

__all__ = ["CHECKS", "Check", "Finding", "examine"]
