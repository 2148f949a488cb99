"""Real sweeps of ``scripts/train.py``: right under DDP, and after they were killed half-way."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_starts")]
TRAIN = ROOT / "scripts" / "train.py"
SHORT = ["experiment=smoke", "callbacks=minimal", "logger=csv"]
_SEEN = """
    import json, os
    from pathlib import Path
    from lightning.pytorch import Callback
    from lora_lightning import LoraCallback

    class Seen(Callback):
        '''Leaves what each process really trains with.'''

        def on_train_end(self, trainer, pl_module):
            lora = next(each for each in trainer.callbacks if isinstance(each, LoraCallback))
            seen = {
                "world": trainer.world_size,
                "r": lora.report.rows[0].r,
                "lr": trainer.optimizers[0].defaults["lr"],
                "seed": int(os.environ["PL_GLOBAL_SEED"]),
                "job": os.environ["LORA_LIGHTNING_JOB"],
            }
            folder = Path(trainer.default_root_dir)
            (folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(seen))
"""


@pytest.fixture
def sweep(tmp_path):
    """Starts a sweep in a folder: sweep("out", "lora.r=2,4")."""
    (tmp_path / "seen.py").write_text("\n".join(line[4:] for line in _SEEN.splitlines()))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def start(folder: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), "-m", *SHORT, *words, f"hydra.sweep.dir={folder}"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.parametrize("launcher", ["lora_local", "basic"])
def test_every_process_of_a_ddp_job_trains_that_job(sweep, tmp_path, launcher):
    grid = list(itertools.product((2, 4), (1e-2, 3e-3)))
    started = sweep(
        "out",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.max_steps=3",
        "trainer.val_check_interval=3",
        "lora.r=2,4",
        "learning_rate=1e-2,3e-3",
        "seed=5",
        "+callbacks.seen._target_=seen.Seen",
        f"hydra/launcher={launcher}",
    )
    told, _ = started.communicate(timeout=500)
    assert started.returncode == 0, told
    losses = set()
    for number, (rank, rate) in enumerate(grid):
        folder = tmp_path / "out" / str(number)
        seen = [json.loads((folder / f"seen{each}.json").read_text()) for each in range(2)]
        assert seen == [{"world": 2, "r": rank, "lr": rate, "seed": 5, "job": str(number)}] * 2
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "finished"
        losses.add(result["val_loss"])
    assert len(losses) == 4
    assert not (tmp_path / "outputs").exists()  # no process has begun a sweep of its own
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.isdigit()) == ["0", "1", "2", "3"]


def test_a_killed_sweep_ends_with_the_results_of_one_that_was_not(sweep, tmp_path):
    words = ["lora.r=2,4,8", "trainer.max_steps=300", "trainer.val_check_interval=50"]
    undisturbed = sweep("whole", *words)
    told, _ = undisturbed.communicate(timeout=500)
    assert undisturbed.returncode == 0, told

    killed = sweep("killed", *words)
    progress = tmp_path / "killed" / "1" / "progress.json"
    while not progress.exists() or not 0 < json.loads(progress.read_text())["step"] < 250:
        assert killed.poll() is None
        assert not (tmp_path / "killed" / "2").exists(), "too late"
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = (tmp_path / "killed" / "0" / "result.json").stat().st_mtime_ns

    again = sweep("killed", *words)
    told, _ = again.communicate(timeout=500)
    assert again.returncode == 0, told
    assert "1 of 3 jobs" in told
    assert (tmp_path / "killed" / "0" / "result.json").stat().st_mtime_ns == finished
    assert "resume=auto: going on with" in (tmp_path / "killed" / "1" / "job.log").read_text()
    assert (tmp_path / "killed" / "2" / "job.log").read_text().count("Run folder") == 1
    assert _table(tmp_path / "killed") == _table(tmp_path / "whole")


def _table(folder: Path) -> list[dict[str, str]]:
    """A sweep's table without what is another each time."""
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    differ = (
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "folder",
        "adapter",
        "adapter_path",
        "best_adapter_path",
    )
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]
