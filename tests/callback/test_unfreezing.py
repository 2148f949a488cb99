"""Callbacks that freeze layers and let them train later: their adapters do, to the bit after a resume, the base never.

The names in the docstrings are those of Lightning's tests.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint

from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.adapters.checkpoint import read_checkpoint

CONFIG = LoraConfig(r=2, lora_alpha=4)


class Stepwise(BaseFinetuning):
    """The second layer's adapter trains from the start, the first one's from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=3e-3)


def _finetune(module, make_trainer, folder, callbacks, epochs=4, ckpt_path=None):
    torch.manual_seed(7)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(*callbacks, saver, max_epochs=epochs, default_root_dir=folder)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("order", [1, -1])
def test_unfreezing_a_layer_lets_its_adapter_train_and_never_the_base(module_class, make_trainer, tmp_path, order):
    """test_finetuning_callback and test_freeze_unfreeze_function: whichever of the callbacks comes first."""
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            sizes = [len(group["params"]) for group in trainer.optimizers[0].param_groups]
            seen.append((sizes, bool(pl_module.net[0].lora_B.any())))

    module = module_class()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callbacks = [LoraCallback(CONFIG), Stepwise()][::order]
    trainer = _finetune(module, make_trainer, tmp_path, [*callbacks, Look()], epochs=3)
    assert seen == [([2], False), ([2, 2], True), ([2, 2], True)]
    assert [group["lr"] < 3e-3 * 0.95 for group in trainer.optimizers[0].param_groups] == [False, True]
    for name, p in module.named_parameters():
        assert name not in before or (torch.equal(p, before[name]) and not p.requires_grad and p.grad is None), name


def test_a_layer_that_trains_from_the_first_epoch_on(module_class, make_trainer, tmp_path):
    """test_unfreeze_and_add_param_group_function: groups added before the first batch keep the base out too."""

    class AtOnce(Stepwise):
        def finetune_function(self, pl_module, epoch, optimizer):
            super().finetune_function(pl_module, epoch + 1, optimizer)

    module = module_class()
    before = module.net[0].weight.detach().clone()
    _finetune(module, make_trainer, tmp_path, [AtOnce(), LoraCallback(CONFIG)], epochs=1)
    assert torch.equal(module.net[0].weight, before)
    assert module.net[0].lora_B.any()


@pytest.mark.parametrize("order", [1, -1])
def test_a_finetuning_run_resumes_to_the_bit(module_class, make_trainer, tmp_path, order):
    """test_callbacks_restore and test_base_finetuning_internal_optimizer_metadata: before and after unfreezing."""

    def callbacks():
        return [LoraCallback(CONFIG), Stepwise()][::order]

    whole = module_class()
    _finetune(whole, make_trainer, tmp_path / "whole", callbacks())
    for epoch in range(3):
        module = module_class()
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        trainer = _finetune(module, make_trainer, tmp_path / str(epoch), callbacks(), ckpt_path=path)
        assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]
        for (name, p), (_, other) in zip(module.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(p, other), f"{name} after resuming from epoch {epoch}"
            assert p.requires_grad is other.requires_grad is ("lora" in name)


def test_what_trains_outside_the_adapted_network_is_unfrozen_and_resumed(module_class, make_trainer, tmp_path):
    """test_callbacks_restore_backbone: a backbone beside the adapted network, in full from the second epoch on."""

    class Backbone(module_class):
        def __init__(self):
            super().__init__()
            torch.manual_seed(8)
            self.backbone = torch.nn.Linear(8, 8)

        def loss(self, batch):
            return super().loss((self.backbone(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def callbacks():
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1), LoraCallback(CONFIG, module="net")]

    whole = Backbone()
    first = whole.backbone.weight.detach().clone()
    _finetune(whole, make_trainer, tmp_path / "whole", callbacks())
    assert not torch.equal(whole.backbone.weight, first)
    for epoch in range(3):
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        assert ("backbone.weight" in read_checkpoint(path)["state_dict"]) is (epoch > 0)
        module = Backbone()
        _finetune(module, make_trainer, tmp_path / str(epoch), callbacks(), ckpt_path=path)
        for (name, p), (_, other) in zip(module.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(p, other), f"{name} after resuming from epoch {epoch}"
