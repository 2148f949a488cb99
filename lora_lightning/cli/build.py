"""From a configuration to the objects of a run. Hydra's ``instantiate`` is used here and nowhere else."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.quiet import quieten
from lora_lightning.data.module import DataModule
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.sweeps.runs import current_sweep
from lora_lightning.tasks import ModelConfig, load_tokenizer


class Parts(NamedTuple):
    """What a run is about, before a Trainer takes it up."""

    task: LightningModule
    data: LightningDataModule


def partial_of(node: DictConfig) -> functools.partial[Any]:
    """What a node's ``_target_`` names, with the node's settings bound, as plain Python values.

    Raises:
        LoraConfigError: The target cannot be imported, or what it was given is wrong.
        AdapterError: A file that one of its own nodes reads does not fit.
    """
    try:
        return instantiate(node, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (LoraConfigError, AdapterError)):
                raise cause from None
            cause = cause.__cause__
        raise LoraConfigError(str(error)) from error


def make(node: DictConfig, **objects: Any) -> Any:
    """Call what a node names with its settings and with live objects, which stay the same objects."""
    try:
        return partial_of(node)(**objects)
    except TypeError as error:  # a setting that it does not take, added with a plus sign
        if "unexpected keyword argument" not in str(error):
            raise
        raise LoraConfigError(f"{node._target_}: {error}") from error


def prepare(cfg: DictConfig) -> None:
    """Settle what holds for the whole process: the seed and the number of torch's threads."""
    quieten(bars=current_sweep() is None)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    seed_everything(cfg.seed, workers=True, verbose=False)


def make_parts(cfg: DictConfig, *, of_data: PreTrainedTokenizerBase | None = None, **more: Any) -> Parts:
    """Load the tokenizer and the model, and make the data module that shares the tokenizer.

    Args:
        cfg: The composed configuration.
        of_data: The tokenizer of the data, where it is loaded already.
        **more: What else the task takes.

    Raises:
        LoraConfigError: Anything about them that the configuration has wrong.
    """
    model = ModelConfig.of(OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]  # a group is a dict
    tokenizer = load_tokenizer(model) if of_data is None else of_data
    data = make_data(cfg, tokenizer, keep=current_sweep() is not None)
    live: dict[str, Any] = {
        "model": model,
        "optimizer": None if cfg.optimizer is None else partial_of(cfg.optimizer),
        "scheduler": None if cfg.scheduler is None else partial_of(cfg.scheduler),
    }
    # What a classifier tells apart is the data's to say.
    if getattr(data, "num_labels", None) is not None:
        live |= {"num_labels": data.num_labels, "label_names": getattr(data, "label_names", None)}
    return Parts(make(cfg.task, **live, **more), data)


def make_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, *, keep: bool) -> Any:
    """The data module.

    Args:
        cfg: The composed configuration.
        tokenizer: For its rows.
        keep: Whether ``cache: auto`` keeps tokenised rows on disk; those of a stream, and of a data module that cannot
            say what they are made of, are not kept even so.
    """
    if cfg.data.get("cache") != "auto":
        return make(cfg.data, tokenizer=tokenizer)
    return make(cfg.data, tokenizer=tokenizer, cache=keep and can_be_kept(cfg))


def can_be_kept(cfg: DictConfig) -> bool:
    """Whether the data set is one whose tokenised rows can lie on disk."""
    kind = partial_of(cfg.data).func
    known = isinstance(kind, type) and issubclass(kind, DataModule) and kind.content is not DataModule.content
    return known and not cfg.data.get("streaming", False)


def make_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of the group, in its order."""
    return [make(node) for node in (cfg.callbacks or {}).values() if node is not None]


def make_loggers(cfg: DictConfig) -> list[Logger]:
    """The loggers of the group; the CSV one first, since the first one's folder is the run's for all callbacks."""
    loggers = [make(node) for node in (cfg.logger or {}).values() if node is not None]
    return sorted(loggers, key=lambda logger: not isinstance(logger, CSVLogger))


def make_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """The Trainer, with callbacks and loggers.

    Raises:
        LoraConfigError: A package or a device that it needs is not there, or settings do not go together.
    """
    try:
        return make(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    except MisconfigurationException as error:
        hint = " (pip install lora-lightning[deepspeed])" if "deepspeed" in str(error).lower() else ""
        raise LoraConfigError(f"trainer: {error}{hint}") from error


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]  # the top of a config is a dict
