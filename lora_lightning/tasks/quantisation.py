"""Base models whose linear layers are read into few bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks.dtype import likely_device
from lora_lightning.tasks.model_config import ModelConfig


def quantised(config: ModelConfig, own_config: PretrainedConfig, dtype: torch.dtype | str) -> dict[str, Any]:
    """What ``from_pretrained`` needs to be told so that it quantises what it reads.

    The output head stays as it is. Nothing else has to be prepared for training: norms compute in float32 by
    themselves, and activation checkpointing is not re-entrant, so that inputs need no gradient.

    Args:
        config: With ``quantisation``.
        own_config: The model's own.
        dtype: What products are computed in.

    Returns:
        Keyword arguments; none where ``quantisation`` is None.

    Raises:
        LoraConfigError: A package is missing, or the model's files are quantised already.
    """
    if config.quantisation is None:
        return {}
    if getattr(own_config, "quantization_config", None) is not None:
        raise LoraConfigError(
            f"The files of {config.name!r} are quantised already, and stay as they are: leave model.quantisation at "
            f"null, got {config.quantisation!r} (lora=qlora sets nf4)"
        )
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise LoraConfigError(
            f"model.quantisation={config.quantisation} needs {' and '.join(missing)}: "
            "pip install 'lora-lightning[quantised]'"
        )
    if config.quantisation == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantisation,
            bnb_4bit_use_double_quant=config.double_quantisation,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": settings, "device_map": {"": _device()}}


def _device() -> torch.device:
    """Where this process will train; bitsandbytes quantises on the device, from weights that come one by one."""
    device = likely_device()
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0))) if device.type == "cuda" else device
