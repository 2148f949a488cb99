"""From a composed configuration to a plan, and onto the screen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_lightning.cli.build import partial_of
from lora_lightning.cli.overrides import GlobalHydraKept
from lora_lightning.cli.quiet import quieten
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.plan import Plan, Setting, comparison, plan_of
from lora_lightning.reports.plan.setting import ADAMW, TASKS, bytes_of
from lora_lightning.tasks import ModelConfig

_OPTIMIZERS = {"SGD": 4.0, "adamw_8bit": 2.0, "schedule_free": ADAMW, "riemannian_sgd": 4.0}
"""Bytes that an optimizer keeps for each number, where that is not what AdamW keeps."""
_ASSUMED_TOKENS = 512
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
    """
    given = list(HydraConfig.get().overrides.task)
    override = OverridesParser.create().parse_override(compared)
    made: dict[str, Plan] = {}
    for value in override.sweep_string_iterator():
        with GlobalHydraKept(), initialize_config_module("lora_lightning.conf", version_base="1.3"):
            one = compose("plan", overrides=[*given, f"{override.get_key_element()}={value}"])
        made[f"{override.key_or_group}={value}"] = _planned(one)
    if cfg.plan.json:
        print(json.dumps({name: each.to_dict() for name, each in made.items()}, indent=2))
    else:
        Console().print(comparison(made))


def setting_of(cfg: DictConfig) -> Setting:
    """What a training with these settings would be, as far as memory and time depend on it.

    Raises:
        LoraConfigError: With everything that is wrong, at once.
    """
    asked = cfg.get("plan") or {}  # the settings of train have none
    problems: list[str] = []
    found: dict[str, Any] = {}
    for reading in (_model, _lora, _task, _trainer, _data):
        with _collected(problems):
            found |= reading(cfg)
    with _collected(problems):
        found["memory"] = bytes_of(asked.get("memory"))
    if problems:
        raise LoraConfigError(
            problems[0] if len(problems) == 1 else _BULLET.join(["This cannot be planned:", *problems])
        )
    return Setting(**found, scored=asked.get("scored", 1.0), optimizer_bytes=_optimizer_bytes(cfg))


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
    packing = bool(cfg.data.get("packing", False))
    rows = cfg.data.get("batch_size", 1)
    tokens = cfg.data.get("max_length") or _ASSUMED_TOKENS
    return {"rows": rows, "tokens": tokens, "padded": not packing and rows > 1}


def _trainer(cfg: DictConfig) -> dict[str, Any]:
    trainer = _plain(cfg.trainer)
    strategy = _strategy(trainer["strategy"])
    device = _device(trainer["accelerator"])
    here = torch.cuda.device_count() if device == "cuda" else 1
    each = max(1, here) if trainer["devices"] in ("auto", -1, "-1") else _count(trainer["devices"])
    devices = each * trainer["num_nodes"]
    if strategy == "single" and devices > 1:
        strategy = "ddp"  # what Lightning takes then
    sized = trainer["strategy"].get("tensor_parallel_size", 1) if isinstance(trainer["strategy"], Mapping) else 1
    parts = each if sized == "auto" else int(sized)
    return {
        "strategy": "tp" if strategy == "fsdp2" and parts > 1 else strategy,
        "device": device,
        "devices": devices,
        "tensor_parallel": parts,
        "precision": str(trainer["precision"]),
        "accumulate": trainer["accumulate_grad_batches"],
    }


def _strategy(given: Any) -> str:
    """The name that a plan has for a strategy of the Trainer.

    >>> _strategy("auto"), _strategy("deepspeed_stage_3_offload"), _strategy({"_target_": "x.MeshStrategy"})
    ('single', 'deepspeed_3', 'fsdp2')
    """
    name = str(given.get("_target_", "") if isinstance(given, Mapping) else given).rpartition(".")[2].lower()
    known = {"auto": "single", "meshstrategy": "fsdp2", "modelparallelstrategy": "fsdp2", "deepspeed": "deepspeed_2"}
    known |= {f"deepspeed_stage_{n}": f"deepspeed_{n}" for n in (1, 2, 3)}
    name = name.removesuffix("_offload").removesuffix("strategy") if name not in known else name
    found = known.get(name, "ddp" if name.startswith("ddp") else name)
    if found not in ("single", "ddp", "fsdp", "fsdp2", *known.values()):
        raise LoraConfigError(f"trainer.strategy: there is no plan for {given!r}")
    return found


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


def _optimizer_bytes(cfg: DictConfig) -> float:
    if cfg.optimizer is None:
        return ADAMW
    return _OPTIMIZERS.get(str(cfg.optimizer._target_).rpartition(".")[2], ADAMW)
