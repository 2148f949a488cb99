"""A training of seconds whose result is known: ``python -m lora_lightning.reports.doctor.little_training``."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings

from lightning.pytorch import Trainer, seed_everything

from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.data import TinyText
from lora_lightning.tasks import CausalLM

STEPS = 20


def train_a_little(accelerator: str = "auto") -> dict[str, float | str]:
    """Train an adapter of the tiny Llama on made-up text, in float32 and without dropout.

    Args:
        accelerator: As Lightning has it.

    Returns:
        The validation loss at the end, the seconds that training took, the steps and the kind of device.
    """
    seed_everything(0, verbose=False)
    task = CausalLM("demo:tiny-llama", learning_rate=1e-2)
    data = TinyText(batch_size=8, group_by_length=False)
    data.keep_quiet()
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=STEPS,
            limit_val_batches=0,
            callbacks=[LoraCallback(LoraConfig(r=8, lora_alpha=16))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=place,
        )
        begun = time.perf_counter()
        trainer.fit(task, datamodule=data)
        seconds = time.perf_counter() - begun
        trainer.limit_val_batches = 1.0
        loss = trainer.validate(task, datamodule=data, verbose=False)[0]["val_loss"]
    return {"loss": loss, "seconds": seconds, "steps": STEPS, "device": trainer.strategy.root_device.type}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(json.dumps(train_a_little()))
