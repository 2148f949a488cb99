from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

import lora_lightning

ROOT = Path(lora_lightning.__file__).parents[1]
# Hydra's own logging would stay configured in the test process.
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> Run:
    """Runs Python with arguments in an empty folder, as a user would, with one thread and no network.

    ``python=warm_python`` starts it with torch, Lightning and transformers imported.
    """
    home = tmp_path_factory.mktemp("somewhere")

    def run(
        *arguments: str | Path, cwd: Path = home, timeout: float = 500, python: str | None = None, **environment: str
    ):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_", "PYTEST"))}
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        return subprocess.run(
            [python or sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=clean | settings | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


class Called(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., Called]:
    """Calls a `main` with arguments in this process, which spares the imports of a new one."""
    # Training sets these; given once here, they are taken back after the test.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "160")

    def run(main: Callable[[], None], *arguments: str | Path) -> Called:
        monkeypatch.setattr(sys, "argv", ["scripts/program.py", *map(str, arguments), *QUIET])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as left:
            status = left.code
        return Called(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def smoke(command, warm_python, tmp_path_factory) -> tuple[Path, str]:
    """Folder and screen of `scripts/train.py experiment=smoke lora.r=64 lora.use_rslora=true`, run once for all."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in a common one
        shared = shared.parent
    folder, screen = shared / "smoke" / "run", shared / "smoke" / "screen.txt"
    with FileLock(shared / "smoke.lock"):
        if not screen.exists():
            done = command(
                ROOT / "scripts" / "train.py",
                "experiment=smoke",
                "lora.r=64",
                "lora.use_rslora=true",
                "logger=wandb",
                f"hydra.run.dir={folder}",
                python=warm_python,
                WANDB_MODE="offline",
                WANDB_DIR=str(folder.parent),
                WANDB_CACHE_DIR=str(folder.parent / "cache"),
                WANDB_DATA_DIR=str(folder.parent / "data"),
                WANDB_SILENT="true",
            )
            assert done.returncode == 0, done.stderr
            screen.write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder, screen.read_text(encoding="utf-8")
