"""A Hydra app of somebody's whose jobs are quadratics, and searches of it as a user starts them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import lora_lightning

# Hydra's own logging would stay configured in the test process.
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")
ROOT = Path(lora_lightning.__file__).parents[1]
APP = """
import math, os, time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

SETTINGS = {"x": 0.0, "y": 1e-2, "kind": "a", "r": 8, "alpha": 16, "returns": "value", "fails": ""}
ConfigStore.instance().store("settings", SETTINGS)


@hydra.main(version_base="1.3", config_path=None, config_name="settings")
def main(cfg):
    hydra_cfg = HydraConfig.get()
    started = Path(hydra_cfg.sweep.dir) / "started"
    with started.open("a") as log:
        print(hydra_cfg.job.num, *hydra_cfg.overrides.task, file=log)
    if len(started.read_text().splitlines()) == int(os.environ.get("STALL_AT", 0)):
        time.sleep(600)
    if cfg.kind in cfg.fails:
        raise RuntimeError(f"kind {cfg.kind} is not to my taste")
    value = (cfg.x - 2) ** 2 + (math.log10(cfg.y) + 3) ** 2 + (cfg.kind != "b") + abs(cfg.r - cfg.alpha)
    nan = math.nan if cfg.kind == "a" else value
    several = [value, -cfg.x]
    return value if cfg.returns == "value" else {"several": several, "nothing": None, "not": nan}[cfg.returns]


if __name__ == "__main__":
    main()
"""


class Searched(NamedTuple):
    """A search that has been run."""

    status: int
    screen: str
    folder: Path

    @property
    def started(self) -> list[list[str]]:
        """The number and the overrides of each job, as often as it was started."""
        return [line.split() for line in (self.folder / "started").read_text().splitlines()]

    def trials(self):
        """The trials of its study."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        return optuna.load_study(study_name=None, storage=storage).trials


@pytest.fixture
def begin(tmp_path) -> Callable[..., tuple[list[str], dict, Path]]:
    """begin(*arguments, folder='sweep'): the command of a search, its keywords for subprocess, its folder."""
    app = tmp_path / "app.py"
    app.write_text(APP, encoding="utf-8")

    def make(*arguments: str, folder: str = "sweep"):
        command = [sys.executable, str(app), "-m", f"hydra.sweep.dir={tmp_path / folder}", *arguments]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_", "PYTEST"))}
        environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        return command, {"env": environment, "cwd": tmp_path, "stdin": subprocess.DEVNULL}, tmp_path / folder

    return make


@pytest.fixture
def search(begin, monkeypatch, capsys) -> Callable[..., Searched]:
    """search(*arguments, folder='sweep'): run a search to its end, in this process, which spares imports."""

    def run(*arguments: str, folder: str = "sweep") -> Searched:
        [_, app, *words], _, where = begin(*arguments, folder=folder)
        monkeypatch.setattr(sys, "argv", [app, *words, *QUIET])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        try:
            runpy.run_path(app, run_name="__main__")
            status = 0
        except SystemExit as left:
            status = left.code
        return Searched(status, "".join(capsys.readouterr()), where)

    return run
