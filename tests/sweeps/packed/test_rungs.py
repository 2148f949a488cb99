"""A job's side of successive halving, in a real fit whose other jobs are a line of code."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.packed.baton import Player
from lora_lightning.sweeps.packed.context import Context
from lora_lightning.sweeps.packed.halving import Place, Plan
from lora_lightning.sweeps.packed.rungs import Rungs


class Measured(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().validation_step(batch, batch_idx)["x"])


class WithoutRows(Measured):
    def val_dataloader(self):
        return []


def fit(folder, *, stays=True, task=Measured, max_steps=16, saving=None, **settings):
    """Fit 16 steps, whose rungs are at 2, 4 and 8; what was handed in, and the trainer."""
    handed = []

    def work(player):
        rungs = Rungs(player, Plan(first=0.125), "val_loss", folder)
        trainer = Trainer(
            max_steps=max_steps, accelerator="cpu", callbacks=[rungs, *([saving] if saving else [])], logger=False,
            enable_checkpointing=saving is not None,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **settings,
        )  # fmt: skip
        handed.append((trainer, rungs))
        trainer.fit(task())

    player = Player(0, work, Context())
    player.play()
    requests = []
    while not player.ended:
        requests.append((player.request.rung, handed[0][0].global_step))
        player.play(Place(1, 1, stays))
    if player.error is not None:
        raise player.error
    return requests, *handed[0]


def test_each_rung_brings_a_validation_and_is_reported_once(tmp_path):
    requests, trainer, rungs = fit(tmp_path, val_check_interval=16, num_sanity_val_steps=0)
    assert requests == [(0, 2), (1, 4), (2, 8)]
    assert trainer.global_step == 16
    assert rungs.ended_by is None
    assert len(json.loads((tmp_path / "rungs.json").read_text())["values"]) == 3


def test_whoever_is_among_the_worse_ends_there(tmp_path):
    requests, trainer, rungs = fit(tmp_path, stays=False, accumulate_grad_batches=2)
    assert requests == [(0, 2)]
    assert trainer.global_step == 2
    assert rungs.ended_by == "halving at step 2, place 1 of 1"


@pytest.mark.parametrize(
    ("stays", "every", "saved"), [(True, 16, [16]), (True, 4, [4, 8, 12, 16]), (False, 16, [2]), (False, 2, [2])]
)
def test_a_job_that_goes_on_saves_at_its_own_validations_only(tmp_path, stays, every, saved):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{step}", save_top_k=-1, monitor="val_loss")
    fit(tmp_path, stays=stays, saving=saving, val_check_interval=every, num_sanity_val_steps=0)
    assert sorted(int(path.stem.partition("=")[2]) for path in (tmp_path / "ckpt").glob("*.ckpt")) == saved


@pytest.mark.parametrize(("task", "settings"), [(Measured, {"limit_val_batches": 0}), (WithoutRows, {})])
def test_without_a_validation_there_is_nothing_to_compare(tmp_path, task, settings):
    with pytest.raises(LoraConfigError, match="this one has none"):
        fit(tmp_path, task=task, **settings)


def test_a_run_of_too_few_steps_for_a_rung_says_so(tmp_path, capsys):
    requests, trainer, _ = fit(tmp_path, max_steps=3)
    assert (requests, trainer.global_step) == ([], 3)
    assert "sweep.halving: 3 steps are too few for a rung" in capsys.readouterr().out
