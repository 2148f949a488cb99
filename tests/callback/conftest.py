"""A small network, its LightningModule, and a trainer that says nothing."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(shuffle=False):
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


class Module(pl.LightningModule):
    """Regression with a network given or built in ``__init__``."""

    def __init__(self, net=None, lr=1e-2):
        super().__init__()
        self.net = network() if net is None else net
        self.lr = lr

    def loss(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}

    def train_dataloader(self):
        return data(shuffle=True)

    def val_dataloader(self):
        return data()

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def module():
    return Module()


@pytest.fixture
def module_class():
    return Module


@pytest.fixture
def make_network():
    return network


@pytest.fixture
def two_networks(module_class, make_network):
    """A module of two networks, ``net`` and ``other``, both of which are trained."""

    class Two(module_class):
        def __init__(self):
            super().__init__()
            self.other = make_network()

        def loss(self, batch):
            return super().loss(batch) + (self.other(batch[0]) - batch[1]).square().mean()

    return Two()


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **options):
        settings = {
            "max_epochs": 1,
            "logger": False,
            **({} if "strategy" in options and not isinstance(options["strategy"], str) else {"accelerator": "cpu"}),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(callbacks=list(callbacks), **(settings | options))

    return make
