"""Jobs trained together in this process: what they share is made once, and each is run as it would run by itself."""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from lightning.pytorch import Callback, LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.build import Parts, can_be_kept, make_data, make_parts, make_trainer
from lora_lightning.cli.group_file import GroupFile
from lora_lightning.cli.overrides import GlobalHydraKept
from lora_lightning.cli.packed_places import places_for
from lora_lightning.cli.quiet import quieten
from lora_lightning.cli.told import show_error
from lora_lightning.cli.training import train
from lora_lightning.conf import CONFIGS
from lora_lightning.data.loaded import Loaded
from lora_lightning.data.module import DataModule
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.sweeps.packed.baton import Player
from lora_lightning.sweeps.packed.conductor import Conductor
from lora_lightning.sweeps.packed.context import Context, Global
from lora_lightning.sweeps.packed.halving import Board, Plan
from lora_lightning.sweeps.packed.hindrances import why_not_packed
from lora_lightning.sweeps.packed.model import PackedModel
from lora_lightning.sweeps.packed.rungs import NAME, Rungs
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.sweeps.runs import JOB, read_json
from lora_lightning.tasks.model import load_model, load_tokenizer
from lora_lightning.tasks.model_config import ModelConfig

_TASK = "lora_lightning.sweeps.packed.task.PackedCausalLM"
# Hydra has one configuration at a time, which `${hydra:…}` is read from.
HYDRA = Global(lambda: HydraConfig.instance().cfg, lambda cfg: setattr(HydraConfig.instance(), "cfg", cfg))
WORKING_FOLDER = Global(os.getcwd, os.chdir)  # with hydra.job.chdir it is the job's


def train_together(group: GroupFile, hear: Callable[[Callable[[int], None]], None]) -> bool:
    """Train the jobs of a group, each into its folder.

    Args:
        group: The jobs.
        hear: Called with what stops them all on a signal, whose number it takes.

    Returns:
        Whether any of them has failed.
    """
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="[%(levelname)s] %(message)s")
    quieten()
    plan = Plan.of(group.halving)
    configs = compose([job.arguments for job in group.jobs])
    shared = Shared(configs[0][1])
    board = None if plan is None else Board(plan.eta, group.mode, _earlier(group))
    places = group.places or shared.places([config for _, config in configs], group.shared_by)
    conductor = Conductor(PackedModel(shared.network), places=places, board=board, why_alone=why_not_packed)
    hear(conductor.stop)
    with ExitStack() as screens:
        players = []
        for job, (hydra, config) in zip(group.jobs, configs, strict=True):
            Path(job.log).parent.mkdir(parents=True, exist_ok=True)
            screen = screens.enter_context(open(job.log, "a", buffering=1, encoding="utf-8"))
            rungs = (
                None
                if plan is None
                else functools.partial(Rungs, plan=plan, among=group.among, metric=group.metric, folder=job.folder)
            )
            run = _Run(hydra, config, shared, rungs)
            players.append(
                Player(job.number, run, Context(screen, more=(HYDRA, WORKING_FOLDER), **{JOB: str(job.number)}))
            )
        print(f"{len(players)} jobs are trained together on one base, {min(places, len(players))} at once.")
        began = time.monotonic()
        conductor.run(players)
        print(f"All jobs have ended after {time.monotonic() - began:.1f} s.")
    for player in players:
        if player.error is not None:
            print(f"Job {player.number}: {type(player.error).__name__}: {player.error}")
    return any(player.error is not None for player in players)


def compose(commands: Sequence[Sequence[str]]) -> list[tuple[Hydra, DictConfig]]:
    """What Hydra makes of the arguments of several commands, as if each were run by itself."""
    version.setbase("1.3")
    composed = []
    for arguments in commands:
        given = get_args_parser().parse_args(list(arguments))
        search_path = create_config_search_path(given.config_path or CONFIGS)
        if given.config_dir is not None:
            search_path.append("command-line", f"file://{Path(given.config_dir).absolute()}")
        with GlobalHydraKept():
            hydra = Hydra.create_main_hydra2("train", search_path)
            config = hydra.compose_config(
                given.config_name or "train", given.overrides, run_mode=RunMode.RUN, with_log_configuration=False
            )
        composed.append((hydra, config))
    return composed


