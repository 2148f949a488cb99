"""Schedule-free training in Lightning: what is shown, saved and left is the average; training goes on beside it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, lora_parameters, lora_state_dict
from lora_lightning.optim import adamw_8bit, schedule_free
from lora_lightning.optim.modes import FollowModes, averaged

schedulefree = pytest.importorskip("schedulefree")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.points, self.shown = [], []

    def training_step(self, batch, batch_idx):
        self.points.append(self.now())
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.shown.append(self.now())

    def now(self):
        return self.net[0].lora_B.detach().clone()

    def configure_optimizers(self):
        return schedule_free([p for p in self.parameters() if p.requires_grad], lr=3e-2)


def rows():
    generator = torch.Generator().manual_seed(11)
    return DataLoader(
        TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator)), batch_size=4
    )


def make_trainer(folder, *callbacks, **more):
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
    return pl.Trainer(
        **(settings | {"default_root_dir": folder, "enable_progress_bar": False} | more),
        callbacks=[LoraCallback(LoraConfig(r=2)), *callbacks],
    )


def by_hand(module):
    """The package's own loop: six steps an epoch, the average looked at after each third."""
    from lora_lightning import inject_lora

    inject_lora(module, LoraConfig(r=2), seed=0)
    optimizer = module.configure_optimizers()
    optimizer.train()
    shown = []
    for _ in range(2):
        for number, batch in enumerate(rows()):
            optimizer.zero_grad()
            (module.net(batch[0]) - batch[1]).square().mean().backward()
            optimizer.step()
            if number % 3 == 2:
                optimizer.eval()
                shown.append(module.now())
                optimizer.train()
    return shown


def test_validations_see_the_average_and_training_goes_on_from_its_point(tmp_path):
    module, twin = Module(), Module()
    trainer = make_trainer(
        tmp_path, val_check_interval=3, num_sanity_val_steps=0, limit_val_batches=1, enable_checkpointing=False
    )
    trainer.fit(module, rows(), rows())
    wanted = by_hand(twin)
    assert len(module.shown) == len(wanted) == 4
    for shown, average in zip(module.shown, wanted, strict=True):
        torch.testing.assert_close(shown, average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(module.points[3], module.shown[0], rtol=1e-3)
    torch.testing.assert_close(module.now(), module.shown[-1])  # what is left is the average
    assert not any(isinstance(each, FollowModes) for each in trainer.callbacks)
    assert "save_checkpoint" not in vars(trainer)


def test_checkpoints_and_the_adapter_hold_the_average(tmp_path):
    from safetensors.torch import load_file

    module = Module()
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path, saving, limit_val_batches=0).fit(module, rows())
    twin = Module()
    from lora_lightning import inject_lora

    inject_lora(twin, LoraConfig(r=2), seed=0)
    optimizer = twin.configure_optimizers()
    optimizer.train()
    for step, batch in enumerate([*rows(), *rows()], 1):
        optimizer.zero_grad()
        (twin.net(batch[0]) - batch[1]).square().mean().backward()
        optimizer.step()
        if step % 4 == 0:
            saved = torch.load(tmp_path / "ckpt" / f"step={step}.ckpt", weights_only=True)
            with averaged([optimizer]):
                for name, value in lora_state_dict(twin).items():
                    torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(adapter["base_model.model.net.0.lora_B.weight"], module.now())


def test_a_trainer_that_stops_early_leaves_the_average(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    module = Module()
    trainer = make_trainer(tmp_path, Stops(), limit_val_batches=0, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, rows())
    optimizer = trainer.optimizers[0]
    assert not optimizer.param_groups[0]["train_mode"]
    assert len(lora_parameters(module)) == 4


@pytest.mark.parametrize(("make", "package"), [(schedule_free, "schedulefree"), (adamw_8bit, "bitsandbytes")])
def test_a_package_that_is_missing_is_told(make, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(LoraConfigError, match=f"pip install {package}"):
        make([nn.Parameter(torch.ones(2))])
