"""Lightning saves through files that are whole or not there."""

from __future__ import annotations

import resource
import threading

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lora_lightning import LoraCallback
from lora_lightning.adapters.files import damage_of
from lora_lightning.errors import AdapterError
from lora_lightning.strategies.files import AtomicCheckpointIO

SAVES = {"filename": "{step}", "every_n_train_steps": 1}


class Module(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class FullAt(pl.Callback):
    """From a step on no file may grow beyond some bytes, as on a disk without room."""

    def __init__(self, step, bytes_left):
        self.step, self.bytes_left = step, bytes_left

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            if isinstance(io := trainer.strategy.checkpoint_io, AsyncCheckpointIO):
                io._executor.submit(lambda: None).result()  # what its thread had to do is done
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes_left, resource.RLIM_INFINITY))


@pytest.fixture
def fit(tmp_path):
    def fit(*callbacks, plugins=None, **saves):
        trainer = pl.Trainer(
            max_steps=6,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            limit_val_batches=0,
            plugins=plugins,
            callbacks=[
                LoraCallback({"r": 2}),
                ModelCheckpoint(**(SAVES | {"dirpath": tmp_path / "ckpt"} | saves)),
                *callbacks,
            ],
        )
        try:
            trainer.fit(Module())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return trainer

    return fit


@pytest.mark.parametrize("plugins", [None, "async"])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_checkpoint_before(fit, tmp_path, plugins):
    """The one that the new one would have replaced stays too, though it is saved in another thread."""
    with pytest.raises(AdapterError, match=r"could not be written: File too large"):
        fit(FullAt(3, 1000), plugins=AsyncCheckpointIO() if plugins else None)
    (left,) = (tmp_path / "ckpt").iterdir()
    assert damage_of(left) is None
    assert torch.load(left, weights_only=True)["global_step"] == 3


def test_an_asynchronous_save_is_there_before_the_one_it_replaces_is_removed(fit, tmp_path):
    seen = []

    class Slow(TorchCheckpointIO):
        """Somebody's own, which stays."""

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            threading.Event().wait(0.05)
            super().save_checkpoint(checkpoint, path)
            seen.append(sorted(each.name for each in (tmp_path / "ckpt").iterdir()))

    trainer = fit(plugins=AsyncCheckpointIO(Slow()))
    assert type(trainer.strategy.checkpoint_io.checkpoint_io) is Slow
    assert seen[0] == ["step=1.ckpt"]
    assert seen[1:] == [[f"step={step}.ckpt", f"step={step + 1}.ckpt"] for step in range(1, 6)]
    assert [each.name for each in (tmp_path / "ckpt").glob("*.ckpt")] == ["step=6.ckpt"]


def test_an_asynchronous_save_holds_the_values_of_its_moment(fit, tmp_path):
    class Late(TorchCheckpointIO):
        """Writes when training has gone on."""

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            threading.Event().wait(0.1)
            super().save_checkpoint(checkpoint, path)

    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen[trainer.global_step] = module.layer.lora_B.detach().clone()

    fit(Watch(), plugins=AsyncCheckpointIO(Late()), save_top_k=-1)
    for step in range(1, 7):
        saved = torch.load(tmp_path / "ckpt" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["layer.lora_B"], seen[step])
    assert not torch.equal(seen[5], seen[6])


def test_whose_io_is_used(fit):
    assert type(fit().strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(fit(plugins=AsyncCheckpointIO()).strategy.checkpoint_io.checkpoint_io) is AtomicCheckpointIO


def test_remote_places_are_written_as_lightning_does(fit):
    fit(dirpath="memory://remote/ckpt")
    files = fsspec.filesystem("memory")
    (path,) = files.ls("/remote/ckpt", detail=False)
    with files.open(path) as file:
        assert torch.load(file, weights_only=True)["global_step"] == 6
