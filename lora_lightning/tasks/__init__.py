"""What a LoRA run trains: LightningModules over any transformers model, and how such a model is loaded.

Nothing heavy is imported before one of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
