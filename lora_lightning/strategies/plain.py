"""Saving and loading where every process holds every parameter whole: one device, DDP."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lora_lightning.adapters.checkpoint import CHECKPOINT_KEY, entries_of, read_checkpoint
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError
from lora_lightning.injection.state import load_lora_state, lora_state_dict
from lora_lightning.strategies import rng
from lora_lightning.strategies.primitives import keep_primitives

FORMAT = 1


class PlainState:
    """What a checkpoint holds under a strategy, put between the trainer and its strategy.

    The strategy is the one place that every save passes, ``save_weights_only=True`` and asynchronous ones too, and the
    first to see a checkpoint on its way back. Subclasses change :meth:`model_state` and :meth:`load_model_state`.

    Args:
        strategy: The trainer's strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.entries: Callable[[], dict[str, dict[str, Any]]] = dict
        self.rng: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._save = strategy.save_checkpoint
        self._load = strategy.load_checkpoint

    def attach(self, entries: Callable[[], dict[str, dict[str, Any]]]) -> None:
        """Let the strategy save and load through this object.

        Args:
            entries: Gives, at each save, what the checkpoint is to say of each adapter.
        """
        self.entries = entries
        vars(self.strategy).update(
            lightning_module_state_dict=self.model_state,
            load_model_state_dict=self.load_model_state,
            save_checkpoint=self.save,
            load_checkpoint=self.load,
        )

    def model_state(self) -> dict[str, Tensor]:
        """All that is not the frozen base, by canonical name; references, not copies."""
        return lora_state_dict(self._module)

    def load_model_state(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a checkpoint's adapter into the module, whatever ``strict`` says: each name must fit.

        Raises:
            AdapterError: If the checkpoint has no adapter, or another one.
        """
        entries = entries_of(checkpoint, "the checkpoint")
        self._compare(entries)
        load_lora_state(self._module, checkpoint["state_dict"], "the checkpoint")
        self.rng = rng.of_this_rank(checkpoint[CHECKPOINT_KEY].get("rng"))

    def load(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without running code from it, unless ``weights_only=False`` is asked for outright."""
        if weights_only is not False and os.path.isfile(checkpoint_path):
            return read_checkpoint(checkpoint_path)
        return self._load(checkpoint_path, **({} if weights_only is None else {"weights_only": weights_only}))

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint with what it says of its adapters, every rank's random state, and primitives only."""
        checkpoint[CHECKPOINT_KEY] = {"format": FORMAT, "adapters": self.entries(), "rng": rng.gather()}
        if dropped := [name for name in keep_primitives(checkpoint) if name not in self._told]:
            self._told.update(dropped)
            rank_zero_info(f"not in the checkpoint's hyper_parameters, being no plain values: {', '.join(dropped)}")
        self._save(checkpoint, filepath, storage_options=storage_options)

    @property
    def _module(self) -> nn.Module:
        module = self.strategy.lightning_module
        if module is None:
            raise AdapterError("no LightningModule is connected to the trainer's strategy")
        return module

    def _compare(self, entries: Mapping[str, dict[str, Any]]) -> None:
        problems = []
        for name, mine in self.entries().items():
            if name not in entries:
                problems.append(f"it holds no adapter {name!r}, only {', '.join(entries)}")
                continue
            there = entries[name]
            problems += LoraConfig.from_dict(mine["lora_config"]).difference(LoraConfig.from_dict(there["lora_config"]))
            folded, wanted = mine["record"].get("bases", []), there["record"].get("bases", [])
            if folded != wanted:
                problems.append(f"adapters folded into the base: {folded or 'none'} here, {wanted or 'none'} there")
            told = there["record"].get("base_fingerprint")
            if told and told != mine["record"].get("base_fingerprint", told):
                warnings.warn("the checkpoint's adapter was trained on another base model than this", stacklevel=2)
        if problems:
            raise AdapterError(
                "the checkpoint was made with another LoRA config (here: this run's, there: the checkpoint's):"
                + "".join(f"\n  - {line}" for line in problems)
            )
