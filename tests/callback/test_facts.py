"""What loggers are told of the adapters."""

from __future__ import annotations

import pytest
from lightning.pytorch.loggers import CSVLogger

from lora_lightning import LoraCallback, LoraConfig


@pytest.fixture
def logger(tmp_path):
    """Makes CSV loggers with a folder of their own."""
    return lambda name: CSVLogger(tmp_path, name="", version=name)


def test_two_adapters_are_told_apart(logger, two_networks, make_trainer):
    told = logger("run")
    first = LoraCallback(LoraConfig(r=2), module="net")
    second = LoraCallback(LoraConfig(r=1, lora_alpha=3), module="other", name="style")
    make_trainer(first, second, logger=told, fast_dev_run=False, limit_train_batches=1).fit(two_networks)
    facts = told.experiment.hparams
    assert (facts["lora/r"], facts["lora/style/r"]) == (2, 1)
    assert facts["lora/style/scaling"] == 3
    assert facts["lora/layers"] == facts["lora/style/layers"] == 2
    assert {name for name in facts if name.startswith("lora/style/")} == {
        f"lora/style/{name.removeprefix('lora/')}" for name in facts if name.startswith("lora/") and "style" not in name
    }


def test_the_loggers_of_a_second_trainer_are_told_too_and_each_once(logger, module, make_trainer, monkeypatch):
    callback, first, second = LoraCallback(LoraConfig(r=2)), logger("first"), logger("second")
    times = []
    log = CSVLogger.log_hyperparams
    monkeypatch.setattr(CSVLogger, "log_hyperparams", lambda self, facts=None: times.append(self) or log(self, facts))
    trainer = make_trainer(callback, logger=first, limit_train_batches=1)
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    make_trainer(callback, logger=second, limit_train_batches=1).validate(module, verbose=False)
    assert first.experiment.hparams["lora/r"] == second.experiment.hparams["lora/r"] == 2
    assert times == [first, second]
