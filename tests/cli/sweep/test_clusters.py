"""Launchers for clusters: their settings, what is told where they are not installed, and real sweeps under them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lora_lightning.cli import clusters
from lora_lightning.cli.overrides import check_command
from lora_lightning.cli.told import CommandError
from tests.cli.conftest import ROOT

TRAIN = ROOT / "scripts" / "train.py"
PLUGINS = {"ray": "hydra_ray_launcher", "submitit_slurm": "hydra_submitit_launcher"}
PLUGINS["submitit_local"] = PLUGINS["submitit_slurm"]
GRID = (
    *("-m", "experiment=smoke", "callbacks=minimal", "trainer=ddp", "trainer.accelerator=cpu"),
    *("trainer.devices=2", "trainer.max_steps=3", "data.rows=32", "data.val_rows=8"),
    *("lora.r=2,4", "learning_rate=1e-2,1e-3", "hydra.sweep.dir=out"),
)


def _there(launcher: str) -> bool:
    return find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is not None


@pytest.fixture
def launcher_of():
    """The settings of a launcher, as it gets them: launcher_of("ray", "trainer=cpu")."""

    def get(launcher: str, *overrides: str):
        if not _there(launcher):
            pytest.skip(f"{PLUGINS[launcher]} is not installed")
        GlobalHydra.instance().clear()
        words = [f"hydra/launcher={launcher}", *overrides]
        with initialize_config_module("lora_lightning.conf", version_base="1.3"):
            cfg = compose("train", overrides=words, return_hydra_config=True)
            node = cfg.hydra.launcher
            plain = {}
            for key in node:
                if key != "submitit_folder":  # of a sweep's folder, which there is none of here
                    part = node[key]
                    plain[key] = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
            return OmegaConf.create(plain)

    yield get
    GlobalHydra.instance().clear()


@pytest.mark.filterwarnings("ignore:\\s*'hydra/launcher")
class TestSettings:
    @pytest.mark.parametrize(
        ("overrides", "gpus"),
        [
            (["trainer=gpu"], 1),
            (["trainer=ddp", "trainer.devices=4"], 4),
            (["trainer=ddp"], 1),
            (["trainer=cpu"], None),
            (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"], None),
        ],
    )
    def test_slurm_is_asked_for_the_gpus_that_the_trainer_uses(self, launcher_of, overrides, gpus):
        asked = launcher_of("submitit_slurm", *overrides)
        assert (asked.gpus_per_node, asked.tasks_per_node, asked.nodes) == (gpus, 1, 1)

    def test_ray_is_asked_for_what_there_is(self, launcher_of, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
        two = launcher_of("ray", "trainer=ddp", "trainer.devices=2").ray.remote
        assert (two.num_gpus, two.num_cpus, two.max_retries) == (2, 2, 0)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert launcher_of("ray").ray.remote.num_gpus is None
        assert launcher_of("ray", "trainer.accelerator=cpu", "trainer.devices=2").ray.remote.num_cpus == 2

    def test_every_setting_of_the_plugin_can_be_set_without_a_plus(self, launcher_of):
        if not _there("submitit_slurm"):
            pytest.skip("not installed")
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        for launcher, plugin in (("submitit_slurm", SlurmQueueConf), ("submitit_local", LocalQueueConf)):
            assert set(launcher_of(launcher)) | {"submitit_folder"} == set(OmegaConf.structured(plugin))


@pytest.mark.parametrize(
    ("launcher", "extra"), [("ray", "ray"), ("submitit_slurm", "slurm"), ("submitit_local", "slurm")]
)
def test_a_launcher_that_is_not_installed_is_told_with_what_to_install(monkeypatch, launcher, extra):
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=rf"pip install 'lora-lightning\[{extra}\]'"):
        check_command(["train.py", "-m", f"hydra/launcher={launcher}", "lora.r=1,2"], "train")
    check_command(["train.py", "-m", "hydra/launcher=lora_local", "lora.r=1,2"], "train")


def _results(folder: Path) -> list[dict]:
    numbers = sorted(int(path.name) for path in folder.iterdir() if (path / "result.json").is_file())
    return [json.loads((folder / str(number) / "result.json").read_text()) for number in numbers]


def _sweep(command, folder: Path, *words: str, **environment: str) -> list[dict]:
    folder.mkdir()
    cache = str(folder.parent / "cache")
    done = command(TRAIN, *GRID, *words, cwd=folder, XDG_CACHE_HOME=cache, HOME=str(folder.parent), **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "4 jobs: 4 finished" in done.stdout
    assert "UserWarning" not in done.stderr
    return _results(folder / "out")


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory) -> list[dict]:
    """The results under ``lora_local``."""
    return _sweep(command, tmp_path_factory.mktemp("clusters") / "local")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("submitit_local", ()),
        ("ray", ("hydra.launcher.ray.init.num_cpus=4", "hydra.launcher.ray.remote.num_cpus=2")),
    ],
)
def test_a_grid_with_two_processes_a_job_is_that_of_lora_local(command, tmp_path, expected, launcher, settings):
    """Ray with two workers; submitit with all four jobs at once."""
    if not _there(launcher):
        pytest.skip(f"{PLUGINS[launcher]} is not installed")
    found = _sweep(command, tmp_path / launcher, f"hydra/launcher={launcher}", *settings, RAY_AUTH_MODE="disabled")
    assert len({each["val_loss"] for each in found}) == 4
    for mine, other in zip(found, expected, strict=True):
        assert mine["overrides"] == other["overrides"]
        assert (mine["val_loss"], mine["steps"]) == (other["val_loss"], other["steps"])
    out = tmp_path / launcher / "out"
    about = json.loads((out / "sweep.json").read_text())
    assert [job["folder"] for job in about["jobs"]] == ["0", "1", "2", "3"]
    assert about["overrides"] == [word for word in GRID[1:] if not word.startswith("hydra.")]
    assert (out / "sweep.md").is_file()


def test_a_job_on_several_machines_would_wait_for_ever_and_is_refused(command, tmp_path):
    words = ("-m", "experiment=smoke", "hydra/launcher=basic", "trainer.num_nodes=2", "hydra.sweep.dir=out")
    done = command(TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "trainer.num_nodes=2, and a job of a sweep runs on one machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_another_launcher_would_pass_over_is_refused(command, tmp_path):
    words = ("-m", "experiment=smoke", "hydra/launcher=basic", "lora.r=2,4", "hydra.sweep.dir=out")
    ours = ("sweep.dry_run=true", "sweep.fail_fast=true", "sweep.jobs_per_device=2")
    done = command(TRAIN, *words, *ours, cwd=tmp_path)
    assert done.returncode == 1
    assert f"{', '.join(ours)}: only hydra/launcher=lora_local and lora_packed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_hydras_own_launcher_gets_a_report_too_and_keeps_to_its_sweep(command, tmp_path):
    words = (
        "-m",
        "experiment=smoke",
        "callbacks=minimal",
        "trainer.max_steps=2",
        "data.rows=16",
        "hydra/launcher=basic",
    )
    settings = {"cwd": tmp_path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = command(TRAIN, *words, "lora.r=2,999999999", "hydra.sweep.dir=out", **settings)
    assert done.returncode != 0  # the second one cannot be made
    assert "2 jobs: 1 finished, 1 failed" in done.stdout
    other = command(TRAIN, *words, "lora.r=2", "seed=1,2", "hydra.sweep.dir=out", **settings)
    assert other.returncode != 0
    assert "is the folder of another sweep" in other.stdout + other.stderr
    assert [each["seed"] for each in _results(tmp_path / "out")][:1] == [0]
