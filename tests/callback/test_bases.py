"""Which base an adapter was trained over: adapters folded in before it, and the weights themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraCallback,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_from_checkpoint,
    lora_disabled,
    save_adapter,
)
from lora_lightning.injection.state import record_of, the_root

CONFIG = LoraConfig(r=2, lora_alpha=4)
OTHER_BASE = "trained on another base model"


@pytest.fixture
def folders(make_network, shake, tmp_path):
    """Two saved adapters of the network, unlike each other."""
    saved = []
    for number in (1, 2):
        network = make_network()
        inject_lora(network, CONFIG)
        shake(network, size=0.1 * number)
        saved.append(save_adapter(network, tmp_path / f"before{number}"))
    return saved


@pytest.fixture
def fitted(module_class, make_network, make_trainer):
    """Trains a module, over adapters folded in before if so asked, and gives it with its checkpoint."""

    def fit(base_adapter=None, build=lambda cls, net: cls(net), **options):
        module = build(module_class, make_network())
        trainer = make_trainer(
            LoraCallback({"r": 1}, base_adapter=base_adapter, **options), ModelCheckpoint(), max_epochs=2
        )
        trainer.fit(module)
        return module.eval(), trainer.checkpoint_callback.best_model_path

    return fit


def predictions(module):
    with torch.no_grad():
        return module.eval().net(torch.linspace(-1, 1, 32).reshape(4, 8))


def validate(make_trainer, module, path, **options):
    make_trainer(LoraCallback({"r": 1}, module="net", **options)).validate(module, ckpt_path=path, verbose=False)


def test_a_checkpoint_over_another_chain_of_adapters_is_refused(folders, fitted, module_class, make_trainer):
    _, path = fitted(folders[0], module="net")
    chain = rf"adapters folded into the base: %s here, \['{folders[0]}'\] there"
    with pytest.raises(AdapterError, match=chain % "none"):
        validate(make_trainer, module_class(), path)
    with pytest.raises(AdapterError, match=chain % rf"\['{folders[1]}'\]"):
        validate(make_trainer, module_class(), path, base_adapter=folders[1])


def test_a_checkpoint_over_other_weights_is_warned_of(fitted, module_class, make_network, make_trainer):
    _, path = fitted(module="net")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{OTHER_BASE}")
        validate(make_trainer, module_class(), path)
    other = make_network()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    with pytest.warns(UserWarning, match=OTHER_BASE):
        validate(make_trainer, module_class(other), path)


def test_a_checkpoint_without_this_adapter_names_those_it_has(fitted, module_class, make_trainer):
    _, path = fitted(module="net")
    with pytest.raises(AdapterError, match="holds no adapter 'style', only default"):
        validate(make_trainer, module_class(), path, name="style")


def test_load_from_checkpoint_folds_in_what_was_folded_in(folders, fitted, module_class, make_network):
    module, path = fitted(folders[0], module="net")
    loaded = load_from_checkpoint(module_class, path, net=make_network())
    torch.testing.assert_close(predictions(loaded), predictions(module))
    torch.testing.assert_close(loaded.net[0].weight, module.net[0].weight)
    assert not torch.equal(loaded.net[0].weight, make_network()[0].weight)
    assert record_of(the_root(loaded)[1]).bases == (str(folders[0]),)


def test_an_adapter_over_another_brings_what_lies_below_it(folders, fitted, module_class, make_network, tmp_path):
    middle, _ = fitted(folders[0], module="net")
    second = save_adapter(middle.net, tmp_path / "second")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the base model is not the one")
        module, path = fitted(second, module="net")
    with lora_disabled(module.net):
        torch.testing.assert_close(predictions(module), predictions(middle))
    assert record_of(the_root(module)[1]).bases == (str(folders[0]), str(second))
    loaded = load_from_checkpoint(module_class, path, net=make_network())
    torch.testing.assert_close(predictions(loaded), predictions(module))


# The folders' names are those below the network, so they can be folded in there only.
@pytest.mark.parametrize(("below", "folded"), [(None, False), ("net", False), ("net", True)])
def test_load_from_checkpoint_finds_a_network_that_setup_builds(
    folders, fitted, module_class, make_network, below, folded
):
    class InSetup(module_class):
        def __init__(self):
            super().__init__(net=nn.Identity())

        def setup(self, stage):
            self.stage = stage
            if isinstance(self.net, nn.Identity):
                self.net = make_network()

    module, path = fitted(folders[0] if folded else None, build=lambda *_: InSetup(), module=below)
    loaded = load_from_checkpoint(InSetup, path)
    assert loaded.stage == "predict"
    torch.testing.assert_close(predictions(loaded), predictions(module))


@pytest.mark.parametrize("below", [None, "net"])
def test_what_does_not_fit_is_told_where_no_setup_could_build_it(fitted, module_class, below):
    class Elsewhere(module_class):
        def __init__(self):
            super().__init__()
            self.net, self.body = None, nn.ReLU()

    _, path = fitted(module=below)
    with pytest.raises(
        AdapterError, match=rf"(?s)\.ckpt does not fit this Elsewhere: .*{below or 'no layer to adapt'}"
    ):
        load_from_checkpoint(Elsewhere, path)


def test_nothing_is_folded_into_a_model_that_is_injected_already(folders, module_class, make_trainer):
    module = module_class()
    inject_lora(module.net, CONFIG)
    before = module.net[0].weight.clone()
    with pytest.raises(LoraConfigError, match="has to be folded in before injection"):
        make_trainer(LoraCallback(base_adapter=folders[0], module="net")).fit(module)
    assert torch.equal(module.net[0].weight, before)


def test_what_is_folded_in_is_so_once(folders, module_class, make_trainer):
    module, callback = module_class(), LoraCallback({"r": 1}, base_adapter=folders[0], module="net")
    make_trainer(callback, fast_dev_run=True).fit(module)
    before = module.net[0].weight.clone()
    make_trainer(callback, fast_dev_run=True).fit(module)
    assert torch.equal(module.net[0].weight, before)
