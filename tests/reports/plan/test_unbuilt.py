from __future__ import annotations

import torch
from safetensors.torch import save_file

from lora_lightning import LoraConfig
from lora_lightning.reports.plan import Setting
from lora_lightning.reports.plan.unbuilt import told_of_files
from lora_lightning.tasks.model_config import ModelConfig


def test_what_files_say_of_a_model_that_cannot_be_built(tmp_path):
    setting = Setting(ModelConfig(str(tmp_path)), LoraConfig(r=4))
    assert told_of_files(setting) == "nothing more can be told without its layers"
    save_file(
        {"a.weight": torch.zeros(300, 200), "b.weight": torch.zeros(100, 50), "b.bias": torch.zeros(100)},
        tmp_path / "model.safetensors",
    )
    told = told_of_files(setting)
    assert told.startswith("its files of weights are 0.000261 GB, which the base takes on a device, and an adapter of ")
    assert told.endswith("of rank 4 on all of its 2 matrices has 2,600 parameters")
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert told_of_files(setting).endswith("on a device; an adapter's size needs the shapes of the layers")
