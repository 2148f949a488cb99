"""What Hydra finds by itself in every app once this package is installed: the ``lora`` presets and their resolvers.

This is imported by each Hydra app on the machine, so it imports nothing heavy.
"""

from __future__ import annotations

import math
import os
import zlib
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

USUAL_SCALE = 2.0


class LoraPresets(SearchPathPlugin):
    """Puts the folder of presets on the search path, so that ``+lora=balanced`` works in anybody's app."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the presets, so that an app's own ``lora`` group is found first."""
        search_path.append("lora-lightning", "pkg://lora_lightning.presets")


def alpha_for_rank(r: Any) -> Any:
    """The alpha that makes the scale of plain LoRA 2, for any rank; what is not a number is handed on to be told.

    >>> alpha_for_rank(16)
    32
    """
    return 2 * r if isinstance(r, (int, float)) and not isinstance(r, bool) else r


def learning_rate_for_scale(learning_rate: float, r: Any, lora_alpha: Any, use_rslora: Any) -> float:
    """The learning rate that makes steps of the usual size at any scale of the update.

    The update of a weight is ``s B A`` with ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA. An
    adaptive optimizer moves ``B`` by the learning rate whatever the gradient, so the weight moves by ``s`` times that:
    a scale of 16 at the rate that suits a scale of 2 is eight times too fast. A smaller scale than 2 keeps the rate.

    >>> learning_rate_for_scale(1e-3, 16, 32, False)
    0.001
    >>> learning_rate_for_scale(1e-3, 64, 128, True)
    0.000125
    """
    try:
        scale = abs(lora_alpha / (math.sqrt(r) if use_rslora else r))
    except (TypeError, ValueError, ZeroDivisionError):
        return learning_rate  # such a rank or alpha is refused by LoraConfig, in better words than here
    return learning_rate * min(1.0, USUAL_SCALE / scale) if scale else learning_rate


def job_or_time(time: str, overrides: str = "") -> str:
    """What tells a run's folder from others: the SLURM job, which is the same once it is requeued, or else the time.

    Commands that one job runs one after the other are told apart by a checksum of their settings. In an interactive
    session the time counts, since whoever sits there may run a command twice.

    >>> job_or_time("2025-01-31_12-00-00")
    '2025-01-31_12-00-00'
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return time
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return f"slurm-{job}" + (f"-{zlib.crc32(overrides.encode()):08x}" if overrides else "")


def devices_of_job(accelerator: Any, devices: Any) -> int:
    """How many devices, and with DDP processes, a job trains on.

    >>> devices_of_job("cpu", 2)
    2
    """
    from lora_lightning.sweeps.devices import meant

    return meant(devices, accelerator)[1]


def gpus_of_job(accelerator: Any, devices: Any, elsewhere: bool = False) -> int | None:
    """How many GPUs a job asks a cluster for; None where it trains on the CPU.

    Args:
        accelerator: The Trainer's.
        devices: The Trainer's.
        elsewhere: The job's machine has GPUs, whatever the one has that it is sent from.

    >>> gpus_of_job("cpu", 2), gpus_of_job("auto", 4, True), gpus_of_job("gpu", "auto", True)
    (None, 4, 1)
    """
    from lora_lightning.sweeps.devices import meant

    kind, number = meant(devices, accelerator, gpus=1 if elsewhere else None)
    return number if kind == "gpu" else None


# Cached as the time is: jobs of a sweep keep the folder that was chosen where the sweep was started.
OmegaConf.register_new_resolver("lora_lightning.job_or_time", job_or_time, replace=True, use_cache=True)
OmegaConf.register_new_resolver("lora_lightning.alpha_for_rank", alpha_for_rank, replace=True)
OmegaConf.register_new_resolver("lora_lightning.learning_rate_for_scale", learning_rate_for_scale, replace=True)
OmegaConf.register_new_resolver("lora_lightning.devices_of_job", devices_of_job, replace=True)
OmegaConf.register_new_resolver("lora_lightning.gpus_of_job", gpus_of_job, replace=True)
