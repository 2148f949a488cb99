"""What a training needs from elsewhere, had beforehand: by one process or several at once."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from lora_lightning.cli import prepare, train
from tests.cli.conftest import ROOT

SCRIPT = ROOT / "scripts" / "prepare.py"
FAST = ("experiment=smoke", "data.rows=32", "data.val_rows=8")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_lightning"


def _folders(folder):
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


def test_several_at_once_make_one_model_and_one_folder_of_rows(tmp_path, cache, warm_python):
    """Nothing half-made is ever read: all say the same, and what lies there trains."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen([warm_python, SCRIPT, *FAST], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    (model,), (rows,) = _folders(cache / "models"), _folders(cache / "data")
    for each in told:
        assert f"Model demo:tiny-llama: {model} (" in each
        assert re.search(rf"Rows of TinyText: {rows} \(.*B\): 32 for training and 8 for validation", each)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache"]  # no folder of a run


def test_rows_made_ready_are_those_that_a_training_reads(call, cache, tmp_path, monkeypatch):
    assert call(prepare.main, *FAST).status == 0
    (rows,) = _folders(cache / "data")
    before = rows.stat().st_mtime_ns
    monkeypatch.setenv("LORA_LIGHTNING_SWEEP", str(tmp_path / "sweep"))
    done = call(train.main, *FAST, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/sweep/0")
    assert done.status == 0, done.stderr
    assert _folders(cache / "data") == [rows]
    assert rows.stat().st_mtime_ns == before


def test_what_is_not_kept_is_said(call, cache, tmp_path):
    assert "not tokenised beforehand, as data.cache=false says" in call(prepare.main, *FAST, "data.cache=false").stdout
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    stream = call(prepare.main, "experiment=own", "model=tiny_llama", f"data.path={rows}", "data.streaming=true")
    assert "not tokenised beforehand, this data set is read in training" in stream.stdout
    assert not _folders(cache / "data")


def test_a_mistake_is_told(call, cache):
    assert "did you mean data.batch_size?" in call(prepare.main, *FAST, "data.batch_siz=2").stderr
    missing = call(prepare.main, "experiment=own", "model=tiny_llama", "data.path=nowhere.jsonl")
    assert missing.status == 1
    assert "nowhere.jsonl" in missing.stderr
    sweep = call(prepare.main, *FAST, "-m", "seed=1,2")
    assert sweep.status == 1
    assert "A sweep prepares what its jobs need by itself" in sweep.stderr


def test_it_is_a_command_of_the_package(command):
    help_text = command("-c", "from lora_lightning.cli.main import main; main()", "--help").stdout
    assert "  prepare  " in help_text
