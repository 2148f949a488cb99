"""progress.json, as a reader outside the process finds it while a fit goes on."""

from __future__ import annotations

import json
import os
import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning.sweeps.status import StatusFile

KEYS = {"step", "steps", "loss", "val_loss", "seconds", "seconds_left", "time"}


class Net(pl.LightningModule):
    def __init__(self, loss=1.5):
        super().__init__()
        self.net, self.loss = nn.Linear(2, 2), loss

    def training_step(self, batch, _):
        self.log("train_loss", self.loss)
        return self.net(batch).sum()

    def validation_step(self, batch, _):
        self.log("val_loss", 2.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reader(pl.Callback):
    """Reads the file at the end of each step, behind the callback that writes it."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_train_batch_end(self, *args):
        self.seen.append(json.loads(self.path.read_text()))


@pytest.fixture
def fit(tmp_path):
    rows = DataLoader(torch.ones(8, 2), batch_size=2)

    def run(status, *, module=None, ckpt_path=None, **settings):
        reader = Reader(status.path)
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[status, reader],
            **{"max_epochs": 2, "num_sanity_val_steps": 0} | settings,
        )
        trainer.fit(module or Net(), rows, rows, ckpt_path=ckpt_path)
        return trainer, reader.seen

    return run


def test_it_says_how_far_a_fit_is(fit, tmp_path):
    before = time.time()
    _, seen = fit(StatusFile(tmp_path / "job", every=0.0))
    assert [each["step"] for each in seen] == list(range(1, 9))
    assert all(set(each) == KEYS and each["steps"] == 8 and each["loss"] == 1.5 for each in seen)
    assert seen[0]["val_loss"] is None
    assert seen[-1]["val_loss"] == 2.5
    for each in seen:
        assert each["seconds_left"] == pytest.approx(each["seconds"] / each["step"] * (8 - each["step"]))
        assert before <= each["time"] <= time.time()
    last = json.loads((tmp_path / "job" / "progress.json").read_text())
    assert (last["step"], last["seconds_left"]) == (8, 0)
    assert os.listdir(tmp_path / "job") == ["progress.json"]  # nothing half-written beside it


def test_steps_between_two_writes_are_not_written(fit, tmp_path):
    _, seen = fit(StatusFile(tmp_path, every=1e6), limit_val_batches=0)
    assert [each["step"] for each in seen] == [0] * 8
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 8


def test_a_resumed_fit_counts_its_own_steps_only(fit, tmp_path):
    trainer, _ = fit(StatusFile(tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    status = StatusFile(tmp_path, every=0.0)
    _, seen = fit(status, ckpt_path=tmp_path / "half.ckpt")
    assert [each["step"] for each in seen] == [5, 6, 7, 8]
    assert seen[0]["seconds_left"] == pytest.approx(seen[0]["seconds"] * 3)


def test_what_is_no_number_and_what_nobody_knows_is_null(fit, tmp_path):
    settings = {"max_epochs": -1, "limit_val_batches": 0}

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 3

    status = StatusFile(tmp_path, every=0.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[status, Stop()],
        **settings,
    )
    trainer.fit(Net(loss=float("nan")), DataLoader(torch.ones(8, 2), batch_size=2))
    left = json.loads(status.path.read_text(), parse_constant=pytest.fail)
    assert (left["step"], left["steps"], left["loss"], left["seconds_left"]) == (3, None, None, None)


def test_the_log_has_a_line_for_each_validation(fit, tmp_path, capsys):
    fit(StatusFile(tmp_path), num_sanity_val_steps=-1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "val_loss" in line]
    assert len(lines) == 3
    assert lines[0].startswith("before training, val_loss 2.5000")
    assert lines[1].startswith("step 4/8, loss 1.5000, val_loss 2.5000")
    assert max(map(len, lines)) < 100


def test_a_file_that_cannot_be_written_does_not_end_the_training(fit, tmp_path):
    (tmp_path / "job").write_text("a file where the folder should be")
    status = StatusFile(tmp_path / "job", every=0.0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, callbacks=[status])
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        trainer.fit(Net(), DataLoader(torch.ones(8, 2), batch_size=2))
    assert trainer.global_step == 4
    assert len([each for each in caught if "cannot be written" in str(each.message)]) == 1
