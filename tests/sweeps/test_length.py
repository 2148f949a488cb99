"""Steps and validation batches, against what real Trainers do."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning.sweeps.length import Length, length


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.validated, self.validated_at = nn.Linear(1, 1), 0, None

    def training_step(self, batch, _):
        return self.net(batch).sum()

    def validation_step(self, batch, _):
        self.validated += 1

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _really(trainer, batches, val_batches):
    """What a run does, with the validation behind the fit where its last step has had none."""
    module = Net()
    rows, val_rows = (DataLoader(torch.ones(count, 1), batch_size=1) for count in (batches, val_batches))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = pl.Trainer(accelerator="cpu", logger=False, **quiet, **trainer)
    fit.fit(module, rows, val_rows)
    if module.validated_at != fit.global_step:
        fit.validate(module, val_rows, verbose=False)
    return Length(fit.global_step, module.validated)


@st.composite
def runs(draw):
    batches = draw(st.integers(1, 9))
    across = draw(st.booleans())
    interval = st.integers(1, 12 if across else batches)
    trainer = {
        "max_steps": draw(st.sampled_from([-1, 1, 4, 7, 20])),
        "max_epochs": draw(st.integers(1, 3)),
        "accumulate_grad_batches": draw(st.integers(1, 3)),
        "val_check_interval": draw(interval if across else interval | st.sampled_from([0.25, 0.5, 1.0])),
        "check_val_every_n_epoch": None if across else draw(st.integers(1, 2)),
        "num_sanity_val_steps": draw(st.sampled_from([-1, 0, 2])),
    }
    return trainer, batches, draw(st.integers(1, 3))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(runs())
def test_a_run_is_as_long_as_a_trainer_makes_it(run):
    trainer, batches, val_batches = run
    if isinstance(trainer["val_check_interval"], float) and batches * trainer["val_check_interval"] < 1:
        return  # Lightning refuses
    assert length(trainer, batches, val_batches) == _really(trainer, batches, val_batches)


@pytest.mark.parametrize(
    ("trainer", "batches", "expected"),
    [
        ({"max_steps": 100, "max_epochs": -1, "val_check_interval": 40, "check_val_every_n_epoch": None}, None, 100),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}, 10, 8),
        ({"max_steps": 5, "max_epochs": 2}, 10, 5),
        ({"max_steps": -1, "max_epochs": -1}, 10, None),
        ({"max_steps": -1, "max_epochs": 3}, None, None),
    ],
)
def test_steps_where_they_can_be_known(trainer, batches, expected):
    found = length(trainer, batches, 7)
    assert (None if found is None else found.steps) == expected


@pytest.mark.parametrize(("limit", "whole"), [(None, 10), (3, 3), (30, 10), (0.5, 5), (1.0, 10), (0, 0)])
def test_a_limit_on_validation(limit, whole):
    trainer = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": limit, "num_sanity_val_steps": -1}
    assert length(trainer, 4, 10) == Length(4, 2 * whole)
