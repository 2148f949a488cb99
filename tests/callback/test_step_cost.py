"""What a step costs beside its arithmetic: nothing that grows with the model's modules."""

import lightning.pytorch as pl
from torch import nn

from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.injection import names


def test_no_step_but_the_first_walks_the_model(module_class, make_trainer, monkeypatch):
    walks = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            walks.append("a batch")

    def counted(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: walks.append(name) or original(*args, **kwargs))

    counted(names, "_walk")
    counted(nn.Module, "named_modules")
    trainer = make_trainer(LoraCallback(LoraConfig(r=2)), Count(), gradient_clip_val=1.0, limit_val_batches=0)
    trainer.fit(module_class())
    second = walks.index("a batch", walks.index("a batch") + 1)
    last = len(walks) - walks[::-1].index("a batch")
    assert walks[second:last] == ["a batch"] * 4
