"""What a LoRA run trains: LightningModules over any transformers model, and how such a model is loaded.

Nothing heavy is imported before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.tasks.causal_lm import CausalLM
    from lora_lightning.tasks.demo import demo_names, prepare_demo
    from lora_lightning.tasks.model import load_model, load_tokenizer
    from lora_lightning.tasks.model_config import ModelConfig
    from lora_lightning.tasks.sequence_classification import SequenceClassification

_HOMES = {
    "CausalLM": "causal_lm",
    "ModelConfig": "model_config",
    "SequenceClassification": "sequence_classification",
    "demo_names": "demo",
    "load_model": "model",
    "load_tokenizer": "model",
    "prepare_demo": "demo",
}

__all__ = [
    "CausalLM",
    "ModelConfig",
    "SequenceClassification",
    "demo_names",
    "load_model",
    "load_tokenizer",
    "prepare_demo",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted(__all__)