class Shared:
    """What the jobs have in common: the network, where and as they train it, tokenizers, and rows.

    Args:
        config: Of any one of them.
    """

    def __init__(self, config: DictConfig) -> None:
        settings = _of_no_job(config)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = ModelConfig.of(OmegaConf.to_container(settings.model, resolve=True))  # type: ignore[arg-type]  # a dict
        self._tokenizers: dict[tuple[str, str], PreTrainedTokenizerBase] = {}
        self._rows: dict[str, Loaded] = {}
        network = load_model(replace(model, in_parts=False), "causal_lm")
        strategy = make_trainer(settings, [], []).strategy
        self.network: nn.Module = strategy.precision_plugin.convert_module(network).to(strategy.root_device)

    def places(self, configs: Sequence[DictConfig], shared_by: int) -> int:
        """How many jobs train at once, where so many processes share the memory."""
        settings = [_of_no_job(config) for config in configs]
        data = make_data(settings[0], self._tokenizer(settings[0], "data"), keep=True)
        self._load(settings[0], data)
        data.setup()  # of its own, where others may not want the same
        return places_for(settings, self.network, data, shared_by)

    def parts(self, cfg: DictConfig, player: Player, callbacks: Sequence[Callback]) -> Parts:
        """The task and the data of one job."""
        own = cfg.copy()
        own.task._target_ = _TASK
        parts = make_parts(
            own,
            of_data=self._tokenizer(cfg, "data"),
            network=shell_of(self.network),
            tokenizer=self._tokenizer(cfg, "task"),
            player=player,
            callbacks=callbacks,
        )
        self._load(cfg, parts.data)
        return parts

    def _load(self, cfg: DictConfig, data: LightningDataModule) -> None:
        """Rows are loaded once for all jobs that want the same."""
        if not isinstance(data, DataModule) or not can_be_kept(cfg):
            return
        key = repr((OmegaConf.to_container(cfg.data, resolve=True), cfg.model))
        if key in self._rows:
            data.take(self._rows[key])
        else:
            data.setup()
            self._rows[key] = data.loaded

    def _tokenizer(self, cfg: DictConfig, of: str) -> PreTrainedTokenizerBase:
        """That of the tasks, which only read it, or of the data, all of which make the same of it."""
        model = ModelConfig.of(OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]  # a dict
        if (key := (repr(model), of)) not in self._tokenizers:  # jobs may differ in the chat template
            self._tokenizers[key] = load_tokenizer(model)
        return self._tokenizers[key]


class _Run:
    """One job as it is run in its thread: with the configuration, the folder and the ending that it has by itself."""

    def __init__(
        self, hydra: Hydra, config: DictConfig, shared: Shared, rungs: Callable[[Player], Callback] | None
    ) -> None:
        self.hydra, self.config, self.shared, self.rungs = hydra, config, shared, rungs

    def __call__(self, player: Player) -> Any:
        callbacks = [] if self.rungs is None else [self.rungs(player)]

        def task(cfg: DictConfig) -> float | None:
            try:
                return train(cfg, make_parts=lambda cfg: self.shared.parts(cfg, player, callbacks))
            except (LoraConfigError, AdapterError) as error:
                show_error(error)
                raise
            except Exception:
                traceback.print_exc()
                raise

        context = HydraContext(config_loader=self.hydra.config_loader, callbacks=Callbacks(self.config))
        returned = run_job(
            task_function=task,
            config=self.config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=context,
            configure_logging=False,
        )
        return returned.return_value  # of a job that has failed, its error


def _of_no_job(config: DictConfig) -> DictConfig:
    """Settings that name no folder, which only Hydra knows, and only while a job runs."""
    settings = config.copy()
    settings.trainer.default_root_dir = None
    return settings


def _earlier(group: GroupFile) -> dict[int, list[float]]:
    """What jobs have reported at rungs before this process began."""
    found = {}
    for number, folder in group.earlier.items():
        left = read_json(Path(folder) / NAME) or {}
        if left.get("among") == group.among:
            found[int(number)] = [math.nan if value is None else value for value in left["values"]]
    return found
