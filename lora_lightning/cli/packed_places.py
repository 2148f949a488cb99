"""How many of the jobs of a group train at once, told before the first of them begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.sweeps.packed import memory
from lora_lightning.sweeps.packed.packable import precision_of
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.free_memory import free_memory


def places_for(configs: Sequence[DictConfig], network: nn.Module, data: LightningDataModule, shared_by: int = 1) -> int:
    """As many as fit into memory, by what a step of one of them takes.

    Args:
        configs: Of all jobs of the group.
        network: Their base, where and as they train it.
        data: Their rows, loaded.
        shared_by: How many processes share the memory; each takes its part.
    """
    config = configs[0]
    needs = memory.needs(
        shell_of(network),
        [LoraConfig.from_dict(_plain(each.lora)) for each in configs],
        memory.longest_row(data, config.data.get("max_length")),
        rows=config.data.batch_size,
        moments=max(memory.moments_of(None if each.optimizer is None else _plain(each.optimizer)) for each in configs),
        precision=precision_of(_plain(config.trainer)),
    )
    free = free_memory(next(network.parameters()).device) // shared_by
    places = memory.places(needs, free)
    print(memory.told(needs, places, free), flush=True)
    return places


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]  # a group is a dict
