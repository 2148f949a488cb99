"""Ten kills of a run that saves at every step; `benchmarks/faults.py` alone does two hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lora_lightning

ROOT = Path(lora_lightning.__file__).parents[1]


def test_no_kill_and_no_damage_loses_a_run():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "10", "--seed", "2"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    files = json.loads(done.stdout)["files"]
    assert files["kills"] == 10
    assert files["resumed"] > 0
    assert files["damaged"] == files["damaged_refused"] > 0
    assert files["runs"] == files["runs_equal"] > 0
