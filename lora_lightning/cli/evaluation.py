"""The evaluation job: an adapter and its base model measured on the same rows, and on tasks of lm-eval."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.console import Console

from lora_lightning.adapters import adapter_from_checkpoint, load_adapter
from lora_lightning.adapters.folder import read_record
from lora_lightning.adapters.hub import adapter_folder
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli.as_trained import as_trained
from lora_lightning.cli.build import Parts, make_parts, make_trainer, prepare
from lora_lightning.cli.optimized import is_typed, optimized
from lora_lightning.cli.progress import RunProgress
from lora_lightning.cli.run_folder import is_first_process, keep
from lora_lightning.cli.which_adapter import Which, run_around, which_adapter
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import lora_disabled
from lora_lightning.reports.recorder import write_json
from lora_lightning.reports.side_by_side import Measured, comparison, of_metrics
from lora_lightning.tasks.dtype import likely_device
from lora_lightning.tasks.harness import Figure, Harness


def evaluate(cfg: DictConfig) -> float | None:
    """Measure the base model and the adapted one on the same rows, print both and write ``eval.json``.

    Args:
        cfg: The composed configuration; one of ``cfg.adapter`` and ``cfg.ckpt_path`` names the adapter. What it does
            not choose of model, data and task is taken from the run that the adapter lies in.

    Returns:
        The adapted model's ``cfg.optimized_metric``, or None where it was not measured.

    Raises:
        LoraConfigError: Neither or both are given, or the configuration is wrong; or ``optimized_metric`` was typed and
            not measured, which is known when the rest is written.
        AdapterError: There is no adapter, or it does not fit the model.
    """
    which = _which(cfg)
    if cfg.split not in ("val", "test", None):
        raise LoraConfigError(f"split must be val, test or null, got {cfg.split!r}")
    if cfg.split is None and not cfg.lm_eval:
        raise LoraConfigError("split=null measures no rows, and lm_eval names no tasks: there is nothing to measure")
    typed = HydraConfig.get().overrides.task
    cfg, taken = as_trained(cfg, which.run, typed)
    if taken and is_first_process():
        print(f"{', '.join(taken)}: as in {which.run}")
    prepare(cfg)
    trainer = make_trainer(cfg, [RunProgress()], [])
    harness = _harness(cfg, trainer)
    cfg.model.in_parts = False  # the weights are to be there before the adapter is
    parts = make_parts(cfg)
    _load(cfg, which, parts)
    rows, tasks = _on_rows(cfg.split, trainer, parts), _on_tasks(harness, parts)
    if is_first_process():
        _leave(cfg, rows, tasks)
    measured = {each.name: each.adapted for each in rows + tasks}
    # The default is training's; rows of another split, or tasks alone, do not measure it.
    return optimized(cfg.optimized_metric, measured) if is_typed(typed) else measured.get(cfg.optimized_metric)


def _which(cfg: DictConfig) -> Which:
    if (cfg.adapter is None) == (cfg.ckpt_path is None):
        raise LoraConfigError(
            "Name what is to be measured: either adapter=<a run's folder, as outputs/…, or an adapter folder> "
            f"or ckpt_path=<a checkpoint of a training run>, got {'neither' if cfg.adapter is None else 'both'}."
        )
    return which_adapter(cfg.adapter) if cfg.adapter else Which(cfg.ckpt_path, run_around(Path(cfg.ckpt_path)))


def _load(cfg: DictConfig, which: Which, parts: Parts) -> None:
    """Put the adapter into the task's model, over those that it was trained over; a checkpoint's by way of a folder."""
    with tempfile.TemporaryDirectory() as place:
        if cfg.adapter is None:
            folder = adapter_from_checkpoint(cfg.ckpt_path, Path(place) / "adapter")
        else:
            folder = adapter_folder(which.adapter)
        for earlier in read_record(folder).get("bases", ()):
            fold_in(parts.task, earlier)
        load_adapter(parts.task, folder)


def _on_rows(split: str | None, trainer: Trainer, parts: Parts) -> list[Measured]:
    if split is None:
        return []
    with lora_disabled(parts.task):
        base = _measure(trainer, parts, split)
    return of_metrics(base, _measure(trainer, parts, split))


def _measure(trainer: Trainer, parts: Parts, split: str) -> dict[str, float]:
    run = trainer.validate if split == "val" else trainer.test
    metrics = run(parts.task, datamodule=parts.data, verbose=False)[0]
    return {name: float(value) for name, value in metrics.items()}


def _harness(cfg: DictConfig, trainer: Trainer) -> Harness | None:
    """The tasks that were asked for, looked up before anything is loaded."""
    if not cfg.lm_eval:
        return None
    if not cfg.task._target_.endswith(".CausalLM"):
        raise LoraConfigError(f"lm_eval asks causal language models, and the task is {cfg.task._target_}")
    if trainer.world_size > 1:
        raise LoraConfigError(f"lm_eval runs in one process, and here are {trainer.world_size}: set trainer.devices=1")
    return Harness(
        [cfg.lm_eval] if isinstance(cfg.lm_eval, str) else list(cfg.lm_eval),
        limit=cfg.lm_eval_limit,
        fewshot=cfg.lm_eval_fewshot,
        tasks_path=cfg.lm_eval_tasks_path,
        chat_template=cfg.lm_eval_chat_template,
        batch_size=cfg.lm_eval_batch_size,
    )


def _on_tasks(harness: Harness | None, parts: Parts) -> list[Measured]:
    if harness is None:
        return []
    task: Any = parts.task
    if getattr(task.base, "quantisation", None) is None:
        task.to(likely_device())
    with lora_disabled(task):
        base = harness.measure(task.model, task.tokenizer)
    return [_asked(name, base[name], figure) for name, figure in harness.measure(task.model, task.tokenizer).items()]


def _asked(name: str, base: Figure, adapted: Figure) -> Measured:
    return Measured(name, base.value, adapted.value, adapted.higher_is_better, base.stderr, adapted.stderr)


def _leave(cfg: DictConfig, rows: list[Measured], tasks: list[Measured]) -> None:
    content: dict[str, Any] = {
        "status": "finished",
        "adapter": str(cfg.adapter or cfg.ckpt_path),
        "split": cfg.split,
        **_sides(rows),
    }
    if tasks:
        errors = {each.name: each.adapted_stderr for each in tasks}
        content["lm_eval"] = {"limit": cfg.lm_eval_limit, **_sides(tasks), "stderr": errors}
    path = Path(cfg.paths.output_dir) / "eval.json"
    keep(path)
    write_json(path, content)
    console = Console()
    console.print(comparison(rows + tasks))
    console.print(f"Written to {path}", soft_wrap=True)


def _sides(measured: list[Measured]) -> Mapping[str, dict[str, float]]:
    return {
        "base": {each.name: each.base for each in measured},
        "adapted": {each.name: each.adapted for each in measured},
    }
