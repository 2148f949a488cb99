"""The evaluation job: an adapter and its base model measured on the same rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lora_lightning.adapters import adapter_from_checkpoint, load_adapter
from lora_lightning.cli.build import Parts, make_parts, make_trainer, prepare
from lora_lightning.cli.progress import RunProgress
from lora_lightning.cli.run_folder import is_first_process, keep
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import lora_disabled
from lora_lightning.reports.recorder import write_json


def evaluate(cfg: DictConfig) -> float | None:
    """Measure the base model and the adapted one on the same rows, print both and write ``eval.json``.

    Args:
        cfg: The composed configuration; one of ``cfg.adapter`` and ``cfg.ckpt_path`` names the adapter.

    Returns:
        The adapted model's ``cfg.optimized_metric``, or None where it was not measured.

    Raises:
        LoraConfigError: Neither or both are given, or the configuration is wrong.
        AdapterError: The adapter does not fit the model.
    """
    if (cfg.adapter is None) == (cfg.ckpt_path is None):
        raise LoraConfigError(
            "Name what is to be measured: either adapter=<an adapter folder, as in outputs/…/adapter> "
            f"or ckpt_path=<a checkpoint of a training run>, got {'neither' if cfg.adapter is None else 'both'}."
        )
    if cfg.split not in ("val", "test"):
        raise LoraConfigError(f"split must be val or test, got {cfg.split!r}")
    prepare(cfg)
    parts = make_parts(cfg)
    _load(cfg, parts)
    trainer = make_trainer(cfg, [RunProgress()], [])
    with lora_disabled(parts.task):
        base = _measure(trainer, parts, cfg.split)
    adapted = _measure(trainer, parts, cfg.split)
    if is_first_process():
        source = str(cfg.adapter or cfg.ckpt_path)
        path = Path(cfg.paths.output_dir) / "eval.json"
        keep(path)
        write_json(
            path,
            {"status": "finished", "adapter": source, "split": cfg.split, "base": base, "adapted": adapted},
        )
        console = Console()
        console.print(comparison(base, adapted))
        console.print(f"Written to {path}", soft_wrap=True)
    return adapted.get(cfg.optimized_metric) if cfg.optimized_metric else None


def comparison(base: dict[str, float], adapted: dict[str, float]) -> Table:
    """Both models' metrics in one table, by name."""
    table = Table("Metric", title="Base and adapter", title_justify="left")
    for heading in ("Base", "With adapter", "Change"):
        table.add_column(heading, justify="right")
    for name, value in adapted.items():
        before = base.get(name, float("nan"))
        table.add_row(name, f"{before:.4f}", f"{value:.4f}", f"{value - before:+.4f}")
    return table


def _load(cfg: DictConfig, parts: Parts) -> None:
    """Put the adapter into the task's model; a checkpoint's goes through a folder, so that both are read alike."""
    if cfg.adapter is not None:
        load_adapter(parts.task, cfg.adapter)
        return
    with tempfile.TemporaryDirectory() as place:
        load_adapter(parts.task, adapter_from_checkpoint(cfg.ckpt_path, Path(place) / "adapter"))


def _measure(trainer: Trainer, parts: Parts, split: str) -> dict[str, float]:
    run = trainer.validate if split == "val" else trainer.test
    metrics = run(parts.task, datamodule=parts.data, verbose=False)[0]
    return {name: float(value) for name, value in metrics.items()}
