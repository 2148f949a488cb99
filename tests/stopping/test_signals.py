"""Signals to one process: it saves at a step, and the resumed run ends with the uninterrupted one's weights."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from lora_lightning.adapters.files import damage_of

TERM, INT, USR1, USR2 = (int(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))


@pytest.mark.parametrize(
    ("number", "at", "status", "step"),
    [
        (TERM, 4, 143, 3),  # within an accumulated step: it is finished first
        (INT, 5, 1, 3),  # at the end of one; Lightning makes status 1 of Ctrl-C
        (USR1, 9, 138, 5),  # a validation follows, which belongs to the step
        (USR2, 12, 140, 7),  # in the second epoch
    ],
)
def test_it_saves_and_ends_and_goes_on_exactly(run, whole, number, at, status, step):
    cut = run(accumulate=2, send=[(0, at, number, 1)])
    assert cut.status == status, cut.said
    assert f"Stopped by {signal.Signals(number).name} after step {step}" in cut.said
    assert f"ckpt_path='{cut.stopped}'" in cut.said
    assert damage_of(cut.stopped) is None
    assert torch.load(cut.stopped, weights_only=True)["global_step"] == step
    resumed = run(accumulate=2, ckpt=str(cut.stopped))
    assert resumed.status == 0, resumed.said
    assert resumed.said.count("validated") == (2 if at < 9 else 1)
    assert resumed.same_as(whole(accumulate=2))


def test_a_second_interrupt_ends_at_once(run):
    cut = run(send=[(0, 3, INT, 2)], pause=1.2)
    assert cut.status == 1, cut.said
    assert not cut.stopped.exists()


@pytest.mark.parametrize(("handler", "number", "status"), [("returns", TERM, 143), ("exits", USR1, 7)])
def test_a_handler_of_ones_own_is_called_once_the_step_is_saved(run, handler, number, status):
    cut = run(handler=handler, send=[(0, 3, number, 1)])
    assert cut.status == status, cut.said
    assert cut.said.count(f"mine {number} saved") == 1


def test_one_interrupt_that_comes_twice_is_one(run, whole):
    """The terminal gives it to every process, and torchrun, mpirun and the like pass theirs on."""
    cut = run(send=[(0, 3, INT, 2)], pause=0.01)
    assert cut.status == 1, cut.said
    assert torch.load(cut.stopped, weights_only=True)["global_step"] == 4


def test_an_interrupt_behind_another_signal_is_no_second_one(run):
    cut = run(send=[(0, 3, TERM, 1), (0, 3, INT, 1)], pause=1.2)
    assert torch.load(cut.stopped, weights_only=True)["global_step"] == 4
    assert cut.status == 143, cut.said


@pytest.mark.parametrize("number", [TERM, INT])
def test_an_ignored_signal_stays_ignored(run, number):
    done = run(ignored=True, send=[(0, 3, number, 1)])
    assert done.status == 0, done.said
    assert not done.stopped.exists()


def test_one_at_the_very_end_does_not_cost_the_result(run):
    late = run(send=[(0, 19, TERM, 1)])
    assert late.status == 143, late.said
    assert "when training was over" in late.said
    assert (late.out / "adapter" / "adapter_model.safetensors").is_file()


REQUEUES = """
import os, signal, subprocess, sys
from lightning.fabric.plugins.environments import SLURMEnvironment
from pathlib import Path
os.environ |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
               "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}
os.environ["PATH"] = sys.argv[1] + os.pathsep + os.environ["PATH"]
import lightning.pytorch as pl, torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lora_lightning import LoraCallback, SaveOnSignal

class Module(BoringModel):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        if batch_idx == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

pl.Trainer(max_steps=20, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
           default_root_dir=sys.argv[1], plugins=SLURMEnvironment(),
           callbacks=[LoraCallback({"r": 2}), SaveOnSignal()]).fit(Module())
"""


def test_under_slurm_lightning_requeues_and_nobody_else(tmp_path):
    """A stand-in for scontrol notes who calls it; the signal comes in the middle of a step, the save at its end."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", REQUEUES, tmp_path], capture_output=True, text=True, timeout=500)
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "calls").read_text().split() == ["requeue", "77"]
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert damage_of(tmp_path / "hpc_ckpt_1.ckpt") is None
    # Training went on, as Lightning wants it, until the job was ended.
    assert torch.load(tmp_path / "checkpoints" / "stopped.ckpt", weights_only=True)["global_step"] == 7


SUBMITIT = """
import os, signal, sys, types
# What submitit does in a job, by its handler's module and names.
class SignalHandler:
    def bypass(self, signum, frame=None):
        print("Bypassing signal", flush=True)
    def checkpoint_and_try_requeue(self, signum, frame=None):
        print("requeued", os.path.exists(sys.argv[1] + "/checkpoints/stopped.ckpt"), flush=True)
        sys.exit(-1)
SignalHandler.__module__ = "submitit.core.job_environment"
signal.signal(signal.SIGTERM, SignalHandler().bypass)
signal.signal(signal.SIGUSR2, SignalHandler().checkpoint_and_try_requeue)
import lightning.pytorch as pl, torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lora_lightning import LoraCallback, SaveOnSignal

class Module(BoringModel):
    def training_step(self, batch, batch_idx):
        if batch_idx in (3, 6):
            os.kill(os.getpid(), {3: signal.SIGTERM, 6: signal.SIGUSR2}[batch_idx])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

pl.Trainer(max_steps=20, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
           default_root_dir=sys.argv[1], callbacks=[LoraCallback({"r": 2}), SaveOnSignal()]).fit(Module())
"""


def test_under_submitit_submitit_requeues(tmp_path):
    done = subprocess.run([sys.executable, "-c", SUBMITIT, tmp_path], capture_output=True, text=True, timeout=500)
    assert done.returncode == 255, done.stderr
    assert done.stdout.split("\n")[:2] == ["Bypassing signal", "requeued True"]
    assert "step 4 is saved" in done.stderr
    assert torch.load(tmp_path / "checkpoints" / "stopped.ckpt", weights_only=True)["global_step"] == 7
