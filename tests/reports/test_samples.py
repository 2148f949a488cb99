import random
import re

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_lightning.reports import SampleWriter


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


def test_tensorboard(module, data, make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path / "board", name="", version="")
    make_trainer(SampleWriter(every_validation=False), logger=logger).fit(module, datamodule=data)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (before, after) = events.Tensors("samples/1/text_summary")
    assert (before.step, after.step) == (0, 8)
    assert b"[red] wins" in after.tensor_proto.string_val[0]


def test_wandb(module, data, make_trainer, monkeypatch, tmp_path):
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    logged = []
    monkeypatch.setattr(WandbLogger, "experiment", object())
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda *_, **__: None)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda *_, **__: None)
    monkeypatch.setattr(WandbLogger, "log_graph", lambda *_, **__: None)
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, columns, data: logged.append((key, columns, data)))
    monkeypatch.setattr(WandbLogger, "finalize", lambda *_, **__: None)
    make_trainer(SampleWriter(every_validation=False), logger=logger).fit(module, datamodule=data)
    (_, columns, rows), (_, _, last) = logged
    assert columns == ["step", "prompt", "written", "reference"]
    assert [row[0] for row in rows + last] == [0, 0, 8, 8]
    assert rows[0][3] == "[red] wins"
