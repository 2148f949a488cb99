"""A Hydra multirun whose further processes would each run the sweep again: refused before one of them is started."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError
from lora_lightning.strategies import checks

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = """
import hydra, lightning.pytorch as pl, sys, torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader
from lora_lightning import LoraCallback, LoraConfig

print("started", flush=True)

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
    def training_step(self, batch, _):
        return self.net(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig):
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[LoraCallback(LoraConfig(r=cfg.r))])
    trainer.fit(Module(), DataLoader(torch.randn(4, 2), batch_size=1))
    print("trained", flush=True)

main()
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs the script above: sweep(*arguments)."""
    (tmp_path / "sweep.py").write_text(SCRIPT)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "sweep.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def test_the_basic_launcher_is_refused_before_a_process_is_started(sweep):
    done = sweep("-m", "+r=1,2", "+seed=1,2")
    assert done.returncode != 0
    assert "a Hydra multirun with strategy DDPStrategy on 2 devices" in done.stderr
    assert "hydra/launcher=lora_local" in done.stderr
    assert done.stdout.count("started") == 1
    assert "trained" not in done.stdout


def test_the_launcher_that_it_names_trains_each_job_in_two_processes_of_its_own(sweep, tmp_path):
    done = sweep("-m", "+r=1,2", "hydra/launcher=lora_local", "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [(tmp_path / "out" / job / "job.log").read_text() for job in ("0", "1")]
    assert [log.count("trained") for log in logs] == [2, 2]
    assert ["LoRA: 1 layers adapted, r=1" in logs[0], "LoRA: 1 layers adapted, r=2" in logs[1]] == [True, True]


def test_without_a_multirun_both_processes_train(sweep):
    done = sweep("+r=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained") == 2


@pytest.fixture
def in_multirun(monkeypatch):
    """Makes this process look like a job of a multirun under a launcher, without a launcher's own processes."""
    launched = []

    def begin(launcher: str):
        settings = SimpleNamespace(mode=SimpleNamespace(name="MULTIRUN"), launcher={"_target_": launcher})
        monkeypatch.setattr(checks, "_multirun", lambda: settings)
        monkeypatch.setattr(_SubprocessScriptLauncher, "launch", lambda *args, **kwargs: launched.append("launched"))
        return launched

    return begin


def _trainer(*callbacks, strategy="ddp", environment=None):
    plugins = [environment or LightningEnvironment()]
    return pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, callbacks=list(callbacks), plugins=plugins
    )


def test_it_is_asked_once_however_many_callbacks_there_are(in_multirun):
    in_multirun("hydra._internal.core_plugins.basic_launcher.BasicLauncher")
    LoraCallback(LoraConfig(r=1))
    once = _SubprocessScriptLauncher.launch
    trainer = _trainer(LoraCallback(LoraConfig(r=1)))
    assert _SubprocessScriptLauncher.launch is once
    with pytest.raises(LoraConfigError, match="lora_local"):
        trainer.strategy.launcher.launch(print, trainer=trainer)


def test_a_trainer_without_the_callback_is_none_of_its_business(in_multirun):
    launched = in_multirun("hydra._internal.core_plugins.basic_launcher.BasicLauncher")
    LoraCallback(LoraConfig(r=1))
    trainer = _trainer()
    trainer.strategy.launcher.launch(print, trainer=trainer)
    assert launched


def test_forked_processes_are_no_commands_that_are_run_again(in_multirun):
    in_multirun("hydra._internal.core_plugins.basic_launcher.BasicLauncher")
    checks.check_trainer(_trainer(LoraCallback(LoraConfig(r=1)), strategy="ddp_fork"))


@pytest.mark.parametrize(
    ("launcher", "allowed"),
    [
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", True),
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", False),
    ],
)
def test_processes_that_slurm_started_are_right_where_it_started_them_for_one_job(
    in_multirun, monkeypatch, launcher, allowed
):
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in (tasks | {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}).items():
        monkeypatch.setenv(name, value)
    launched = in_multirun(launcher)
    trainer = _trainer(LoraCallback(LoraConfig(r=1)), environment=SLURMEnvironment(auto_requeue=False))
    if allowed:
        trainer.strategy.launcher.launch(print, trainer=trainer)
        assert launched
    else:
        with pytest.raises(LoraConfigError, match="lora_local"):
            trainer.strategy.launcher.launch(print, trainer=trainer)


def test_one_process_in_a_multirun_is_right(sweep, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT.replace("devices=2", "devices=1"))
    done = sweep("-m", "+r=1,2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained") == 2
