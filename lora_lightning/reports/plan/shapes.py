"""Shapes of well-known models by name, for plans without a network: ``model.name=shape:llama-8b``."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lora_lightning.errors import LoraConfigError, did_you_mean

PREFIX = "shape:"


def _numbers(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "head_dim": hidden // heads,
        "max_position_embeddings": 32768,
        **more,
    }


# Numbers of the models' published config.json files.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("llama", _numbers(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)),
    "qwen3-0.6b": ("qwen3", _numbers(1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True)),
    "llama-1b": ("llama", _numbers(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True)),
    "llama-3b": ("llama", _numbers(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True)),
    "qwen3-8b": ("qwen3", _numbers(4096, 12288, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=False)),
    "llama-8b": ("llama", _numbers(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False)),
    "llama-70b": ("llama", _numbers(8192, 28672, 80, 64, 8, 128256, tie_word_embeddings=False)),
}


def is_shape(name: str) -> bool:
    """Whether a model's name asks for a shape alone."""
    return name.startswith(PREFIX)


def config_of(name: str) -> PretrainedConfig:
    """The config of a shape, in bfloat16 as such models are stored.

    Raises:
        LoraConfigError: There is no such shape.
    """
    short = name.removeprefix(PREFIX)
    if short not in SHAPES:
        raise LoraConfigError(
            f"There is no shape {short!r}{did_you_mean(short, SHAPES)}. There are {', '.join(SHAPES)}; for another "
            "give a folder with its config.json."
        )
    family, numbers = SHAPES[short]
    config = AutoConfig.for_model(family, **numbers)
    config.dtype = "bfloat16"
    return config
