"""A cache of the demo models for this session only, and batches small enough to think about."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lora_lightning.tasks import CausalLM

ROWS, LENGTH, VOCABULARY = 8, 12, 384


@pytest.fixture(autouse=True, scope="module")
def _own_cache(demo_cache):
    torch.set_num_threads(1)


@pytest.fixture
def module():
    return CausalLM("demo:tiny-llama")


@pytest.fixture
def rows():
    """Rows whose numbers of labels differ: 1, 2, 3 … of them, and one row without any."""
    return make_rows()


def make_rows(count=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - number % 4).long()
        trained = (torch.arange(LENGTH) >= LENGTH - 3 - number) & mask.bool() & (number != 4)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(trained, ids, -100)})
    return rows


@pytest.fixture
def fit(tmp_path):
    """Train a module on rows, in the order given, and return the trainer."""

    def run(module, rows, batch_size, validation=None, **settings):
        settings = {"max_epochs": 1, "limit_val_batches": None if validation else 0} | settings
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **settings,
        )
        trainer.fit(module, DataLoader(rows, batch_size), DataLoader(validation, batch_size) if validation else None)
        return trainer

    return run
