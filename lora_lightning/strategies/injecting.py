"""The adapter's way into a network that a trainer has, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.adapters import load_adapter
from lora_lightning.adapters.folder import chain_of
from lora_lightning.adapters.hub import adapter_folder
from lora_lightning.config import LoraConfig
from lora_lightning.injection import LoraReport
from lora_lightning.injection.inject import default_seed, inject_ahead
from lora_lightning.injection.state import injected_roots, record_of, the_root
from lora_lightning.layers.bits import keep_order
from lora_lightning.strategies import state_of
from lora_lightning.strategies.chosen import config_for, fold_in_first
from lora_lightning.strategies.replaced import convert_first, keep_marks


def put_in(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    target: nn.Module,
    given: LoraConfig | None,
    *,
    adapter: str | None,
    base_adapter: str | None,
) -> LoraReport:
    """Give a network its adapter: the same on every process, over the base that the trainer will train on.

    Args:
        trainer: Of the run.
        pl_module: Whose network it is.
        target: The part of it below which the adapter goes.
        given: The config, if one was.
        adapter: Saved adapter to go on from: a folder, or one on the Hub.
        base_adapter: Saved adapter to fold into the base first.

    Returns:
        What was injected.

    Raises:
        LoraConfigError: If what is given contradicts itself or the network.
        AdapterError: If a saved adapter cannot be read, or does not fit.
    """
    fresh = not injected_roots(target)
    if fresh:
        convert_first(trainer, pl_module)
    keep_marks(trainer.strategy)
    folder = None if adapter is None else str(adapter_folder(adapter))
    config = config_for(target, pl_module, given, folder)
    if base_adapter is not None:
        fold_in_first(target, config, base_adapter)
    # One seed for all processes, whatever each has set for itself: adapters begin equal under every strategy.
    report = inject_ahead(target, config, seed=trainer.strategy.broadcast(default_seed()))
    keep_order(pl_module)  # around the target too, where gradients pass through
    record = record_of(the_root(target)[1])
    if fresh and base_adapter is not None:
        record.bases = chain_of(base_adapter)
    if folder is not None and record.source != str(Path(folder).resolve()):
        load_adapter(target, folder, trainable=True)
    state_of(trainer).injected(target, by_callback=fresh)
    return report


def tell_injected(report: LoraReport) -> None:
    """Say what was injected, and which part that looked new was frozen with the base."""
    rank_zero_info(report.line())
    if report.frozen_heads:
        rank_zero_info(
            f"LoRA froze {', '.join(report.frozen_heads)}, which was trainable and looks new; to train it in full "
            f"and save it with the adapter: modules_to_save={list(report.frozen_heads)!r}"
        )


def tell_still(norms: Mapping[str, nn.Module]) -> None:
    """Say which normalisation layers keep their running statistics, if any do."""
    if norms:
        rank_zero_info(
            f"the running statistics of {len(norms)} normalisation layers stay as they are (first: "
            f"{next(iter(norms))}); freeze_norm_stats=False lets them move"
        )


def log_facts(facts: dict[str, Any], loggers: list[Logger], logged: set[int]) -> None:
    """Give each logger the facts of an adapter, once: ``logged`` has the loggers, by id, that know them."""
    for logger in loggers:
        if id(logger) not in logged:
            logged.add(id(logger))
            logger.log_hyperparams(facts)
