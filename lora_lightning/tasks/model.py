"""Loading a base model and its tokenizer, from the Hub, a folder or a demo package."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_lightning.adapters import load_base
from lora_lightning.config import TASK_HEADS
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import meta_parameters
from lora_lightning.tasks.compiling import compile_blocks
from lora_lightning.tasks.demo import is_demo, prepare_demo
from lora_lightning.tasks.dtype import likely_device, pick_dtype
from lora_lightning.tasks.hub_errors import check_local_folder, explained
from lora_lightning.tasks.model_config import ModelConfig
from lora_lightning.tasks.quantisation import quantised

ModelKind = Literal["causal_lm", "sequence_classification"]
AUTO_CLASSES = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with its chat template overridden if asked for, and a padding token.

    Args:
        config: Which model, and how.

    Returns:
        The tokenizer, which has a padding token.

    Raises:
        LoraConfigError: The model, its tokenizer or the file of the chat template cannot be had.
    """
    with explained(config):
        tokenizer = AutoTokenizer.from_pretrained(**source_of(config))
    if config.chat_template is not None:
        tokenizer.chat_template = _template_text(config.chat_template)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LoraConfigError(f"The tokenizer of {config.name!r} has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, kind: ModelKind, **settings: Any) -> PreTrainedModel:
    """Load a base model, with the switches of the config set.

    Args:
        config: Which model, and how.
        kind: The head it gets.
        **settings: Values for the model's own config, such as ``num_labels``.

    Returns:
        The model in train mode: in eval mode, in which transformers hands models out, gradient checkpointing is
        silently off, and Lightning keeps the mode it finds. With ``in_parts`` it has no weights yet; see `fill_model`.

    Raises:
        LoraConfigError: The model cannot be had, or does not know a switch that was set.
    """
    source = source_of(config)
    with explained(config):
        own_config = AutoConfig.from_pretrained(**source, **settings)
        choices: dict[str, Any] = {"dtype": _dtype(config, own_config)}
        if config.attn_implementation is not None:
            choices["attn_implementation"] = config.attn_implementation
        if config.in_parts:
            model = _without_memory(kind, own_config, choices, source)
        else:
            choices |= quantised(config, own_config, choices["dtype"])
            model = AUTO_CLASSES[kind].from_pretrained(**source, config=own_config, **choices)
        if config.gradient_checkpointing:
            # Re-entrant checkpointing gives adapters behind frozen embeddings no gradient.
            new_name, old_name = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(model, new_name if hasattr(model, new_name) else old_name)({"use_reentrant": False})
    if is_demo(config.name):
        # The cache folder is this machine's own affair; the name is what another machine can use.
        model.name_or_path = model.config.name_or_path = config.name
    if config.compile:
        compile_blocks(model)
    return model.train()


def fill_model(model: PreTrainedModel, config: ModelConfig, seed: int | None = None) -> None:
    """Read the weights of a model that was made with ``in_parts``, each process its part of them.

    A classifier's head that the files do not have is drawn from the seed.

    Raises:
        AdapterError: The files do not fit the model.
        LoraConfigError: They cannot be had.
    """
    source = source_of(config)
    place = source["pretrained_model_name_or_path"]
    with explained(config):
        if not Path(place).is_dir():
            wanted = ["*.safetensors", "*.safetensors.index.json"]
            place = snapshot_download(place, revision=config.revision, allow_patterns=wanted)
    load_base(model, place, fresh=TASK_HEADS["SEQ_CLS"], unused=("lm_head",), seed=seed)


def _without_memory(
    kind: ModelKind, own_config: PretrainedConfig, choices: dict[str, Any], source: dict[str, Any]
) -> PreTrainedModel:
    if getattr(own_config, "quantization_config", None) is not None:
        raise LoraConfigError(
            "in_parts: true reads plain weights only, and this model's are quantised: set it to false"
        )
    with meta_parameters():
        model = AUTO_CLASSES[kind].from_config(own_config, trust_remote_code=source["trust_remote_code"], **choices)
    if model.can_generate():
        with contextlib.suppress(OSError):  # a model need not have one
            place = source["pretrained_model_name_or_path"]
            model.generation_config = GenerationConfig.from_pretrained(place, revision=source.get("revision", "main"))
    return model


def source_of(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments that tell transformers where a model lies."""
    if is_demo(config.name):
        place = str(prepare_demo(config.name))
    else:
        check_local_folder(config)
        folder = Path(config.name).expanduser()
        place = str(folder) if folder.is_dir() else config.name
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": place,
        "trust_remote_code": config.trust_remote_code,
    }
    return source if config.revision is None else source | {"revision": config.revision}


def _dtype(config: ModelConfig, own_config: PretrainedConfig) -> torch.dtype | str:
    if config.dtype == "auto" and getattr(own_config, "quantization_config", None) is not None:
        return "auto"
    stored = getattr(own_config, "dtype", None) or getattr(own_config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    dtype, reason = pick_dtype(config.dtype, stored, likely_device())
    if reason:
        tell = rank_zero_info if config.dtype == "auto" else rank_zero_warn
        tell(f"{config.name}: {reason}.")
    return dtype


def _template_text(template: str) -> str:
    if "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraConfigError(
            f"chat_template must be Jinja text or the path of a UTF-8 file that holds it, got {template!r} ({error})"
        ) from error
