"""Adapters measured on the validation rows of the run that trained them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from lora_lightning.adapters import load_adapter, read_record
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli.build import Parts, make_parts, make_trainer, prepare
from lora_lightning.cli.which_adapter import run_named
from lora_lightning.injection import unload_lora

Metrics = dict[str, dict[str, float]]
# One process of this machine measures what any number of them may have trained.
_HERE = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "profiler": None}
_PLAIN = {"compile": False, "in_parts": False}


def run_metrics(run: Path, adapters: Mapping[str, str | Path | None], base: str | None = None) -> Metrics:
    """What the run's own validation says of each adapter, over one model in memory.

    Args:
        run: The folder of a run, whose ``config.yaml`` says model, data and batches.
        adapters: An adapter folder, or None for the base alone, by what to call it; all over the same base: adapters
            that were folded into it before the first of them was trained are folded in here.
        base: Another base model than the run's: name or folder.

    Returns:
        Metrics by name, for each of ``adapters``.

    Raises:
        LoraConfigError: It is no run's folder, or its model or data cannot be had any more.
        AdapterError: An adapter does not fit.
    """
    cfg = cast("DictConfig", OmegaConf.load(run_named(run) / "config.yaml"))
    cfg.model.update(_PLAIN)
    if base is not None:
        cfg.model.name, cfg.model.revision = base, None
    with tempfile.TemporaryDirectory() as nowhere:
        cfg.trainer.update(_HERE | {"default_root_dir": nowhere})
        prepare(cfg)
        parts, trainer = make_parts(cfg), make_trainer(cfg, [], [])
        for earlier in _below(adapters):
            fold_in(parts.task, earlier)
        return {name: _measured(trainer, parts, adapter) for name, adapter in adapters.items()}


def _below(adapters: Mapping[str, str | Path | None]) -> list[str]:
    """The adapters that belong below these, folded into the base in this order."""
    return next((read_record(each).get("bases", []) for each in adapters.values() if each is not None), [])


def _measured(trainer: Trainer, parts: Parts, adapter: str | Path | None) -> dict[str, float]:
    if adapter is not None:
        load_adapter(parts.task, adapter)
    try:
        metrics = trainer.validate(parts.task, datamodule=parts.data, verbose=False)[0]
    finally:
        if adapter is not None:
            unload_lora(parts.task)
    return {name: float(value) for name, value in metrics.items()}
