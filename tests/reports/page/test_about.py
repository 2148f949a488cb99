"""What a run says of itself as it begins."""

import json
import platform
import subprocess
import sys

import torch
from lightning.pytorch import Callback

import lora_lightning
from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.reports.page import AboutRun
from lora_lightning.reports.page.about import git_commit
from tests.reports.conftest import data, make_trainer, module  # noqa: F401  # fixtures


class FolderSeen(Callback):
    """Notes whether the file is there before the first step."""

    def __init__(self, path):
        self.path, self.there = path, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.there = self.path.is_file()


def test_written_before_the_first_step(module, data, make_trainer, tmp_path):  # noqa: F811
    path = tmp_path / "run" / "about.json"
    seen = FolderSeen(path)
    about = AboutRun(path.parent, ["lora.r=4", "data.path=my rows.jsonl"], "python mine.py")
    make_trainer(LoraCallback(LoraConfig(r=4)), about, seen, max_epochs=2).fit(module, datamodule=data)
    assert seen.there
    told = json.loads(path.read_text())
    assert told["planned_steps"] == 8
    assert told["command"] == "python mine.py"
    assert told["overrides"] == ["lora.r=4", "data.path=my rows.jsonl"]
    trains = sum(each.numel() for each in module.parameters() if each.requires_grad)
    assert told["adapted"]["trainable_parameters"] == trains
    assert sum(int(each["parameters"].replace(",", "")) for each in told["adapted"]["layers"]) == trains
    assert told["environment"]["torch"] == torch.__version__
    assert told["environment"]["python"] == platform.python_version()
    assert told["environment"]["lora_lightning"] == lora_lightning.__version__


def test_the_command_of_a_script_of_ones_own_tells_nothing_but_its_settings(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my train.py", "--token", "secret"])
    assert AboutRun("run").command == "python 'my train.py'"
    assert AboutRun("run", ["lora.r=4"]).command == "python 'my train.py' lora.r=4"


def test_git_commit(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments):
        settings = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "--short=10", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == git("rev-parse", "--short=10", "HEAD") + " with changes"
