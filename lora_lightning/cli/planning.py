"""From a composed configuration to a plan, and onto the screen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lora_lightning.cli.build import partial_of
from lora_lightning.cli.planned_strategy import spread_of
from lora_lightning.cli.quiet import quieten
from lora_lightning.cli.told import CommandError
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.plan import Plan, Setting, comparison, plan_of
from lora_lightning.reports.plan.setting import ADAMW, TASKS, bytes_of
from lora_lightning.tasks import ModelConfig

_OPTIMIZERS = {"SGD": 4.0, "adamw_8bit": 2.0, "schedule_free": ADAMW, "riemannian_sgd": 4.0}
"""Bytes that an optimizer keeps for each number, where that is not what AdamW keeps."""
_PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names."""
_ASSUMED = {"batch_size": 1, "max_length": 512}
"""Where the data do not say."""
_BULLET = "\n  - "


def show(cfg: DictConfig) -> None:
    """Print the plan of a configuration."""
    made = _planned(cfg)
    print(json.dumps(made.to_dict(), indent=2)) if cfg.plan.json else Console().print(made)


def show_side_by_side(cfg: DictConfig, compared: str) -> None:
    """Print plans for several values of one setting.

    Args:
        cfg: The configuration without it.
        compared: The setting, as in ``lora=conservative,balanced``.

    Raises:
        CommandError: One of them cannot be planned.
    """
    (override,) = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([compared])
    own = HydraConfig.get()
    given = [each for each in own.overrides.task if each.lstrip("+").partition("=")[0] != override.key_or_group]
    made: dict[str, Plan] = {}
    for value in override.sweep_string_iterator():
        name = f"{override.key_or_group}={value}"
        try:
            # By the Hydra that has read the command line, which looks where that says: in --config-dir too.
            one = compose(own.job.config_name, overrides=[*given, f"{override.get_key_element()}={value}"])
            made[name] = _planned(one)
        except (LoraConfigError, HydraException, OmegaConfBaseException) as error:
            raise CommandError(f"{name}: {error}") from error
    if cfg.plan.json:
        print(json.dumps({name: each.to_dict() for name, each in made.items()}, indent=2))
    else:
        Console().print(comparison(made))


def setting_of(cfg: DictConfig) -> Setting:
    """What a training with these settings would be, as far as memory and time depend on it.

    Raises:
        LoraConfigError: With everything that is wrong, at once.
    """
    problems: list[str] = []
    found: dict[str, Any] = {}
    notes: list[str] = []
    for reading in (_model, _lora, _task, _optimizer, _trainer, _data, _asked):
        with _collected(problems):
            read = reading(cfg)
            notes += read.pop("notes", ())
            found |= read
    if problems:
        raise LoraConfigError(
            problems[0] if len(problems) == 1 else _BULLET.join(["This cannot be planned:", *problems])
        )
    if found["memory"] is not None and found["device"] == "cpu":
        notes.append("plan.memory is a CPU's main memory here; for a GPU add trainer.accelerator=gpu")
    return Setting(**found, notes=tuple(notes))


def _planned(cfg: DictConfig) -> Plan:
    quieten(bars=False)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    return plan_of(setting_of(cfg), calibration=cfg.plan.calibration)


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except LoraConfigError as error:
        problems.append(str(error))


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _model(cfg: DictConfig) -> dict[str, Any]:
    return {"model": ModelConfig.of(_plain(cfg.model))}


def _lora(cfg: DictConfig) -> dict[str, Any]:
    return {"lora": LoraConfig.from_dict(_plain(cfg.lora))}


def _task(cfg: DictConfig) -> dict[str, Any]:
    """The kind of task, and of how many classes: what its class says, and the class of the data."""
    kind = getattr(partial_of(cfg.task).func, "lora_task_type", None)
    names = {value: name for name, value in TASKS.items()}
    if kind not in names:
        raise LoraConfigError(
            f"task: a plan is made for {' and '.join(names)}, and {cfg.task._target_} trains {kind!r}"
        )
    labels = getattr(partial_of(cfg.data).func, "num_labels", None)
    return {"task": names[kind]} | ({"num_labels": labels} if isinstance(labels, int) else {})


def _data(cfg: DictConfig) -> dict[str, Any]:
    given = {key: cfg.data.get(key) for key in _ASSUMED}
    notes = [f"data has no {key}: {_ASSUMED[key]} is planned" for key, value in given.items() if value is None]
    rows, tokens = (_ASSUMED[key] if value is None else value for key, value in given.items())
    return {"rows": rows, "tokens": tokens, "padded": not cfg.data.get("packing", False) and rows > 1, "notes": notes}


def _trainer(cfg: DictConfig) -> dict[str, Any]:
    trainer = _plain(cfg.trainer)
    spread = spread_of(trainer["strategy"])
    device = _device(trainer["accelerator"])
    here = torch.cuda.device_count() if device == "cuda" else 1
    each = max(1, here) if trainer["devices"] in ("auto", -1, "-1") else _count(trainer["devices"])
    devices = each * trainer["num_nodes"]
    strategy = spread.strategy
    if strategy == "single" and devices > 1:
        strategy = "ddp"  # what Lightning takes then
    parts = each if spread.tensor_parallel == "auto" else int(spread.tensor_parallel)
    return {
        "strategy": "tp" if strategy == "fsdp2" and parts > 1 else strategy,
        "device": device,
        "devices": devices,
        "nodes": trainer["num_nodes"],
        "tensor_parallel": parts,
        "precision": _PRECISIONS.get(str(trainer["precision"]), str(trainer["precision"])),
        "accumulate": trainer["accumulate_grad_batches"],
        "notes": spread.notes,
    }


def _asked(cfg: DictConfig) -> dict[str, Any]:
    asked = cfg.get("plan") or {}  # the settings of train have none
    return {"memory": bytes_of(asked.get("memory")), "scored": asked.get("scored", 1.0)}


def _device(accelerator: str) -> str:
    if accelerator in ("auto", "cuda", "gpu"):
        return "cuda" if accelerator != "auto" or torch.cuda.is_available() else "cpu"
    if accelerator == "cpu":
        return "cpu"
    raise LoraConfigError(f"trainer.accelerator: a plan is made for cpu and gpu, got {accelerator!r}")


def _count(devices: Any) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str):
        return int(devices) if devices.isdigit() else len(devices.strip("[]").split(","))
    return int(devices)


def _optimizer(cfg: DictConfig) -> dict[str, Any]:
    name = "" if cfg.optimizer is None else str(cfg.optimizer._target_).rpartition(".")[2]
    return {"optimizer_bytes": _OPTIMIZERS.get(name, ADAMW), "frozen_a": name == "lora_fa"}
