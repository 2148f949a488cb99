"""Why a fit ended early, in words, after real fits."""

from __future__ import annotations

from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning.cli.ended import ended_by


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch, _):
        return self.net(batch).sum()

    def validation_step(self, batch, _):
        self.log("val_loss", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stopping(pl.Callback):
    def __init__(self, step, reason=None):
        self.step, self.reason, self.ended_by = step, reason, None

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.should_stop, self.ended_by = True, self.reason


@pytest.mark.parametrize(
    ("callbacks", "reason"),
    [
        ([], None),
        ([EarlyStopping("val_loss", patience=1)], "early stopping"),
        ([EarlyStopping("val_loss", patience=100)], None),
        ([EarlyStopping("val_loss", patience=1), Stopping(1, "pruned at step 1")], "pruned at step 1"),
        ([Stopping(3)], "a callback at step 3"),
        ([EarlyStopping("val_loss", patience=100), Stopping(3)], "a callback at step 3"),
        ([Stopping(16, "too late")], None),
        ([Timer(timedelta(microseconds=1))], "max_time at step 1"),
    ],
)
def test_the_reason_of_a_fit(tmp_path, callbacks, reason):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    rows = DataLoader(torch.ones(8, 2), batch_size=2)
    trainer.fit(Net(), rows, rows)
    assert ended_by(trainer) == reason


def test_a_run_that_never_got_a_trainer_has_no_reason():
    assert ended_by(None) is None
