"""The settings of a sweep as a launcher gets them, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf

from lora_lightning.errors import LoraConfigError, did_you_mean


@dataclass(frozen=True)
class Options:
    """The settings of a sweep; ``presets/hydra/launcher`` says what they mean."""

    dry_run: bool = False
    fail_fast: bool = False
    devices_per_job: int | None = None
    jobs_per_device: int = 1
    metric: str | None = None
    mode: str = "min"
    jobs_at_once: int | None = None
    halving: Any = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Check what was given, and take it.

        Raises:
            LoraConfigError: With all that is wrong with it.
        """
        known = [field.name for field in fields(cls)]
        problems = [f"there is no {key!r}{did_you_mean(key, known)}" for key in given if key not in known]
        plain: dict[str, Any] = {
            key: OmegaConf.to_container(each) if OmegaConf.is_config(each) else each for key, each in given.items()
        }
        for key in ("dry_run", "fail_fast"):
            if not isinstance(plain.get(key, False), bool):
                problems.append(f"{key} must be true or false, got {plain[key]!r}")
        for key in ("devices_per_job", "jobs_per_device", "jobs_at_once"):
            null = "" if key == "jobs_per_device" else " or null"
            if not _counts(plain.get(key, 1)) and not (null and plain[key] is None):
                problems.append(f"{key} must be a whole number from 1 on{null}, got {plain[key]!r}")
        if plain.get("mode", "min") not in ("min", "max"):
            problems.append(f"mode must be min or max, got {plain['mode']!r}")
        if problems:
            raise LoraConfigError("The settings of the sweep:" + "".join(f"\n  - {each}" for each in problems))
        return cls(**plain)


def refuse_of_packed(halving: Any, jobs_at_once: Any) -> None:
    """Refuse what only jobs that share a process can have: those of ``lora_local`` cannot wait for each other.

    Raises:
        LoraConfigError: It is asked for.
    """
    if jobs_at_once is not None:
        raise LoraConfigError(
            f"sweep.jobs_at_once={jobs_at_once} is about jobs that train together: add hydra/launcher=lora_packed. "
            "With this launcher sweep.jobs_per_device says how many share a GPU, or the CPU"
        )
    if halving:
        raise LoraConfigError(
            f"sweep.halving={halving} compares jobs that are trained side by side: add hydra/launcher=lora_packed. "
            "With this launcher hparams_search=optuna stops hopeless trials early"
        )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
