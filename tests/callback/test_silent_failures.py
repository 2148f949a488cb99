"""What would go wrong without a word, told."""

import pytest
import torch
from torch import nn

from lora_lightning import AdapterError, LoraCallback, LoraConfig, load_adapter, lora_parameters, lora_state_dict

CONFIG = LoraConfig(r=2, lora_alpha=4)


class TwoWays(nn.Module):
    """A network of which one layer is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.used, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.used(x)


def test_adapters_without_gradient_are_named(module_class, make_trainer):
    message = r"2 of 4 adapter tensors got no gradient in the first step, first net\.unused"
    with pytest.warns(UserWarning, match=message):
        make_trainer(LoraCallback(CONFIG)).fit(module_class(TwoWays()))


def test_the_first_step_of_a_sound_run_says_nothing(module_class, make_trainer, recwarn):
    make_trainer(LoraCallback(LoraConfig(r=2, lora_dropout=0.5))).fit(module_class())
    assert not [w for w in recwarn if "no gradient" in str(w.message) or "eval mode while" in str(w.message)]


def test_a_module_that_puts_itself_into_eval_mode_is_told_about_dropout(module_class, make_trainer):
    class Sleeps(module_class):
        def on_train_start(self):
            self.net.eval()

    with pytest.warns(UserWarning, match="2 of 2 LoRA layers are in eval mode while training"):
        make_trainer(LoraCallback(LoraConfig(r=2, lora_dropout=0.5))).fit(Sleeps())


def test_the_last_good_adapter_is_written_when_gradients_are_not_finite(module_class, make_trainer, make_network):
    class Diverges(module_class):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.trainer.global_step == 3 else 1.0)

    module, callback = Diverges(), LoraCallback(CONFIG)
    with pytest.raises(AdapterError, match=r"step 3.*first net\.0\.lora_A"):
        make_trainer(callback).fit(module)
    fresh = module_class(make_network())
    load_adapter(fresh, callback.adapter_path)
    good = lora_parameters(module)
    assert all(p.isfinite().all() for p in good.values())
    assert all(torch.equal(lora_state_dict(fresh)[name], p) for name, p in good.items())
    assert any(p.abs().sum() > 0 for name, p in good.items() if name.endswith("lora_B"))  # three steps are in it
