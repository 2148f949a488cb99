"""A saved adapter over its base model: which that is, room for added tokens, what lies folded in below."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lora_lightning.adapters import load_adapter, read_record
from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.merge import fold_in
from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.errors import AdapterError
from lora_lightning.injection.state import the_root
from lora_lightning.tasks.model_config import ModelConfig


def base_of(
    adapter: str, config: Mapping[str, Any], base: str | None = None, *, trust_remote_code: bool = False
) -> ModelConfig:
    """The model that an adapter goes over.

    Args:
        adapter: What the adapter is called in messages.
        config: Its ``adapter_config.json``.
        base: Name or folder of another one than its config names.
        trust_remote_code: Allow code from the base model's repository to run.

    Raises:
        AdapterError: Neither names one.
    """
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{adapter} does not say what it was trained on: name the base model with --base")
    return ModelConfig(name, None if base else config.get("revision"), trust_remote_code=trust_remote_code)


def make_room(model: PreTrainedModel, place: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Give the base rows for the tokens that training added to it, which the adapter and its tokenizer tell of."""
    embedding: Any = model.get_input_embeddings()
    if (rows := _rows_in(place, model, embedding)) is None:  # where it is padded, more than there are tokens
        named = config.get("trainable_token_indices") or []
        named = [token for tokens in named.values() for token in tokens] if isinstance(named, dict) else named
        tokenizer = tokenizer_in(place, trust_remote_code)
        rows = max([0 if tokenizer is None else len(tokenizer), *(token + 1 for token in named)])
    if rows > embedding.weight.shape[0]:
        model.resize_token_embeddings(rows)


def _rows_in(place: Path, model: PreTrainedModel, embedding: nn.Module) -> int | None:
    """How many rows a file has for the embedding, where that was trained in full."""
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(place / WEIGHTS_FILE, "pt") as file:
        key = f"{PREFIX}{name}.weight"
        return file.get_slice(key).get_shape()[0] if key in file.keys() else None  # noqa: SIM118  # not a dict


def tokenizer_in(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a folder, None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def adapt(model: PreTrainedModel, place: Path, base: str, *, any_base: bool) -> None:
    """Load the adapter, those that were folded in below it first, and look whether this is the base of its training."""
    for earlier in read_record(place).get("bases", ()):
        fold_in(model, earlier)
    with quiet_about_the_base():
        load_adapter(model, place)
    if not any_base:
        check_base(model, place, base)


@contextlib.contextmanager
def quiet_about_the_base() -> Iterator[None]:
    """Leave out the warning that this is another base, where `check_base` makes an error of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the base model is not the one")
        yield


def check_base(model: PreTrainedModel, place: Path, base: str) -> None:
    """Refuse a base, here under the adapter of ``place``, that is not the one that adapter was trained on.

    Raises:
        AdapterError: It is another; what to do is told.
    """
    root, told = the_root(model)[1], read_record(place).get("base_fingerprint")
    # Training may have loaded the same weights in half precision.
    own = [fingerprint(root, rounded_to) for rounded_to in (None, torch.bfloat16, torch.float16)]
    if told is not None and told not in own:
        raise AdapterError(
            f"{base} is not the model that {place} was trained on (its fingerprint is {own[0]}, that of the training "
            f"{told}): name the right one with --base, or say --any-base to take it all the same, as an adapter that "
            "was trained over the same base in few bits (QLoRA) goes over that of full precision"
        )
