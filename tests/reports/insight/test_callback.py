"""What the callback sees of a training, against the dense updates and what other callbacks see."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import AdapterError, LoraCallback
from lora_lightning.injection.state import lora_layers
from lora_lightning.reports import InsightCallback
from lora_lightning.reports.insight import callback, read_rows
from lora_lightning.reports.insight.callback import validates_next

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.2), nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(rows=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def fit(folder, *callbacks, module=None, ckpt_path=None, config=CONFIG, **settings):
    module = module or Net()
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | settings
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[LoraCallback(config), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, loader(), loader(8), ckpt_path=ckpt_path)
    return module, trainer


class Gradients(Callback):
    """Norms of the gradients at each step, by parameter."""

    def __init__(self):
        self.norms = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        of_step = {name: float(p.grad.norm()) for name, p in pl_module.named_parameters() if p.grad is not None}
        self.norms[trainer.global_step + 1] = of_step


def test_rows_are_those_of_the_dense_updates(tmp_path):
    gradients = Gradients()
    module, _ = fit(tmp_path, gradients, InsightCallback(), gradient_clip_val=1e-3)
    rows = read_rows(tmp_path / "insight.csv")
    assert [(row.step, row.layer, row.r) for row in rows] == [
        (step, f"net.{layer}", r) for step in (6, 12) for layer, r in ((0, 4), (2, 4), (4, 0))
    ]
    for row, (name, layer) in zip(rows[3:5], lora_layers(module), strict=True):
        sigma = np.linalg.svd(layer.lora_weight_delta().detach().double().numpy(), compute_uv=False)[:4]
        share = sigma / sigma.sum()
        assert row.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)
        assert row.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)
        assert row.rank_used == (1 + (np.cumsum(sigma**2) < 0.99 * (sigma**2).sum()).sum()) / 4
        assert row.lesser_half == pytest.approx((sigma[2:] ** 2).sum() / (sigma**2).sum(), rel=1e-3)
        assert row.rank_95 == 1 + (np.cumsum(sigma**2) < 0.95 * (sigma**2).sum()).sum()
        assert row.relative_norm == pytest.approx(np.linalg.norm(sigma) / layer.weight.norm().item(), rel=1e-5)
        assert row.grad_norm_A == pytest.approx(gradients.norms[12][f"{name}.lora_A"], rel=1e-5)
        assert row.grad_norm_B == pytest.approx(gradients.norms[12][f"{name}.lora_B"], rel=1e-5)
        assert (row.rank, row.parameters) == (4, layer.weight.numel())
    assert (rows[2].effective_rank, rows[2].parameters) == (None, 12)  # no adapter
    picture = imread(tmp_path / "insight.png")
    assert picture.std() > 0.05  # more than a blank sheet


class Predictions(Callback):
    """At each step whether a validation was said to follow, and at which steps one came."""

    def __init__(self):
        self.said, self.came = set(), set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if validates_next(trainer):
            self.said.add(trainer.global_step + 1)

    def on_validation_end(self, trainer, pl_module):
        self.came.add(trainer.global_step)

    def on_train_end(self, trainer, pl_module):
        self.came.add(trainer.global_step)


@pytest.mark.parametrize(
    ("settings", "needless"),
    [
        ({}, 0),
        ({"val_check_interval": 2}, 0),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 3}, 2),  # ends of epochs
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, 0),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3}, 1),
        ({"accumulate_grad_batches": 4, "check_val_every_n_epoch": 2}, 3),
        ({"max_steps": 5, "max_epochs": -1, "val_check_interval": 3}, 0),
        ({"limit_val_batches": 0, "max_steps": 4}, 0),
    ],
)
def test_the_step_before_a_validation_is_known(tmp_path, settings, needless):
    watch = Predictions()
    fit(tmp_path, watch, num_sanity_val_steps=0, **settings)
    assert watch.came - {0} <= watch.said
    assert len(watch.said - watch.came) <= needless


def test_training_is_not_disturbed(tmp_path):
    plain, _ = fit(tmp_path / "plain", config=CONFIG | {"lora_dropout": 0.3})
    watched, _ = fit(tmp_path / "watched", InsightCallback(), config=CONFIG | {"lora_dropout": 0.3})
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_a_resumed_run_goes_on_with_its_file(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{step}")
    fit(tmp_path / "run", InsightCallback(picture=False), checkpoints, enable_checkpointing=True)
    before = read_rows(tmp_path / "run" / "insight.csv")
    fit(tmp_path / "run", InsightCallback(picture=False), ckpt_path=tmp_path / "ckpt" / "step=6.ckpt", max_epochs=3)
    rows = read_rows(tmp_path / "run" / "insight.csv")
    assert [row.step for row in rows] == [6] * 3 + [12] * 3 + [18] * 3
    assert rows[:3] == before[:3]
    assert not (tmp_path / "run" / "insight-1.csv").exists()
    fit(tmp_path / "run", InsightCallback(picture=False))  # another run in the same folder
    assert read_rows(tmp_path / "run" / "insight-1.csv") == rows


class Trouble(Callback):
    """Before the first validation a full disk, in the second a layer that is no number."""

    def __init__(self, file):
        self.file = file

    def on_train_start(self, trainer, pl_module):
        self.file.symlink_to("/dev/full")

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == 12:
            self.file.unlink()
            self.kept = pl_module.net[0].lora_B.data
            pl_module.net[0].lora_B.data = self.kept * math.nan

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == 12:
            pl_module.net[0].lora_B.data = self.kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is /dev/full here")
def test_a_run_does_not_fail_for_what_is_seen_of_it(tmp_path):
    with pytest.warns(UserWarning, match="at step 6 .*No space left on device") as told:
        fit(tmp_path, InsightCallback(), Trouble(tmp_path / "insight.csv"))
    assert len([each for each in told if "Insight warns" in str(each.message)]) == 1
    rows = read_rows(tmp_path / "insight.csv")
    assert [(row.step, row.stable_rank is None) for row in rows] == [(12, True), (12, False), (12, True)]
    assert (tmp_path / "insight.png").is_file()


def test_a_file_of_another_kind_is_told_before_training(tmp_path):
    (tmp_path / "insight.csv").write_text("mine\n")
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{step}")
    fit(tmp_path / "run", checkpoints, enable_checkpointing=True)
    with pytest.raises(AdapterError, match=r"is no insight\.csv"):
        fit(tmp_path, InsightCallback(), ckpt_path=tmp_path / "ckpt" / "step=6.ckpt", max_epochs=3)
    assert (tmp_path / "insight.csv").read_text() == "mine\n"


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path):
    fit(tmp_path, InsightCallback(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
    fit(tmp_path, InsightCallback(picture=False, filename="seen"))
    assert {"seen.csv"} == {each.name for each in tmp_path.iterdir()} - {"adapter"}


def test_validations_outside_the_fit_are_not_looked_at(tmp_path):
    module, trainer = fit(tmp_path, InsightCallback(picture=False))
    before = (tmp_path / "insight.csv").read_text()
    trainer.validate(module, loader(8), verbose=False)
    assert (tmp_path / "insight.csv").read_text() == before


def test_without_adapters_there_is_nothing_to_see(tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[InsightCallback()],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Net(), loader(), loader(8))
    assert not (tmp_path / "insight.csv").exists()


def test_loggers_get_numbers_and_the_picture(tmp_path, wandb_offline, monkeypatch):
    tracker = WandbLogger(save_dir=wandb_offline)
    log_image, images = tracker.log_image, []
    monkeypatch.setattr(tracker, "log_image", lambda *given: (images.append(given), log_image(*given)))
    loggers = [CSVLogger(tmp_path, "", ""), TensorBoardLogger(tmp_path / "tb", "", ""), tracker]
    fit(tmp_path, InsightCallback(), logger=loggers)
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = [(int(line["step"]), line) for line in lines if line["insight/effective_rank_mean"]]
    validated = [int(line["step"]) for line in lines if line["val_loss"]]
    assert [step for step, _ in found] == validated == [5, 11]
    seen = [row for row in read_rows(tmp_path / "insight.csv") if row.step == 12 and row.r]
    last = found[-1][1]
    assert float(last["insight/effective_rank_min"]) == pytest.approx(min(row.effective_rank for row in seen), rel=1e-5)
    assert float(last["insight/relative_norm_max"]) == pytest.approx(max(row.relative_norm for row in seen), rel=1e-5)
    assert float(last["insight/grad_norm_B_mean"]) == pytest.approx(
        sum(row.grad_norm_B for row in seen) / len(seen), rel=1e-5
    )
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Images("insight")] == [12]
    assert "insight/rank_used_mean" in events.Tags()["scalars"]
    assert images == [("insight", [str(tmp_path / "insight.png")])]


def test_the_picture_is_drawn_while_it_trains_where_that_takes_no_time(tmp_path, monkeypatch):
    fit(tmp_path / "short", InsightCallback(), max_steps=7, limit_val_batches=0)
    assert imread(tmp_path / "short" / "insight.png").size  # at the end, without any validation
    monkeypatch.setattr(callback, "_DRAWING", 1e9)  # as in a training of hours
    drawn = []
    monkeypatch.setattr(InsightCallback, "_draw", lambda self, trainer: drawn.append(trainer.global_step))
    fit(tmp_path / "long", InsightCallback())
    assert drawn[:2] == [6, 12]
