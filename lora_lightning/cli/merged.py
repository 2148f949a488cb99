"""The work of ``merge``: a base model is loaded, an adapter folded into it, and the whole written as one folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lora_lightning.adapters import MergeReport, adapter_folder, merge_lora
from lora_lightning.adapters.folder import check_folder
from lora_lightning.adapters.hub import copy_tokenizer
from lora_lightning.adapters.merge_report import largest_difference, outputs_of
from lora_lightning.adapters.written import new_folder
from lora_lightning.cli.adapted import adapt, base_of, make_room, tokenizer_in
from lora_lightning.errors import AdapterError
from lora_lightning.tasks.files import fetch_model
from lora_lightning.tasks.hub_errors import explained
from lora_lightning.tasks.model_config import ModelConfig
from lora_lightning.tasks.task_types import labels_in, of_task_type

_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def merge_into_folder(
    adapter: str,
    folder: Path,
    *,
    text: str,
    base: str | None = None,
    dtype: str = "auto",
    exact: bool = False,
    untie: bool = False,
    any_base: bool = False,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> MergeReport:
    """Write the model that an adapter and its base make together.

    Args:
        adapter: An adapter folder, or one on the Hub.
        folder: Where the model goes: whole, or not at all.
        text: What the outputs before and after are compared on.
        base: Name or folder of the base model; None takes the adapter's word.
        dtype: Of the weights: ``auto`` is the base's own, else the name of a torch dtype.
        exact: Make every sum in float64.
        untie: As `merge_lora` has it.
        any_base: Take a base whose fingerprint is not that of the one in training.
        max_shard_size: Of the files of weights.
        trust_remote_code: Allow code from the base model's repository to run.

    Returns:
        What merging has done; its difference is that of the written model from the adapted one.

    Raises:
        AdapterError: The folder is there already, the adapter does not fit or is damaged, or the base is another.
        LoraConfigError: The base model cannot be had.
    """
    if folder.exists():
        raise AdapterError(f"{folder} is there already, and a model is not written over anything: name another folder")
    place = adapter_folder(adapter)
    config = check_folder(place)
    settings = base_of(adapter, config, base, trust_remote_code=trust_remote_code)
    source = fetch_model(settings)
    model = _load(settings, source, config, labels_in(place), dtype)
    make_room(model, place, config, trust_remote_code)
    adapt(model, place, settings.name, any_base=any_base)
    batch = _batch(model, place, source, text, trust_remote_code)
    before = outputs_of(model, batch)
    report = merge_lora(model, safe=False, exact=exact, untie=untie)
    if dtype != "auto":
        _cast(model, getattr(torch, dtype))
    report = replace(report, difference=largest_difference(before, outputs_of(model, batch)))
    model.name_or_path = model.config.name_or_path = settings.name
    _write(model, folder, place, source, max_shard_size)
    return report


def _load(
    settings: ModelConfig, source: Path, adapter: Mapping[str, Any], labels: int | None, dtype: str
) -> PreTrainedModel:
    """The base model, in a type that holds its stored weights and the merged ones."""
    task = adapter.get("task_type") or "CAUSAL_LM"
    trusted: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    with explained(settings):
        own: PretrainedConfig = AutoConfig.from_pretrained(
            source, **trusted, **({} if labels is None else {"num_labels": labels})
        )
        if getattr(own, "quantization_config", None) is not None:
            raise AdapterError(
                f"{settings.name} is quantised, and weights that are merged into it would be rounded to a few bits: "
                "name the base of full precision with --base"
            )
        wanted: Any = "auto"
        if dtype != "auto":
            stored = getattr(own, "dtype", None) or torch.float32
            stored = getattr(torch, stored) if isinstance(stored, str) else stored
            wanted = torch.promote_types(stored, getattr(torch, dtype))
        loader = getattr(transformers, of_task_type(task).auto_class)
        return loader.from_pretrained(source, config=own, dtype=wanted, **trusted)


def _batch(model: PreTrainedModel, place: Path, source: Path, text: str, trust_remote_code: bool) -> dict[str, Tensor]:
    """The text as token numbers; the first numbers there are, where there is no tokenizer."""
    tokenizer = tokenizer_in(place, trust_remote_code) or tokenizer_in(source, trust_remote_code)
    if tokenizer is not None:
        batch = dict(tokenizer(text, return_tensors="pt"))
    else:
        batch = {"input_ids": torch.arange(16)[None] % model.config.get_text_config().vocab_size}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters alone: buffers that are computed (a rotary embedding's frequencies) stay what they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _write(model: PreTrainedModel, folder: Path, place: Path, source: Path, max_shard_size: str) -> None:
    """Write the folder whole, or not at all."""
    with new_folder(folder) as aside:
        model.save_pretrained(aside, max_shard_size=max_shard_size)
        if not (copy_tokenizer(place, aside) or copy_tokenizer(source, aside)):
            print(f"{folder} has no tokenizer: there is none beside the adapter or its base", file=sys.stderr)
        for name in _PROCESSORS:
            if (source / name).is_file():
                shutil.copy2(source / name, aside / name)
