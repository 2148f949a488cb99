"""LoRA fine-tuning for PyTorch Lightning: one callback, adapter-only checkpoints, PEFT's files.

Names are imported when they are first used, so that ``import lora_lightning`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "Adapters": "adapters",
    "LoraCallback": "callback",
    "LoraConfig": "config",
    "LoraConfigError": "errors",
    "LoraReport": "injection",
    "MergeReport": "adapters",
    "SaveOnSignal": "stopping",
    "causal_lm_loss": "tasks.loss",
    "initialise_from_data": "injection",
    "inject_lora": "injection",
    "load_adapter": "adapters",
    "load_base": "adapters",
    "load_from_checkpoint": "checkpoint",
    "lora_disabled": "injection",
    "lora_parameters": "injection",
    "lora_state_dict": "injection",
    "merge_lora": "adapters",
    "meta_parameters": "injection",
    "parameter_groups": "optim",
    "push_adapter": "adapters",
    "resize_adapter": "adapters",
    "save_adapter": "adapters",
    "unload_lora": "injection",
}
__all__ = [
    "AdapterError",
    "Adapters",
    "LoraCallback",
    "LoraConfig",
    "LoraConfigError",
    "LoraReport",
    "MergeReport",
    "SaveOnSignal",
    "causal_lm_loss",
    "initialise_from_data",
    "inject_lora",
    "load_adapter",
    "load_base",
    "load_from_checkpoint",
    "lora_disabled",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "meta_parameters",
    "parameter_groups",
    "push_adapter",
    "resize_adapter",
    "save_adapter",
    "unload_lora",
]

if TYPE_CHECKING:
    from lora_lightning.adapters import (
        Adapters,
        MergeReport,
        load_adapter,
        load_base,
        merge_lora,
        push_adapter,
        resize_adapter,
        save_adapter,
    )
    from lora_lightning.callback import LoraCallback
    from lora_lightning.checkpoint import load_from_checkpoint
    from lora_lightning.config import LoraConfig
    from lora_lightning.errors import AdapterError, LoraConfigError
    from lora_lightning.injection import (
        LoraReport,
        initialise_from_data,
        inject_lora,
        lora_disabled,
        lora_parameters,
        lora_state_dict,
        meta_parameters,
        unload_lora,
    )
    from lora_lightning.optim import parameter_groups
    from lora_lightning.stopping import SaveOnSignal
    from lora_lightning.tasks.loss import causal_lm_loss

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
