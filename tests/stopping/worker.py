"""A small run, in a process that is forked from one with all imports done: it sends itself signals at chosen steps."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, SaveOnSignal, lora_state_dict


class Loader(DataLoader):
    """Goes on at the batch where it was."""

    trainer = None
    skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                yield batch

    def state_dict(self):
        return {"done": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % len(self)}

    def load_state_dict(self, state):
        self.skip = state["done"]


class Module(pl.LightningModule):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = (part[self.global_rank :: self.trainer.world_size] for part in batch)
        here = self.trainer.fit_loop.epoch_loop.total_batch_idx
        for rank, at, number, times in self.settings.get("send", []):
            if here == at and rank == self.global_rank:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(self.settings.get("pause", 0.01))
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def on_validation_end(self):
        print("validated", self.trainer.global_step, flush=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def set_handlers(settings):
    def handler(number, frame):
        saved = os.path.exists(settings["out"] + "/checkpoints/stopped.ckpt")
        print(f"mine {number} {'saved' if saved else 'nothing saved'}", flush=True)
        if settings["handler"] == "exits":
            sys.exit(7)

    signal.signal(signal.SIGINT, signal.SIG_IGN if settings.get("ignored") else signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if settings.get("handler"):
            signal.signal(number, handler)
        elif settings.get("ignored"):
            signal.signal(number, signal.SIG_IGN)


def train(settings):
    set_handlers(settings)
    devices, out = settings.get("devices", 1), settings["out"]
    generator = torch.Generator().manual_seed(11)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
    pl.seed_everything(3, verbose=False)
    # A generator of its own: the loader draws nothing from the global one.
    module, loader = Module(settings), Loader(data, batch_size=4, generator=torch.Generator())
    limit = {"timeout": timedelta(seconds=settings["limit"])} if "limit" in settings else {}
    loader.trainer = trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(**limit) if devices > 1 else "auto",
        use_distributed_sampler=False,
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=settings.get("accumulate", 1),
        callbacks=[
            SaveOnSignal(),
            LoraCallback(LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2)),
            ModelCheckpoint(out + "/checkpoints", filename="best", monitor="val_loss"),
        ],
    )
    trainer.fit(module, loader, DataLoader(data, batch_size=20), ckpt_path=settings.get("ckpt"))
    ignored = settings.get("ignored")
    assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.default_int_handler)
    assert not ignored or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    torch.save(lora_state_dict(module), f"{out}/rank{trainer.global_rank}.pt")


def child(settings, rank):
    output = os.open(f"{settings['out']}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if settings.get("devices", 1) > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(settings["port"]), "LOCAL_RANK": str(rank)}
    try:
        train(settings)
        status = 0
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 255)


def serve():
    torch.set_num_threads(1)
    for line in sys.stdin:
        settings = json.loads(line)
        processes = []
        for rank in range(settings.get("devices", 1)):
            process = os.fork()
            if not process:
                child(settings, rank)
            processes.append(process)
        statuses = []
        for process in processes:
            if settings.get("release") == len(statuses):  # it was halted, and is not waited for
                os.kill(process, signal.SIGKILL)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    serve()
