from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn

from lora_lightning.cli.sweep import launch
from lora_lightning.cli.sweep.command import JobFailed
from tests.cli.conftest import ROOT

LOCAL = ("hydra/launcher=lora_local", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.sweep.dir=out")

_SCRIPT = """
    import os, time
    import hydra

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        print("attempt", cfg.x, cfg.y, "job", cfg.place, flush=True)
        if cfg.wait_for and cfg.x >= 2:
            while not os.path.exists(cfg.wait_for):
                time.sleep(0.05)
        if cfg.x == cfg.fails:
            raise ValueError("no luck today")
        return cfg.x * cfg.y

    if __name__ == "__main__":
        main()
"""
_CONFIG = """
    x: 1
    y: 2
    place: ${hydra:job.num} of ${hydra:sweep.dir}
    fails: null
    wait_for: null
    trainer:
      accelerator: cpu
      devices: 1
"""


@pytest.fixture
def app(tmp_path, monkeypatch) -> Path:
    """Somebody's own Hydra script, which knows nothing of this package; the test stands in its folder.

    It returns ``x * y`` and fails where ``x`` is ``fails``; from ``x=2`` on it waits for a file where one is named.
    """
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(dedent(_CONFIG))
    script = tmp_path / "app.py"
    script.write_text(dedent(_SCRIPT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return script


@pytest.fixture
def multirun(app, monkeypatch) -> Iterator[Callable[..., list[JobReturn]]]:
    """Runs the script's sweep from this process, its jobs in real ones: multirun("x=1,2") gives what they returned."""
    state = Singleton.get_state()
    returned: list[JobReturn] = []

    real = launch.launch

    def launched(*arguments, **options):
        returned[:] = real(*arguments, **options)
        return returned

    monkeypatch.setattr(launch, "launch", launched)

    def run(*overrides: str) -> list[JobReturn]:
        returned.clear()
        words = [*overrides, *LOCAL]
        monkeypatch.setattr(sys, "argv", [str(app), "-m", *words])
        GlobalHydra.instance().clear()
        search_path = create_automatic_config_search_path(str(app), None, "conf")
        hydra = Hydra.create_main_hydra2("app", search_path)
        with contextlib.suppress(JobFailed):  # the sweeper asks for all values, and the first that failed ends it
            hydra.multirun("config", None, [*words, "hydra.mode=MULTIRUN"], with_log_configuration=False)
        return returned

    yield run
    GlobalHydra.instance().clear()
    Singleton.set_state(state)


@pytest.fixture
def start(app) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as a user does: start("-m", "x=1,2")."""

    def run(*words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(app), *words, *LOCAL],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run
