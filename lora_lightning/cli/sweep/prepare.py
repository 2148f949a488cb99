"""What the jobs of a sweep need from elsewhere, had once before the first of them starts.

All of it is made ready by one process of its own, which loads torch and ends, so that the sweep's stays light. Jobs
then find model, data set and tokenised rows, however many of them start at once. Run as a module it is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.cli.sweep.command import clean_environment
from lora_lightning.cli.sweep.compose import hydra_config, is_ours
from lora_lightning.errors import AdapterError, LoraConfigError

# Settings that change neither which files a model has nor what its rows are.
_OF_LOADING = {"dtype", "attn_implementation", "gradient_checkpointing", "compile", "in_parts"}
_OF_BATCHES = {"batch_size", "val_batch_size", "group_by_length", "pad_to_multiple_of", "num_workers", "packing"}
_done: set[str] = set()


def prepare_all(configs: Iterable[DictConfig]) -> None:
    """Have everything on this machine that jobs need: each model and each data set once.

    Nothing is done for one job alone, which does it by itself, nor for what an earlier batch of this process needed,
    nor for scripts that are not this package's own.

    Args:
        configs: The configurations of the jobs that are to run, with that of Hydra.

    Raises:
        LoraConfigError: Something cannot be had; with all that is wrong.
    """
    configs = list(configs)
    wanted = {key: settings for settings in distinct(configs) if (key := _key(settings)) not in _done}
    if not wanted or len(configs) < 2:
        return
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "settings.json", Path(folder) / "problems.json"
        asked.write_text(json.dumps(list(wanted.values())), encoding="utf-8")
        command = [sys.executable, "-m", "lora_lightning.cli.sweep.prepare", str(asked), str(answered)]
        environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False)
        problems = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else None
    if problems is None:
        raise LoraConfigError(
            f"Preparing what the jobs need ended with status {done.returncode}; what it said is above. "
            "No job was started"
        )
    if problems:
        raise LoraConfigError("What the jobs need cannot be had, and none was started:\n" + "\n".join(problems))
    _done.update(wanted)


def distinct(configs: Sequence[DictConfig]) -> list[dict[str, Any]]:
    """The ``model`` and ``data`` of configurations as plain values, those that come to the same files once."""
    found: dict[str, dict[str, Any]] = {}
    for config in filter(is_ours, configs):
        with hydra_config(config):
            settings = {part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "data")}
        found.setdefault(_key(settings), settings)
    return list(found.values())


def _key(settings: dict[str, Any]) -> str:
    left_out = {"model": _OF_LOADING, "data": _OF_BATCHES}
    kept = {part: {key: each for key, each in settings[part].items() if key not in left_out[part]} for part in left_out}
    return json.dumps(kept, sort_keys=True)


def _main(asked: str, answered: str) -> None:
    """Prepare what a file asks for, and leave what was wrong with it in another."""
    from lora_lightning.cli.prepare import prepare
    from lora_lightning.cli.quiet import quieten

    quieten()
    told: dict[str, None] = {}
    problems: dict[str, None] = {}
    for settings in json.loads(Path(asked).read_text(encoding="utf-8")):
        try:
            told |= dict.fromkeys(map(str, prepare(OmegaConf.create(settings))))
        except (LoraConfigError, AdapterError) as error:
            problems[f"  - {error}"] = None
    print("\n".join(told), flush=True)
    Path(answered).write_text(json.dumps(list(problems)), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
