"""Cases that Lightning tests of its distributed checkpoints, asked of ours, in two processes.

The names in the docstrings and comments are those of Lightning's tests.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_parameters
from lora_lightning.adapters.checkpoint import read_checkpoint
from tests.callback.test_unfreezing import Stepwise

CONFIG = LoraConfig(r=2, lora_alpha=4)
EPOCHS, STEPS = 3, 5


class Module(pl.LightningModule):
    """Of each batch, every data-parallel process takes its share."""

    def __init__(self, share=(0, 1)):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.rank, self.shares = share

    def loss(self, batch):
        x, y = (part[self.rank :: self.shares] for part in batch)
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(11)
        data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
        return DataLoader(data, batch_size=8)

    val_dataloader = train_dataloader


def trainer(*callbacks, epochs=EPOCHS, **options):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[LoraCallback(CONFIG), *callbacks],
        **(settings | options),
    )


HEAD = """
for key, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
    os.environ[key] = str(value)  # what torchrun sets; the group is there already

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lora_lightning import AdapterError, lora_parameters
from lora_lightning.adapters.checkpoint import read_checkpoint
from lora_lightning.injection.tensors import whole
from lora_lightning.strategies.mesh import MeshStrategy
from tests.strategies.test_lightning_cases import CONFIG, EPOCHS, STEPS, Module, trainer

kind = arguments[0]


class Sharded(Module):
    def __init__(self):
        super().__init__((0, 1) if kind == "tp" else (rank, 2))
        self.ready = False

    def configure_model(self):
        if self.ready:
            return
        self.ready = True
        if kind == "tp":
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        else:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def sharded(*callbacks, folder, **options):
    strategy = MeshStrategy(tensor_parallel_size=2 if kind == "tp" else 1, save_distributed_checkpoint=folder)
    return trainer(*callbacks, devices=2, strategy=strategy, plugins=[TorchElasticEnvironment()], **options)


def ddp(*callbacks, **options):
    return trainer(*callbacks, devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()], **options)


def adapter(module):
    return {name: whole(p.detach()).clone() for name, p in lora_parameters(module).items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def refused(action, message):
    try:
        action()
    except AdapterError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"not refused: {message}")


class Look(Callback):
    def on_train_start(self, trainer, module):
        self.position = trainer.current_epoch, trainer.global_step
        self.adapter = adapter(module)
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def saver(name, **options):
    return ModelCheckpoint(out / name, filename="{epoch}", monitor="val_loss", save_last=True, **options)

"""

SAVING = (
    HEAD
    + """
for form in ("file", "folder"):
    # test_strategy_state_dict, test_save_load_sharded_state_dict
    module, checkpoints = Sharded(), saver(form, save_top_k=2)
    first = sharded(checkpoints, folder=form == "folder", default_root_dir=out / form)
    first.fit(module)
    state = first.strategy.lightning_module_state_dict()
    # In one form every process gives its part of each tensor, in the other the first gives all, whole.
    expected = set(lora_parameters(module)) if form == "folder" or rank == 0 else set()
    assert set(state) == expected, state.keys()

    # test_top_k with folders: those that are no longer among the best are gone, whole
    found = {path.name for path in (out / form).glob("*.ckpt")}
    assert found == {Path(path).name for path in checkpoints.best_k_models} | {"last.ckpt"}, found
    assert len(found) == 3 and all((out / form / name).is_dir() is (form == "folder") for name in found)
    last = out / form / "last.ckpt"
    if form == "folder":
        names = set(os.listdir(last))
        assert {"meta.pt", ".metadata"} <= names and any(name.endswith(".distcp") for name in names), names
        meta = torch.load(last / "meta.pt", weights_only=True)
        assert not meta["state_dict"] and "ModelCheckpoint" in str(meta["callbacks"].keys())
    # test_model_checkpoint_save_last: written over at each epoch, it is that of the last one
    content = read_checkpoint(last)
    assert (content["epoch"], content["global_step"]) == (EPOCHS - 1, EPOCHS * STEPS)
    same(content["state_dict"], adapter(module))

    # test_running_test_pretrained_model_…: "best", "last" and a path, in the same trainer and in a new one
    best = checkpoints.best_model_score.item()
    for path in ("best", checkpoints.best_model_path):
        (losses,) = first.validate(module, ckpt_path=path, verbose=False)
        assert abs(losses["val_loss"] - best) < 1e-6, (losses, best)
    other = Sharded()
    (losses,) = sharded(folder=False).validate(other, ckpt_path=checkpoints.best_model_path, verbose=False)
    assert abs(losses["val_loss"] - best) < 1e-6
    same(adapter(other), read_checkpoint(checkpoints.best_model_path)["state_dict"])

    # test_correct_step_and_epoch, test_trainer_properties_restore_ckpt_path: right after a resume
    for again in (sharded, ddp):
        look, resumed = Look(), Module((rank, 2)) if again is ddp else Sharded()
        options = {} if again is ddp else {"folder": form == "folder"}
        options |= {"epochs": EPOCHS + 1, "default_root_dir": out / "x"}
        second = again(look, saver(f"{form}-{again.__name__}"), **options)
        if kind == "tp" and again is ddp:
            resumed.rank, resumed.shares = 0, 1
        second.fit(resumed, ckpt_path=last)
        assert look.position == (EPOCHS, EPOCHS * STEPS), look.position
        assert abs(look.rate - 1e-2 * 0.9**EPOCHS) < 1e-9
        same(look.adapter, content["state_dict"])
        assert second.global_step == (EPOCHS + 1) * STEPS
        if again is sharded:
            end = adapter(resumed)
    # test_load_full_state_checkpoint_into_regular_model: the epoch after it is the same one
    for name, value in adapter(resumed).items():
        assert (value - end[name]).abs().max() < 1e-5, name

