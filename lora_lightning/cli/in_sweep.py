"""What a run does otherwise where it is a job of a sweep: it tells little, tells it shortly, and says how far it is.

Sixty jobs are compared by the sweep's report, and nobody sits before the screen of one. So there are no samples, no
pictures and no tables of one job unless ``sweep.reports`` asks for them, and never a bar in its log. Nothing here
changes what is trained.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_lightning.data.module import DataModule
from lora_lightning.reports import InsightCallback, SampleWriter
from lora_lightning.sweeps import manifest
from lora_lightning.sweeps.pruning import pruning_in
from lora_lightning.sweeps.runs import current_sweep
from lora_lightning.sweeps.status import StatusFile

_WANDB = "lightning.pytorch.loggers.WandbLogger"


def reports_wanted(cfg: DictConfig) -> bool:
    """Whether a run makes tables, samples and pictures of its own."""
    return current_sweep() is None or bool(OmegaConf.select(cfg, "sweep.reports", default=False))


def as_job(cfg: DictConfig) -> DictConfig:
    """The configuration as a job of a sweep has it: without a bar, and with its place among W&B's runs."""
    sweep = current_sweep()
    if sweep is None:
        return cfg
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.trainer.enable_progress_bar = False
        for logger in (cfg.get("logger") or {}).values():
            if logger is not None and logger.get("_target_") == _WANDB:
                logger.group = logger.get("group") or sweep.name
                logger.name = logger.get("name") or short_name(sweep, Path(cfg.paths.output_dir))
    return cfg


def job_callbacks(cfg: DictConfig, callbacks: list[Callback]) -> list[Callback]:
    """The callbacks that a run has: as a job of a sweep without bars and reports, with its status file and pruning."""
    if current_sweep() is None:
        return callbacks
    unwanted = (ProgressBar,) if reports_wanted(cfg) else (ProgressBar, SampleWriter, InsightCallback)
    kept = [each for each in callbacks if not isinstance(each, unwanted)]
    return [*kept, StatusFile(cfg.paths.output_dir), *pruning_in(Path(cfg.paths.output_dir))]


def hush(cfg: DictConfig, data: LightningDataModule) -> None:
    """Keep a data module of this package from telling what its rows are."""
    if isinstance(data, DataModule) and not reports_wanted(cfg):
        data.keep_quiet()


def short_name(sweep: Path, folder: Path) -> str | None:
    """What sets a job apart from the others of its sweep, or None where the sweep does not know its folder."""
    known = manifest.read(sweep)
    jobs = () if known is None else known.jobs
    names = dict(zip((each.folder for each in jobs), manifest.short_overrides(jobs), strict=True))
    return names.get(os.path.relpath(folder.resolve(), sweep.resolve()))
