"""A tiny language model, rows to train it on, and a data module that has prompts."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lora_lightning.tasks import CausalLM


class Data(LightningDataModule):
    """Eight rows of noise; prompts with brackets in them, which are no markup."""

    def __init__(self, prompts):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 384, (8, 10), generator=generator)
        self.rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        self.prompts = prompts

    def train_dataloader(self):
        return DataLoader(self.rows, 2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, 4)

    def sample_prompts(self):
        torch.rand(3)  # must not disturb training
        return self.prompts


@pytest.fixture(autouse=True, scope="module")
def _own_cache(demo_cache):
    torch.set_num_threads(1)


@pytest.fixture
def data():
    return Data(
        [
            SimpleNamespace(prompt="the minister", shown="minister [bold]\nsecond line", reference="[red] wins"),
            SimpleNamespace(prompt="a small team has", shown="team", reference=None),
        ]
    )


@pytest.fixture
def module():
    torch.manual_seed(0)
    return CausalLM("demo:tiny-llama", learning_rate=1e-2, max_new_tokens=4)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **settings):
        settings = {"max_epochs": 2, "logger": False, "num_sanity_val_steps": 0} | settings
        return Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_checkpointing=settings.pop("enable_checkpointing", False),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            log_every_n_steps=1,
            **settings,
        )

    return make
