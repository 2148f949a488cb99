"""A run that is stopped and resumed sees the rows that an uninterrupted one sees, in the same order."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.data import TextData


class Recorder(pl.LightningModule):
    """Trains one number, and writes down the rows of each training step, and a number of the global generator."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def rows(self, batch):
        return tuple(
            self.tokenizer.decode(ids[labels != -100].tolist(), skip_special_tokens=True).strip()
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        )

    def training_step(self, batch):
        self.seen.append((self.global_step, self.rows(batch)))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(tokenizer, path, folder, *, resume=None, save=None, data=None, epochs=2, **options):
    """Runs; gives what was seen by step, and the checkpoints by name."""
    module = Recorder(tokenizer)
    checkpoint = ModelCheckpoint(folder, filename="{step}-{epoch}", save_top_k=-1, **(save or {}))
    limit = {} if "max_steps" in options else {"max_epochs": epochs}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[checkpoint], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **limit, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=TextData(str(path), tokenizer=tokenizer, **(data or {})), ckpt_path=resume)
    return module.seen, {file.stem: file for file in sorted(folder.glob("*.ckpt"))}


PLACES = {
    "in an epoch": {"save": {"every_n_train_steps": 3}},
    "at an epoch's end": {"save": {"every_n_epochs": 1, "save_on_train_epoch_end": True}},
    "after the validation at an epoch's end": {"save": {"every_n_epochs": 1, "save_on_train_epoch_end": False}},
    "after a validation in an epoch": {"save": {"save_on_train_epoch_end": False}, "val_check_interval": 2},
    "at an epoch's end, counted in steps": {
        "save": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "max_steps": 18,
    },
    "counted in steps": {"save": {"every_n_train_steps": 4}, "max_steps": 14},
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*IterableDataset")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "data",
    [{"num_workers": 0}, {"num_workers": 2}, {"streaming": True}, {"streaming": True, "num_workers": 2}],
    ids=["plain", "workers", "stream", "stream-workers"],
)
def test_a_resumed_run_sees_the_same_rows(tokenizer, numbered, tmp_path, place, data):
    options = {**PLACES[place], "data": {"batch_size": 4, "val_split": 0.2, **data}}
    path = numbered(35)  # 28 for training, or 7 batches an epoch
    whole, checkpoints = fit(tokenizer, path, tmp_path / "whole", **options)
    assert len({rows for _, rows in whole[:7]}) == 7
    assert len(checkpoints) >= 2
    for name, file in checkpoints.items():
        step = int(name.split("step=")[1].split("-")[0])
        rest, _ = fit(tokenizer, path, tmp_path / f"rest {name}", resume=file, **options)
        assert rest == whole[step:], name
