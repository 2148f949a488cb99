import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_lightning.reports import SampleWriter
from lora_lightning.reports.texts import printable

pytestmark = pytest.mark.usefixtures("warm_starts")


def headings(path):
    return re.findall(r"^## (.*)$", path.read_text(), flags=re.MULTILINE)


def test_before_at_each_validation_and_after(module, data, make_trainer, tmp_path, capsys):
    before = module.generate_text([item.prompt for item in data.prompts])
    trainer = make_trainer(SampleWriter(), logger=CSVLogger(tmp_path / "run", name="", version=""))
    trainer.fit(module, datamodule=data)
    after = module.generate_text([item.prompt for item in data.prompts])
    text = (tmp_path / "run" / "samples.md").read_text()
    assert headings(tmp_path / "run" / "samples.md") == [
        "Before training (step 0)",
        "After 4 steps (step 4)",
        "After 8 steps (step 8)",
        "After training (step 8)",
    ]
    first, *_, last = text.split("\n## ")[1:]
    assert before != after
    assert all(f"**Written:** {each or '(nothing)'}" in first for each in before)
    assert all(f"**Written:** {each or '(nothing)'}" in last for each in after)
    assert "> minister [bold]\n> second line" in first
    assert text.count("**Reference:** [red] wins") == 4
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(each["title"], each["step"]) for each in records] == [
        ("Before training", 0),
        ("After 4 steps", 4),
        ("After 8 steps", 8),
        ("After training", 8),
    ]
    assert [each["written"] for each in records[0]["samples"]] == before
    assert [each["written"] for each in records[-1]["samples"]] == after
    assert records[0]["samples"][0]["prompt"] == "minister [bold]\nsecond line"
    assert [each["reference"] for each in records[0]["samples"]] == ["[red] wins", None]
    shown = capsys.readouterr().out
    assert "[red] wins" in shown  # brackets are not taken for markup
    assert "Before" in shown.rpartition("After training")[2]


def test_start_and_end_only(module, data, make_trainer, tmp_path):
    make_trainer(SampleWriter(every_validation=False)).fit(module, datamodule=data)
    assert headings(tmp_path / "samples.md") == ["Before training (step 0)", "After training (step 8)"]


def test_sanity_check_and_plain_validation_write_nothing(module, data, make_trainer, tmp_path):
    trainer = make_trainer(SampleWriter(), num_sanity_val_steps=2, limit_val_batches=2, max_epochs=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert not (tmp_path / "samples.md").exists()
    trainer.fit(module, datamodule=data)
    assert headings(tmp_path / "samples.md")[0] == "Before training (step 0)"
    assert len(headings(tmp_path / "samples.md")) == 3


def test_training_is_not_disturbed(module, data, make_trainer):
    """Shuffling and dropout draw random numbers; with samples written in between, weights are the same to the bit."""
    start = {name: value.clone() for name, value in module.state_dict().items()}
    results = []
    for callbacks in ([], [SampleWriter()]):
        module.load_state_dict(start)
        module.model.config.attention_dropout = 0.5
        for layer in module.model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        make_trainer(*callbacks).fit(module, datamodule=data)
        modes = {name: part.training for name, part in module.named_modules()}
        draws = torch.rand(1).item(), np.random.rand(), random.random()
        results.append(({name: value.clone() for name, value in module.state_dict().items()}, modes, draws))
    (weights, modes, draws), (other_weights, other_modes, other_draws) = results
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    assert modes == other_modes
    assert draws == other_draws


def test_a_resumed_run_goes_on(module, data, make_trainer, tmp_path):
    trainer = make_trainer(SampleWriter(), max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    make_trainer(SampleWriter(), max_epochs=2).fit(module, datamodule=data, ckpt_path=tmp_path / "at4.ckpt")
    assert headings(tmp_path / "samples.md")[2:] == [
        "After training (step 4)",
        "After 8 steps (step 8)",
        "After training (step 8)",
    ]


def test_nothing_without_prompts_or_a_writer(module, data, make_trainer, tmp_path, monkeypatch):
    data.prompts = []
    make_trainer(SampleWriter(), max_steps=1).fit(module, datamodule=data)
    make_trainer(SampleWriter(), max_steps=1).fit(module, data.train_dataloader(), data.val_dataloader())
    monkeypatch.delattr(type(module), "generate_text")
    data.prompts = [object()]
    make_trainer(SampleWriter(), max_steps=1).fit(module, datamodule=data)
    assert not (tmp_path / "samples.md").exists()


def test_other_processes_write_nothing(module, data, make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(SampleWriter(), max_steps=1)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.fit(module, datamodule=data)
    assert not (tmp_path / "samples.md").exists()


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import Data
from types import SimpleNamespace
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lora_lightning.reports import RunRecorder, SampleWriter
from lora_lightning.tasks import CausalLM

torch.set_num_threads(1)
recorder = RunRecorder()
data = Data([SimpleNamespace(prompt="the minister", shown="minister", reference=None)])
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[SampleWriter(), recorder],
    logger=CSVLogger("run", name="", version=""), enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=-1,
)
trainer.fit(CausalLM("demo:tiny-llama", max_new_tokens=4), datamodule=data)
recorder.write_result(f"result{trainer.global_rank}.json")
"""


def test_two_processes(tmp_path):
    """One process writes while the other waits, and nobody waits for ever."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert headings(tmp_path / "run" / "samples.md") == [
        "Before training (step 0)",
        "After 2 steps (step 2)",
        "After training (step 2)",
    ]
    first, second = (json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(2))
    assert first["val_loss"] == second["val_loss"] < first["val_loss_before"] == second["val_loss_before"]


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\nä 甲") == "a\ufffd[2Jb\ufffd\nä 甲"


def test_tensorboard(module, data, make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path / "board", name="", version="")
    make_trainer(SampleWriter(every_validation=False), logger=logger).fit(module, datamodule=data)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (before, after) = events.Tensors("samples/1/text_summary")
    assert (before.step, after.step) == (0, 8)
    assert b"[red] wins" in after.tensor_proto.string_val[0]


def test_wandb(module, data, make_trainer, tmp_path, wandb_offline):
    logger = WandbLogger(save_dir=tmp_path)
    make_trainer(SampleWriter(every_validation=False), logger=logger).fit(module, datamodule=data)
    logger.experiment.finish()
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("samples_*.table.json")]
    assert len(tables) == 2
    assert {tuple(table["columns"]) for table in tables} == {("step", "prompt", "written", "reference")}
    before, after = sorted((table["data"] for table in tables), key=lambda rows: rows[0][0])
    assert [row[0] for row in before + after] == [0, 0, 8, 8]
    assert [row[1] for row in after] == ["minister [bold]\nsecond line", "team"]
    assert [row[2] for row in after] == module.generate_text([item.prompt for item in data.prompts])
    assert [row[3] for row in before] == ["[red] wins", None]
