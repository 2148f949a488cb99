"""Callbacks, strategies and modules that are used again."""

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lora_lightning import AdapterError, LoraCallback, LoraConfig, inject_lora, load_from_checkpoint
from lora_lightning.adapters import read_config


def test_a_strategy_goes_back_to_a_trainer_without_adapters(module_class, make_trainer, tmp_path):
    strategy = SingleDeviceStrategy("cpu", accelerator=CPUAccelerator())
    make_trainer(LoraCallback(LoraConfig(r=2)), strategy=strategy).fit(module_class())
    plain = module_class()
    trainer = make_trainer(strategy=strategy)
    trainer.fit(plain)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=False)["state_dict"]
    assert state.keys() == plain.state_dict().keys()


def test_one_callback_tells_of_each_module_what_it_has(module_class, make_trainer):
    callback = LoraCallback()
    make_trainer(callback).fit(module_class())
    other = module_class()
    inject_lora(other, LoraConfig(r=2, lora_alpha=64))
    make_trainer(callback).fit(other)
    config = read_config(module_class(), callback.adapter_path)
    assert (config.r, config.lora_alpha) == (2, 64)


def test_frozen_statistics_stay_when_a_hook_calls_train(module_class, make_trainer):
    class Trains(module_class):
        def on_train_epoch_start(self):
            self.train()

    module = Trains()
    trainer = make_trainer(LoraCallback(LoraConfig(r=2)), max_epochs=2)
    trainer.fit(module)
    assert torch.equal(module.net[1].running_mean, module_class().net[1].running_mean)
    restored = load_from_checkpoint(Trains, trainer.checkpoint_callback.best_model_path)
    x = torch.randn(4, 8)
    torch.testing.assert_close(restored.net(x), module.eval().net(x))


def test_a_remote_log_folder_is_refused_before_training(module_class, make_trainer):
    module = module_class()
    with pytest.raises(AdapterError, match="memory://bucket/run, which is remote"):
        make_trainer(LoraCallback(LoraConfig(r=2)), default_root_dir="memory://bucket/run").fit(module)
    assert module.net[0].lora_B.abs().sum() == 0


def test_a_best_checkpoint_that_is_remote_has_no_adapter_beside_it_and_a_word_about_it(module_class, make_trainer):
    callback = LoraCallback(LoraConfig(r=2))
    with pytest.warns(UserWarning, match="is no local file: its adapter is not written"):
        make_trainer(callback, ModelCheckpoint("memory://bucket/checkpoints")).fit(module_class())
    assert callback.adapter_path.is_dir()
    assert callback.best_adapter_path is None
