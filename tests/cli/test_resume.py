"""Runs that were stopped or killed go on in their folder, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lora_lightning
from lora_lightning.cli.run_folder import checkpoint_in
from lora_lightning.cli.train import main
from lora_lightning.errors import LoraConfigError

pytestmark = pytest.mark.usefixtures("warm_starts")

TRAIN = Path(lora_lightning.__file__).parents[1] / "scripts" / "train.py"
FAST = ("experiment=smoke", "trainer.max_steps=5", "trainer.val_check_interval=2", "callbacks=minimal")
SIGNALLER = """
import os
from lightning.pytorch import Callback

class SignalAt(Callback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), self.number)
"""


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.fixture
def signal_at(tmp_path, monkeypatch):
    """Settings that let a run send itself a signal."""
    (tmp_path / "signaller.py").write_text(SIGNALLER)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda step, number: (
        "+callbacks.signal._target_=signaller.SignalAt",
        f"+callbacks.signal.step={step}",
        f"+callbacks.signal.number={number}",
    )


def adapter(folder: Path):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_stopped_told_how_and_resumed(call, signal_at, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(main, *FAST, f"hydra.run.dir={whole}").status == 0
    done = call(main, *FAST, *signal_at(2, 15), f"hydra.run.dir={cut}")
    assert done.status == 143
    assert f"the same command with resume=auto hydra.run.dir={cut}" in done.stderr
    assert result_of(cut)["status"] == "interrupted"
    assert result_of(cut)["steps"] == 3
    assert not (cut / "adapter").exists()
    done = call(main, *FAST, "resume=auto", f"hydra.run.dir={cut}")
    assert done.status == 0, done.stderr
    assert f"going on with {cut}/checkpoints/stopped.ckpt" in done.stdout
    assert result_of(cut)["status"] == "finished"
    assert result_of(cut)["val_loss"] == result_of(whole)["val_loss"]
    assert result_of(cut)["val_loss_before"] == result_of(whole)["val_loss_before"]
    assert same(whole, cut)


def test_a_killed_job_finds_its_folder_when_it_is_requeued(call, command, signal_at, tmp_path):
    assert call(main, *FAST, f"hydra.run.dir={tmp_path}/whole").status == 0
    job = {"SLURM_JOB_ID": "41", "PYTHONPATH": f"{TRAIN.parents[1]}{os.pathsep}{tmp_path}"}
    settings = (TRAIN, *FAST, *signal_at(3, 9))
    assert command(*settings, cwd=tmp_path, **job).returncode == -9
    (folder,) = (tmp_path / "outputs" / "smoke").iterdir()
    done = command(*settings, cwd=tmp_path, SLURM_RESTART_COUNT="1", **job)
    assert done.returncode == 0, done.stderr
    assert "Requeued by SLURM: going on with" in done.stdout
    assert list((tmp_path / "outputs" / "smoke").iterdir()) == [folder]
    assert folder.name.startswith("slurm-41")
    assert same(tmp_path / "whole", folder)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(command, signal_at, tmp_path):
    """Lightning starts the second one, and would kill the first if it took the stop for a crash."""
    settings = (*FAST, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    home = {"PYTHONPATH": f"{TRAIN.parents[1]}{os.pathsep}{tmp_path}"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(TRAIN, *settings, f"hydra.run.dir={whole}", **home).returncode == 0
    done = command(TRAIN, *settings, *signal_at(2, 15), f"hydra.run.dir={cut}", **home)
    assert done.returncode == 143, done.stderr
    assert done.stderr.count("Stopped by SIGTERM after step 3") == 1
    assert result_of(cut)["status"] == "interrupted"
    done = command(TRAIN, *settings, "resume=auto", f"hydra.run.dir={cut}", **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on with") == 1
    assert same(whole, cut)


def test_a_damaged_checkpoint_is_passed_over(smoke, tmp_path):
    folder, _ = smoke
    (tmp_path / "checkpoints").mkdir()
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "step00015.ckpt"))
    shutil.copy(folder / "checkpoints" / "last.ckpt", last)
    shutil.copy(folder / "checkpoints" / "last.ckpt", best)
    os.utime(best, (1, 1))
    assert checkpoint_in(tmp_path, "last") == checkpoint_in(tmp_path, None, "auto") == last
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt is passed over: its checksum is wrong"):
        assert checkpoint_in(tmp_path, "last") == best
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(LoraConfigError, match="no whole checkpoint"):
        checkpoint_in(tmp_path, "last")
    with pytest.warns(UserWarning, match=r"step00015\.ckpt is passed over: it is cut off"):
        assert checkpoint_in(tmp_path, None, "auto") is None


def test_what_lightning_saves_for_slurm_is_found(smoke, tmp_path):
    folder, _ = smoke
    shutil.copy(folder / "checkpoints" / "last.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    assert checkpoint_in(tmp_path, None, "auto") == tmp_path / "hpc_ckpt_1.ckpt"


def test_a_requeued_job_leaves_what_it_was_started_from_behind(smoke, monkeypatch, tmp_path):
    first = smoke[0] / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoint_in(tmp_path, str(first)) == first
    (tmp_path / "checkpoints").mkdir()
    own = shutil.copy(first, tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint_in(tmp_path, str(first)) == own


def test_without_a_checkpoint_auto_starts_anew_and_says_so(capsys, tmp_path):
    assert checkpoint_in(tmp_path, None, "auto") is None
    assert f"no whole checkpoint in {tmp_path} yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ckpt_path", "resume", "part"),
    [(None, "last", "auto or null"), (None, True, "auto or null"), ("some.ckpt", "auto", "leave one out")],
)
def test_what_contradicts_itself_is_told(tmp_path, ckpt_path, resume, part):
    with pytest.raises(LoraConfigError, match=part):
        checkpoint_in(tmp_path, ckpt_path, resume)
