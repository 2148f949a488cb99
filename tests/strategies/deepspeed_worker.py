"""One process of a DeepSpeed run on the CPU: DeepSpeed has a CPU accelerator, Lightning's strategy asks for CUDA."""

import argparse
import json
import os
import traceback
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig


class OnTheCpu(DeepSpeedStrategy):
    """Lightning's strategy without its questions after CUDA and the numbers of devices."""

    @property
    def root_device(self):
        return torch.device("cpu", 0)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def _net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))


class Module(pl.LightningModule):
    def __init__(self, late, devices, groups, bad_batch):
        super().__init__()
        self.devices, self.groups, self.bad_batch = devices, groups, bad_batch
        if not late:
            self.net = _net()

    if os.environ.get("LATE"):

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = _net()
                self.partitioned = self.net[0].weight.numel() == 0

    def training_step(self, batch, batch_idx):
        x, y = (part[self.global_rank :: self.devices] for part in batch)
        if batch_idx == self.bad_batch and self.global_rank == self.devices - 1:
            x = x * float("nan")
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean(), sync_dist=True, batch_size=len(x))

    def configure_optimizers(self):
        if self.groups:
            named = list(self.named_parameters())
            groups = [
                {"params": [p for n, p in named if "lora_A" in n], "lr": 2e-3},
                {"params": [p for n, p in named if "bias" in n], "lr": 1e-3},  # all of them frozen
                {"params": [p for n, p in named if "lora_A" not in n and "bias" not in n], "lr": 1e-3},
            ]
        else:
            groups = self.parameters()
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Watch(pl.Callback):
    """Notes the weights that a process has when training begins, after a restore."""

    def __init__(self):
        self.notes = {}

    def on_train_start(self, trainer, pl_module):
        state = trainer.strategy.lightning_module_state_dict()
        self.notes["start"] = {name: value.float().cpu().clone() for name, value in state.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--groups", action="store_true")
    parser.add_argument("--bad-batch", type=int, default=-1)
    parser.add_argument("--nonfinite", default="stop")
    parser.add_argument("--ckpt")
    parser.add_argument("--in-full", action="store_true")
    parser.add_argument("--validate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(11)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
    pl.seed_everything(3 + int(os.environ.get("LOCAL_RANK", 0)), verbose=False)  # ranks need not agree
    module = Module(bool(os.environ.get("LATE")), args.devices, args.groups, args.bad_batch)
    strategy = OnTheCpu(stage=args.stage) if args.stage else "ddp" if args.devices > 1 else "auto"
    config = LoraConfig(r=2, lora_alpha=4, modules_to_save=["net.5"] if args.in_full else None)
    lora = LoraCallback(config, on_nonfinite=args.nonfinite)
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        default_root_dir=args.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lora, watch, ModelCheckpoint(args.out + "/ckpt", filename="{epoch}", save_top_k=-1)],
    )
    loader = DataLoader(data, batch_size=8)
    notes = {}
    try:
        if args.validate:
            notes["val_loss"] = trainer.validate(module, loader, ckpt_path=args.ckpt, verbose=False)[0]["val_loss"]
        else:
            trainer.fit(module, loader, val_dataloaders=loader, ckpt_path=args.ckpt)
            notes["val_loss"] = float(trainer.callback_metrics["val_loss"])
    except Exception as error:
        notes["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if args.in_full:
        notes["originals"] = [float(v.sum()) for v in vars(module.net[5])["_lora_originals"].values()]
    notes["partitioned"] = getattr(module, "partitioned", None)
    torch.save(watch.notes, f"{args.out}/start{trainer.global_rank}.pt")
    Path(f"{args.out}/notes{trainer.global_rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
