"""A resumed run ends with the weights of the uninterrupted one, to the bit."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import LoraCallback

SAVES = {
    "at the end of a training epoch": {"save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "the best by a metric": {"monitor": "val_loss", "save_top_k": -1},
}


def _run(make_trainer, module_class, folder, ckpt_path=None, **saves):
    pl.seed_everything(1, verbose=False)
    module = module_class(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 2)))
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", **({"save_top_k": -1} | saves))
    lora = LoraCallback({"r": 2, "lora_dropout": 0.2, "init_lora_weights": "gaussian"})
    make_trainer(lora, checkpoints, max_epochs=4, default_root_dir=folder).fit(module, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("kind", SAVES)
def test_from_every_epoch(kind, make_trainer, module_class, tmp_path):
    whole = _run(make_trainer, module_class, tmp_path / "whole", **SAVES[kind])
    saved = sorted((tmp_path / "whole").glob("epoch=*.ckpt"))
    assert len(saved) == 4
    for path in saved[:3]:
        resumed = _run(make_trainer, module_class, tmp_path / path.stem, ckpt_path=path, **SAVES[kind])
        for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
            assert torch.equal(one, other), f"{name} differs after resuming from {Path(path).name}"


def test_a_checkpoint_read_for_validation_does_not_change_a_later_run(make_trainer, module_class, tmp_path):
    _run(make_trainer, module_class, tmp_path / "a")
    path = next((tmp_path / "a").glob("epoch=0*.ckpt"))

    def fit(validate):
        module = module_class()
        trainer = make_trainer(LoraCallback({"r": 2, "lora_dropout": 0.5}), default_root_dir=tmp_path / str(validate))
        trainer.validate(module, verbose=False)
        if validate:
            other = module_class(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 2)))
            make_trainer(LoraCallback({"r": 2, "lora_dropout": 0.2, "init_lora_weights": "gaussian"})).validate(
                other, ckpt_path=path, verbose=False
            )
        torch.manual_seed(3)
        trainer.fit(module)
        return module

    for one, other in zip(fit(True).parameters(), fit(False).parameters(), strict=True):
        assert torch.equal(one, other)