# test_load_standard_checkpoint_into_distributed_model: DDP's into a sharded one, moments too
plain = ddp(default_root_dir=out / "ddp")
plain.fit(module := Module((rank, 2)))
plain.save_checkpoint(out / "ddp.ckpt")
look = Look()
again = sharded(look, folder=False, epochs=EPOCHS, default_root_dir=out / "ddp2")
again.fit(Sharded(), ckpt_path=out / "ddp.ckpt")
saved = read_checkpoint(out / "ddp.ckpt")
again.save_checkpoint(out / "unchanged.ckpt")
kept = read_checkpoint(out / "unchanged.ckpt")
same(kept["state_dict"], saved["state_dict"])
for name, state in saved["optimizer_states"][0]["state"].items():
    same(kept["optimizer_states"][0]["state"][name], state)

# test_save_checkpoint_path_exists: a folder over a file, a file over a folder; another's folder is not touched
(out / "foreign").mkdir(exist_ok=True)
(out / "foreign" / "thesis.txt").write_text("long work")
dist.barrier()
for folder in (True, False):
    now = sharded(folder=folder, default_root_dir=out / f"over{folder}")
    now.validate(Sharded(), ckpt_path=last, verbose=False)
    for place in ("over.ckpt", "over.ckpt"):  # the second is over one of the same kind
        now.save_checkpoint(out / place)
        dist.barrier()
        assert (out / place).is_dir() is folder
        same(read_checkpoint(out / place)["state_dict"], content["state_dict"])
    if not folder:
        continue
    refused(lambda: now.save_checkpoint(out / "foreign"), "foreign is a folder that holds no checkpoint")
    assert (out / "foreign" / "thesis.txt").read_text() == "long work"
    # test_save_checkpoint_storage_options: they mean nothing for a folder of several processes
    refused(lambda: now.save_checkpoint(out / "options.ckpt", storage_options={"a": 1}), "storage_options are for")

# test_load_unknown_checkpoint_type
(out / "empty").mkdir(exist_ok=True)
refused(lambda: sharded(folder=True).validate(Sharded(), ckpt_path=out / "empty"), "no checkpoint at")
"""
)


def _losses(path: Path) -> float:
    module = Module()
    (losses,) = trainer(devices=1).validate(module, ckpt_path=path, verbose=False)
    state = read_checkpoint(path)["state_dict"]
    assert all(torch.equal(p, state[name]) for name, p in lora_parameters(module).items())
    return losses["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_model_parallel_save_and_load(processes, kind, tmp_path):
    """test_save_load_sharded_state_dict and its neighbours; then the folders and files on one device."""
    out = processes(SAVING, kind)
    for form in ("file", "folder"):
        assert abs(_losses(out / form / "last.ckpt") - _losses(out / "file" / "last.ckpt")) < 1e-5
        module = Module()
        alone = trainer(devices=1, epochs=EPOCHS + 1, default_root_dir=tmp_path / form, enable_checkpointing=False)
        alone.fit(module, ckpt_path=out / form / "last.ckpt")
        assert (alone.current_epoch, alone.global_step) == (EPOCHS + 1, (EPOCHS + 1) * STEPS)
        end = read_checkpoint(out / f"{form}-sharded" / "last.ckpt")["state_dict"]
        assert all((p - end[name]).abs().max() < 1e-5 for name, p in lora_parameters(module).items())


UNFREEZING = (
    HEAD
    + """
from tests.callback.test_unfreezing import Stepwise

# test_ddp_gradients_synced: parameters that DDP found frozen are averaged by ours once they train
def run(name, ckpt_path=None):
    module = Module((rank, 2))
    saves = ModelCheckpoint(out / name, filename="{epoch}", save_top_k=-1)
    fit = ddp(Stepwise(), saves, default_root_dir=out / name)
    fit.fit(module, ckpt_path=ckpt_path)
    return adapter(module)

whole_run = run("whole")
assert whole_run["net.0.lora_B"].any()
both = [None, None]
dist.all_gather_object(both, whole_run)
same(*both)
# test_callbacks_restore, under DDP
for epoch in range(2):
    same(run(f"from{epoch}", out / "whole" / f"epoch={epoch}.ckpt"), whole_run)
torch.save(whole_run, out / f"rank{rank}.pt")
"""
)


def test_unfreezing_under_ddp(processes, tmp_path):
    """test_callbacks_restore in two processes: they end as one with the whole batch, resumed or not."""
    out = processes(UNFREEZING, "ddp")
    module = Module()
    trainer(Stepwise(), devices=1, default_root_dir=tmp_path / "alone").fit(module)
    both = torch.load(out / "rank0.pt", weights_only=True)
    assert all((p - both[name]).abs().max() < 1e-5 for name, p in lora_parameters(module).items())
