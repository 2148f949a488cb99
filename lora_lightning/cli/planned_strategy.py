"""A Trainer's strategy as a plan knows it, and what of its settings the plan does not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch.strategies import StrategyRegistry

from lora_lightning.errors import LoraConfigError

_KNOWN = {"SingleDevice": "single", "DDP": "ddp", "FSDP": "fsdp", "Mesh": "fsdp2", "ModelParallel": "fsdp2"}
_UNCOUNTED = {
    "cpu_offload": "the spread weights lie in main memory: a device takes less",
    "activation_checkpointing_policy": "activations take less; model.gradient_checkpointing=true is counted",
    "activation_checkpointing": "activations take less; model.gradient_checkpointing=true is counted",
    "sharding_strategy": "what is gathered or whole takes more; FULL_SHARD over all devices is counted",
    "offload_optimizer": "the optimizer's states lie in main memory: a device takes less",
    "offload_parameters": "the spread weights lie in main memory: a device takes less",
    "partition_activations": "activations take less",
    "cpu_checkpointing": "activations take less",
    "config": "what it sets holds in place of the other settings",
}
"""Settings that change what a device takes, and how; a plan counts them as if they were not set."""
_AS_COUNTED = (None, False, "FULL_SHARD")


class Spread(NamedTuple):
    """How a training is spread over devices.

    Attributes:
        strategy: One of the plan's names; a sharded base with layers divided is ``fsdp2`` here.
        tensor_parallel: Devices that share the work of each layer; ``auto``: all of a node.
        notes: What is not counted.
    """

    strategy: str
    tensor_parallel: int | str
    notes: tuple[str, ...]


def spread_of(given: Any) -> Spread:
    """What a plan makes of ``trainer.strategy``.

    Args:
        given: A name of Lightning's, or a node with ``_target_`` as plain values.

    Raises:
        LoraConfigError: There is no plan for it.

    >>> spread_of("auto").strategy, spread_of("deepspeed_stage_3").strategy, spread_of({"_target_": "x.MeshStrategy"})
    ('single', 'deepspeed_3', Spread(strategy='fsdp2', tensor_parallel=1, notes=()))
    """
    name, settings = _named(given)
    kind = name.removesuffix("Strategy")
    strategy = _deepspeed(settings) if kind == "DeepSpeed" else _KNOWN.get(kind)
    if settings.get("sharding_strategy") == "NO_SHARD":
        strategy, settings = "ddp", settings | {"sharding_strategy": None}
    if strategy is None:
        raise LoraConfigError(f"trainer.strategy: there is no plan for {given!r}")
    notes = [
        f"trainer.strategy.{key}={value} is not counted: {_UNCOUNTED[key]}"
        for key, value in settings.items()
        if key in _UNCOUNTED and value not in _AS_COUNTED
    ]
    whole_node = kind == "ModelParallel"  # Lightning's own; this project's takes one
    return Spread(strategy, settings.get("tensor_parallel_size", "auto" if whole_node else 1), tuple(notes))


def _named(given: Any) -> tuple[str, dict[str, Any]]:
    """The class's name and its settings, those that a name of Lightning's stands for too."""
    if isinstance(given, Mapping):
        return str(given.get("_target_", "")).rpartition(".")[2], dict(given)
    if given == "auto":
        return "SingleDevice", {}
    if given not in StrategyRegistry:
        return str(given), {}
    known = StrategyRegistry[given]
    return known["strategy"].__name__, dict(known["init_params"])


def _deepspeed(settings: Mapping[str, Any]) -> str:
    stage = settings.get("stage", 2)
    return f"deepspeed_{stage}" if stage else "ddp"
