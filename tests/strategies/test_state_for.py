"""Which state a strategy gets, and what is refused before training."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, inject_lora, lora_parameters, lora_state_dict
from lora_lightning.strategies import AdapterState, state_for
from lora_lightning.strategies.forked import ForkedState


class Unknown(SingleDeviceStrategy):
    """A strategy of somebody else's, which no class here stands for."""


def test_a_strategy_of_a_known_kind_is_taken_as_that_kind():
    assert type(state_for(Unknown("cpu"))) is AdapterState


def test_an_unknown_strategy_is_named_in_a_warning():
    class Other(Strategy):
        save_checkpoint = load_checkpoint = None

    Other.__abstractmethods__ = frozenset()
    with pytest.warns(UserWarning, match="Other is not a strategy known here"):
        assert type(state_for(Other())) is AdapterState


def _forked():
    strategy = DDPStrategy(start_method="fork", cluster_environment=LightningEnvironment())
    strategy._configure_launcher()
    return strategy


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)


def test_forked_processes_want_the_adapter_before_they_start():
    state = state_for(_forked())
    assert type(state) is ForkedState
    with pytest.raises(LoraConfigError, match=r"call inject_lora\(model, config\) on the LightningModule before"):
        state.injected(Net(), by_callback=True)


def test_forked_processes_send_the_adapter_back_and_nothing_else():
    strategy, module = _forked(), Net()
    strategy._lightning_module = module
    inject_lora(module, LoraConfig(r=2))
    state_for(strategy).injected(module, by_callback=False)
    assert set(module.state_dict()) == set(lora_state_dict(module)) == set(lora_parameters(module))


def test_the_callback_goes_to_the_front(tmp_path):
    class Other(pl.Callback):
        """Stands before ours."""

    class Module(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(4, 3), batch_size=2)

    order = [Other(), LoraCallback(LoraConfig(r=1)), Other()]
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=list(order),
    )
    trainer.fit(Module())
    ours = [callback for callback in trainer.callbacks if callback in order]
    assert ours == [order[1], order[0], order[2]]
