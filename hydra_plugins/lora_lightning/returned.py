"""What a job's function has returned, left in its folder for the sweep that has started it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class ReturnedValue(Callback):
    """Writes ``result.json`` with the status, the overrides, the seconds and the value, where a job has not done so.

    A script of anybody's needs nothing of this package for that. What it has written into a ``result.json`` of its own
    stays as it is, and these keys come beside it.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note what an earlier attempt has left."""
        self._started = time.monotonic()
        self._before = _changed_at(_result(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write what is missing. The other processes of a job were started into the same folder and leave it alone."""
        # Here, since this module is imported by each Hydra app on the machine.
        from lora_lightning.cli.run_folder import is_first_process
        from lora_lightning.reports.whole import write_whole

        if not is_first_process():
            return
        path = _result(config)
        untouched = _changed_at(path) == self._before
        left = _read(path)
        if left is None and not untouched:
            return  # no mapping in JSON, and this job has written it so
        left = left or {}
        finished = job_return.status is JobStatus.COMPLETED
        ours: dict[str, Any] = {
            "status": "finished" if finished else "failed",
            "overrides": list(job_return.overrides or ()),
            "seconds": time.monotonic() - self._started,
            "value": _jsonable(job_return.return_value) if finished else None,
        }
        if finished and isinstance(metric := OmegaConf.select(config, "optimized_metric"), str):
            ours[metric] = ours["value"]  # by custom this setting names what is returned
        content = left | ours if untouched else ours | left
        if content != left:
            write_whole(path, json.dumps(content, indent=2) + "\n")


def _result(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.output_dir) / "result.json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _jsonable(value: Any) -> Any:
    """A value as JSON has it: a number that is not finite is null, what is no plain value its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a tensor or an array of one number
        return _jsonable(value.item())
    if isinstance(value, (list, tuple)):  # of a search with several aims
        return [_jsonable(each) for each in value]
    return value if isinstance(value, (int, str, type(None))) else repr(value)
