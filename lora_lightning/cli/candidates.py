"""The keys of a configuration, and which of them somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.config_checks import ALIASES

# What other tools call a setting, and what it is called here.
_ALIASES = {name: f"lora.{field}" for name, field in ALIASES.items()} | {
    "lr": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "grad_accum": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "per_device_train_batch_size": "data.batch_size",
    "max_seq_length": "data.max_length",
    "model_name": "model.name",
    "output_dir": "hydra.run.dir",
    "resume": "ckpt_path",
}


class Candidates:
    """The keys of a composed configuration.

    Args:
        config: The configuration.
        groups: Names of its config groups, which can be keys too.
    """

    def __init__(self, config: DictConfig, groups: Sequence[str]) -> None:
        self._tree: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
        self._keys = [key for key in flatten(self._tree) if "._" not in key]
        self._groups = [group for group in groups if group not in self._tree]

    def __contains__(self, key: str) -> bool:
        """Whether the configuration has a key, ``_target_`` and the like included."""
        parent, _, last = key.rpartition(".")
        node = self._node(parent)
        return isinstance(node, dict) and last in node

    def nearest(self, key: str) -> str | None:
        """The key that was probably meant, or None where none is near."""
        parent, _, last = key.rpartition(".")
        known = _ALIASES.get(last)
        # lora.rank is rank of lora; trainer.rank would be somebody's own idea.
        if known is not None and parent in ("", known.rpartition(".")[0]):
            return known
        same = [each for each in self._keys if each.rpartition(".")[2] == last]
        if len(same) == 1:
            return same[0]
        if parent in self:
            homes = {name: home for name, home in _ALIASES.items() if home.rpartition(".")[0] == parent}
            homes |= {name: f"{parent}.{name}" if parent else name for name in self.children(parent)}
            near = difflib.get_close_matches(last, homes, n=1)
            return homes[near[0]] if near else None
        near = difflib.get_close_matches(key, [*self._keys, *self._groups], n=1, cutoff=0.7)
        return near[0] if near else None

    def parent_of(self, key: str) -> str:
        """The longest beginning of a key that exists; empty for the top."""
        parts = key.split(".")[:-1]
        while parts and ".".join(parts) not in self:
            parts.pop()
        return ".".join(parts)

    def children(self, parent: str) -> list[str]:
        """The keys right below one."""
        node = self._node(parent)
        return [str(key) for key in node if not str(key).startswith("_")] if isinstance(node, dict) else []

    def open_for(self, key: str) -> bool:
        """Whether a key may be added: below a table of free keys, or among the arguments of what is built from it."""
        node = self._node(key.rpartition(".")[0])
        return node == {} or (isinstance(node, dict) and "_target_" in node)

    def missing(self) -> list[str]:
        """The keys that have to be given a value."""
        return [key for key in flatten(self._tree) if self._node(key) == "???"]

    def _node(self, key: str) -> Any:
        """What a key holds, the whole tree for the empty key, or None."""
        node: Any = self._tree
        for part in filter(None, key.split(".")):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def flatten(value: Any, prefix: str = "") -> list[str]:
    """All keys of a nested dict, dotted, parents included.

    >>> flatten({"lora": {"r": 8}})
    ['lora', 'lora.r']
    """
    if not isinstance(value, dict):
        return []
    return [key for name, item in value.items() for key in (f"{prefix}{name}", *flatten(item, f"{prefix}{name}."))]
