from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.sweeps.packed.task import PackedCausalLM
from tests.sweeps.packed.solo import tiny_llama


def task_over(base):
    return PackedCausalLM(network=shell_of(base), tokenizer=None, player=None)


def test_the_base_stays_where_it_is_when_a_fit_has_ended():
    """A strategy moves its module to the CPU then, which for a base on a GPU would be a copy for each job."""
    task = task_over(tiny_llama().to("meta"))  # what cannot be moved fails
    strategy = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).strategy
    strategy._lightning_module = task
    strategy.teardown()
    assert {parameter.device.type for parameter in task.parameters()} == {"meta"}


@pytest.mark.gpu
def test_the_base_on_a_gpu_is_there_once():
    device = torch.device("cuda", 0)
    base = tiny_llama().to(device)
    task = task_over(base)
    strategy = SingleDeviceStrategy(device, accelerator=Trainer(accelerator="gpu", devices=1).accelerator)
    strategy._lightning_module = task
    for _ in range(2):
        strategy.model_to_device()
        strategy.teardown()
    there = {parameter.data_ptr() for parameter in base.parameters()}
    assert {parameter.data_ptr() for parameter in task.model.parameters()} == there
