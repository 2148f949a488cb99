"""The training job: one run, from a composed configuration to a folder of products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax

from lora_lightning.callback import LoraCallback
from lora_lightning.cli import loggers as trackers
from lora_lightning.cli import run_folder
from lora_lightning.cli.again import command_again
from lora_lightning.cli.build import Parts, make_callbacks, make_loggers, make_parts, make_trainer, prepare, resolved
from lora_lightning.cli.ended import ended_by
from lora_lightning.cli.in_sweep import as_job, hush, job_callbacks, reports_wanted
from lora_lightning.cli.optimized import is_typed, optimized
from lora_lightning.cli.out_of_memory import remedied
from lora_lightning.cli.progress import Announcement
from lora_lightning.config import LoraConfig
from lora_lightning.reports import RunRecorder, closing_table, loss_picture
from lora_lightning.reports.advice import advice_table, leave_advice
from lora_lightning.reports.page import AboutRun, try_page


def train(
    cfg: DictConfig,
    *,
    overrides: Sequence[str] | None = None,
    make_parts: Callable[[DictConfig], Parts] = make_parts,
) -> float | None:
    """One run: measure, train, measure, and leave everything in its folder.

    Args:
        cfg: The composed configuration.
        overrides: The settings that were given for it; None: those that Hydra was called with.
        make_parts: Makes the task and the data module of a configuration.

    Returns:
        The value of ``cfg.optimized_metric``, for sweepers; None where that is null, or where it is the default
        and nothing is validated.

    Raises:
        LoraConfigError: The configuration or the data is wrong; nothing was trained or overwritten.
        AdapterError: An adapter or a checkpoint does not fit.
    """
    overrides = list(HydraConfig.get().overrides.task if overrides is None else overrides)
    cfg = as_job(cfg)
    folder = Path(cfg.paths.output_dir)
    LoraConfig.from_dict(cfg.lora)  # before anything is loaded, written or moved
    checkpoint = run_folder.checkpoint_in(folder, cfg.ckpt_path, cfg.resume)
    goes_on = checkpoint is not None or cfg.resume is not None or run_folder.is_requeued()
    run_folder.claim(folder, resuming=goes_on)
    prepare(cfg)
    if run_folder.is_first_process():
        _write_config(cfg, folder)
        _say_whose_length(cfg, overrides)
    recorder, announcement = RunRecorder(), Announcement(quiet=not reports_wanted(cfg))
    trainer: Trainer | None = None
    status = "failed"
    try:
        parts = make_parts(cfg)
        hush(cfg, parts.data)
        callbacks = job_callbacks(cfg, make_callbacks(cfg))
        recorder = next((each for each in callbacks if isinstance(each, RunRecorder)), recorder)
        about = [AboutRun(folder, overrides, command_again(overrides))] if reports_wanted(cfg) else []
        callbacks += [each for each in (recorder, announcement, *about) if each not in callbacks]
        trainer = make_trainer(cfg, callbacks, make_loggers(cfg))
        trackers.log_config(trainer.loggers, resolved(cfg))
        with remedied(cfg, overrides, parts.data):
            _fit(cfg, trainer, parts, announcement, checkpoint)
        status = "finished"
    finally:
        # Lightning turns an interrupt into SystemExit; the recorder has seen what it was.
        if status != "finished" and recorder.fields["status"] == "interrupted":
            status = "interrupted"
        try:
            if run_folder.is_first_process():
                _leave(cfg, overrides, folder, recorder, status, trainer)
        finally:
            trackers.finish(() if trainer is None else trainer.loggers, failed=status == "failed")
    measured = recorder.fields | _tested(trainer)
    if trainer.limit_val_batches == 0 and cfg.optimized_metric == "val_loss" and not is_typed(overrides):
        return None  # the default, which is not to make a failure of a training without validation
    return optimized(cfg.optimized_metric, measured)


def _fit(cfg: DictConfig, trainer: Trainer, parts: Parts, announcement: Announcement, checkpoint: Path | None) -> None:
    task, data = parts
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    # The figures are those of the final weights, which the last validation of the fit may have missed.
    if announcement.validated_at != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)
    if cfg.test:
        trainer.test(task, datamodule=data)


def _write_config(cfg: DictConfig, folder: Path) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create(resolved(cfg)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    if cfg.print_config:
        Console().print(Syntax(text, "yaml", background_color="default"))


def _say_whose_length(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Other rows than the experiment's are trained for as long as the experiment says, which may not be meant."""
    typed = {override.partition("=")[0] for override in overrides}
    if "data" in typed and not typed & {"experiment", "trainer.max_steps", "trainer.max_epochs"}:
        Console().print(
            f"The length of this run is that of experiment={cfg.name}: {cfg.trainer.max_steps} steps. "
            "For one pass over your own rows add experiment=own.",
            soft_wrap=True,
        )


def _leave(
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    recorder: RunRecorder,
    status: str,
    trainer: Trainer | None,
) -> None:
    """Write result.json and the picture, give the adapter to the trackers and say where everything is."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    fields: dict[str, Any] = {"status": status, "overrides": list(overrides), "seed": cfg.seed}
    fields["ended_by"] = ended_by(trainer) if status == "finished" else None
    lora = next((each for each in callbacks if isinstance(each, LoraCallback)), None)
    if trainer is not None:
        fields |= _tested(trainer)
    if lora is not None and lora.adapter_path is not None:
        fields["adapter_path"] = str(lora.adapter_path)
        fields["best_adapter_path"] = None if lora.best_adapter_path is None else str(lora.best_adapter_path)
    measured = (recorder.fields | fields).get(cfg.optimized_metric)
    fields["value"] = measured if isinstance(measured, (int, float)) else None
    advice = leave_advice(folder, recorder.fields | fields) if reports_wanted(cfg) else None
    if advice is not None:
        fields["advice"] = [each.to_dict() for each in advice]
    result = recorder.write_result(folder / "result.json", **fields)
    metrics, reports = folder / "metrics.csv", reports_wanted(cfg)
    if metrics.is_file() and reports:
        before = recorder.fields["val_loss_before"]
        loss_picture(metrics, folder / "loss.png", val_loss_before=before, earlier=run_folder.kept(metrics))
    content = recorder.fields | fields
    if trainer is not None and "adapter_path" in fields:
        kept = ("val_loss_before", "val_loss", "trainable_parameters", "total_parameters", "steps", "seed")
        trackers.log_adapter(trainer.loggers, Path(fields["adapter_path"]), {key: content[key] for key in kept})
    console = Console()
    if status == "finished" and reports_wanted(cfg):
        console.print(closing_table(content))
    if advice is not None:
        console.print(advice_table(advice))
    console.print(f"Run folder: {result.parent}", soft_wrap=True)
    if reports and (page := try_page(folder)) is not None:
        console.print(f"One page of it: {page}", soft_wrap=True)


def _tested(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test_")}
