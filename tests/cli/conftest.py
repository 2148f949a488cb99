from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_lightning
import pytest

ROOT = Path(lora_lightning.__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> Run:
    """Runs Python with arguments in an empty folder, as a user would, with one thread and no network."""
    home = tmp_path_factory.mktemp("somewhere")

    def run(*arguments: str | Path, cwd: Path = home, timeout: float = 240, **environment: str):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_", "PYTEST"))}
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=clean | settings | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def smoke(command, tmp_path_factory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """The folder and the output of `scripts/train.py experiment=smoke lora.r=64 lora.use_rslora=true`."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = command(
        ROOT / "scripts" / "train.py",
        "experiment=smoke",
        "lora.r=64",
        "lora.use_rslora=true",
        "logger=wandb",
        f"hydra.run.dir={folder}",
        WANDB_MODE="offline",
        WANDB_DIR=str(folder.parent),
        WANDB_CACHE_DIR=str(folder.parent / "cache"),
        WANDB_DATA_DIR=str(folder.parent / "data"),
        WANDB_SILENT="true",
    )
    assert done.returncode == 0, done.stderr
    return folder, done
