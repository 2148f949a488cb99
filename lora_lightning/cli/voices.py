"""Who answers in `generate`: one model in memory, which is its base and each of its adapters by turns."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lightning.adapters import Adapters, adapter_folder, read_record
from lora_lightning.adapters.folder import check_folder
from lora_lightning.cli.adapted import adapt, base_of, check_base, make_room, quiet_about_the_base, tokenizer_in
from lora_lightning.cli.which_adapter import Which
from lora_lightning.data.chat import install_template
from lora_lightning.errors import AdapterError
from lora_lightning.injection import lora_disabled
from lora_lightning.tasks.dtype import likely_device
from lora_lightning.tasks.model import load_model, load_tokenizer
from lora_lightning.tasks.model_config import ModelConfig

BASE = "base"


class Reading(NamedTuple):
    """What stands before a model's eyes when it is asked: the way of its training.

    Attributes:
        tokenizer: With the chat template.
        system: The system message that the run put before its rows, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None


Answering = Callable[[], AbstractContextManager[Any]]
"""The context in which a model is one of those who answer."""


class Voice(NamedTuple):
    """One that answers: what it is called, the context in which the model is it, and how it is asked."""

    name: str
    answering: Answering
    reading: Reading


@dataclass(frozen=True)
class Voices:
    """A model and those it answers for, the base first."""

    model: PreTrainedModel
    voices: list[Voice]


def load_voices(
    places: Sequence[Which], *, base: str | None = None, any_base: bool = False, trust_remote_code: bool = False
) -> Voices:
    """Load a base model and the adapters over it.

    Args:
        places: The adapters, and the runs that they are from.
        base: Name or folder of the base model; None takes the run's, with the run's settings, or the adapter's word.
        any_base: Take a base whose fingerprint is not that of the one in training.
        trust_remote_code: Allow code from the base model's repository to run.

    Raises:
        AdapterError: An adapter does not fit, writes no text, or cannot be compared with the others.
        LoraConfigError: The base model cannot be had.
    """
    folders = [adapter_folder(place.adapter) for place in places]
    configs = [check_folder(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        _check_task(folder, config)
    runs = [_config_of(place.run) for place in places]
    settings = _model_of(runs[0], base) or base_of(str(folders[0]), configs[0], base)
    settings = replace(settings, trust_remote_code=settings.trust_remote_code or trust_remote_code)
    readings = [_reading(folder, run, settings) for folder, run in zip(folders, runs, strict=True)]
    model = load_model(settings, "causal_lm")
    for folder, config in zip(folders, configs, strict=True):
        make_room(model, folder, config, settings.trust_remote_code)
    if len(folders) == 1:
        adapt(model, folders[0], settings.name, any_base=any_base)
        voices = [
            Voice(BASE, functools.partial(lora_disabled, model), readings[0]),
            Voice("adapter", contextlib.nullcontext, readings[0]),
        ]
    else:
        answering = _compared(model, _labels(places), folders, configs, settings.name, any_base=any_base)
        voices = [Voice(*each, reading) for each, reading in zip(answering, [readings[0], *readings], strict=True)]
    if settings.quantisation is None:  # bitsandbytes has put it in its place
        model.to(likely_device())  # type: ignore[arg-type]  # transformers' signature says less than it takes
    return Voices(model.eval(), voices)


def _check_task(folder: Path, config: dict[str, Any]) -> None:
    task = config.get("task_type") or "CAUSAL_LM"
    if task == "SEQ_CLS":
        raise AdapterError(
            f"{folder} is the adapter of a classifier (task_type SEQ_CLS), which writes no text. To measure it: "
            "lora-lightning eval adapter=<the run's folder>"
        )
    if task != "CAUSAL_LM":
        raise AdapterError(f"{folder} is an adapter for {task}; generate talks to causal language models (CAUSAL_LM)")


def _config_of(run: Path | None) -> dict[str, Any]:
    """The settings that a run was made with, as far as they are there."""
    if run is None or not (run / "config.yaml").is_file():
        return {}
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    return config if isinstance(config, dict) else {}


def _model_of(run: dict[str, Any], base: str | None) -> ModelConfig | None:
    """The run's own base, loaded as in training but for what only training is the better for."""
    if base is not None or not run.get("model"):
        return None
    return replace(ModelConfig.of(run["model"]), gradient_checkpointing=False, compile=False, in_parts=False)


def _reading(folder: Path, run: dict[str, Any], settings: ModelConfig) -> Reading:
    """How the adapter in a folder was asked in its training; without a tokenizer there, as its base is."""
    tokenizer = tokenizer_in(folder, settings.trust_remote_code) or load_tokenizer(settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    install_template(tokenizer)
    return Reading(tokenizer, (run.get("data") or {}).get("system_prompt"))


def _compared(
    model: PreTrainedModel,
    labels: Sequence[str],
    folders: Sequence[Path],
    configs: Sequence[dict[str, Any]],
    base: str,
    *,
    any_base: bool,
) -> list[tuple[str, Answering]]:
    """Several adapters beside one model, each put into it while it answers."""
    names = [config.get("base_model_name_or_path") for config in configs]
    if len({name and os.path.normpath(name) for name in names}) > 1 and not any_base:
        told = "".join(f"\n  - {folder}: {name}" for folder, name in zip(folders, names, strict=True))
        raise AdapterError(f"adapters are compared over one base, and these name several:{told}")
    adapters = Adapters(model)
    answering: list[tuple[str, Answering]] = [(BASE, functools.partial(_put_in, adapters))]
    for name, folder in zip(labels, folders, strict=True):
        if read_record(folder).get("bases"):
            raise AdapterError(f"{folder} was trained over a base with another adapter folded in: give it alone")
        with quiet_about_the_base():
            adapters.load(name, folder)
        if not any_base:
            with _put_in(adapters, name):
                check_base(model, folder, base)
        answering.append((name, functools.partial(_put_in, adapters, name)))
    return answering


@contextlib.contextmanager
def _put_in(adapters: Adapters, *names: str) -> Iterator[None]:
    adapters.set(*names)
    yield


def _labels(places: Sequence[Which]) -> list[str]:
    """Short names that tell adapters from each other: of their runs, or of their folders, as far as these differ."""
    runs = [place.run for place in places]
    named = [place.run if place.run and runs.count(place.run) == 1 else place.adapter for place in places]
    paths = [Path(each).absolute() for each in named]
    labels = [BASE]
    for path in paths:
        others = {other.parts for other in paths if other != path}
        lengths = range(1, len(path.parts) + 1)
        tail = next(path.parts[-n:] for n in lengths if all(other[-n:] != path.parts[-n:] for other in others))
        name = re.sub(r"[^\w.+=-]", "_", "_".join(tail)).lstrip(".+=-")
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        labels.append(next(each for each in itertools.chain([name], numbered) if each not in labels))
    return labels[1:]
