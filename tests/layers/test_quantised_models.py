"""Whole models in few bits: files both ways with PEFT, unloading, merging, copies."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import (
    AdapterError,
    LoraCallback,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.layers.bits import bits_of

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4")  # torchao's NF4 does not copy to the bit itself
QLORA = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def _peft(base, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).train()  # for inference bitsandbytes rounds in other ways


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao-int8"])
def test_files_go_to_peft_and_come_back(llama, tokens, quantise, shake, tmp_path, kind, dora):
    base = quantise(llama, kind).train()
    ours, theirs, again = copy.deepcopy(base), copy.deepcopy(base), copy.deepcopy(base)
    inject_lora(ours, LoraConfig(r=4, lora_alpha=8, use_dora=dora))
    shake(ours)
    expected = ours(tokens).logits
    save_adapter(ours, tmp_path / "ours")
    peft = _peft(theirs, tmp_path / "ours")
    torch.testing.assert_close(peft(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    peft.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_those_of_the_plain_model(llama, quantise, kind):
    plain = inject_lora(copy.deepcopy(llama), QLORA)
    few = inject_lora(quantise(llama, kind), QLORA)
    assert (few.trainable_parameters, few.total_parameters) == (plain.trainable_parameters, plain.total_parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_gives_the_base_back_to_the_bit(llama, tokens, quantise, shake, kind):
    base = quantise(llama, kind)
    with torch.no_grad():
        before, logits = copy.deepcopy(base.state_dict()), base(tokens).logits
    classes = [type(module) for module in base.modules()]
    inject_lora(base, QLORA)
    shake(base)
    changed = base(tokens).logits
    assert not torch.allclose(changed, logits)
    with lora_disabled(base), torch.no_grad():
        assert torch.equal(base(tokens).logits, logits)
    unload_lora(base)
    assert [type(module) for module in base.modules()] == classes
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(_equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(base(tokens).logits, logits)


def _equal(one, other):
    if hasattr(one, "__tensor_flatten__"):
        names = one.__tensor_flatten__()[0]
        return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantises_again_and_tells_what_that_takes(llama, tokens, quantise, shake, kind):
    base = quantise(llama, kind)
    inject_lora(base, QLORA)
    shake(base)
    layer = base.model.layers[0].self_attn.q_proj
    wanted = bits_of(layer).numbers(torch.float32) + layer.lora_weight_delta().detach()
    requantised = bits_of(layer).like(wanted).numbers(torch.float32)
    with torch.no_grad():
        adapted = base(tokens).logits
    with pytest.warns(UserWarning, match=r"quantis.*layers\.\d\.[\w.]+"):
        merge_lora(base)
    assert torch.equal(bits_of(layer).numbers(torch.float32), requantised)
    assert not any("lora_" in name for name, _ in base.named_parameters())
    error = float((base(tokens).logits - adapted).detach().abs().max() / adapted.abs().max())
    assert error < {"int8": 0.1, "torchao-int8": 0.1}.get(kind, 0.9)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("kind", ["int8", "torchao-int8"])
def test_other_variants_merge_too(quantised, shake, kind, variant):
    model = nn.Sequential(quantised(nn.Linear(64, 64), kind))
    inject_lora(model, LoraConfig(r=4, lora_alpha=8, **{variant: True}))
    shake(model)
    x = torch.randn(5, 64)
    expected = model(x).detach()
    with pytest.warns(UserWarning, match=r"quantising 1 weights again"):
        merge_lora(model)
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_fails_changes_nothing(llama, tokens, quantise, shake, kind):
    base = quantise(llama, kind)
    inject_lora(base, QLORA)
    shake(base)
    with torch.no_grad():
        before = base(tokens).logits
        last = base.model.layers[1].mlp.down_proj
        kept = last.lora_B.clone()
        last.lora_B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj"):
        merge_lora(base)
    with torch.no_grad():
        last.lora_B.copy_(kept)
        assert torch.equal(base(tokens).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(llama, tokens, quantise, shake, kind):
    base = quantise(llama, kind)
    inject_lora(base, QLORA)
    shake(base)
    base(tokens)
    expected = base(tokens).logits
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(twin(tokens).logits, expected)
        assert type(twin.model.layers[0].mlp.up_proj) is type(base.model.layers[0].mlp.up_proj)
        twin(tokens).logits.sum().backward()
        assert twin.model.layers[0].mlp.up_proj.lora_B.grad.abs().sum() > 0
        unload_lora(twin)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_an_activated_adapter(llama, quantise, kind):
    base = quantise(llama, kind)
    tokens = torch.tensor([[5, 6, 1, 2, 9, 8], [5, 6, 3, 3, 9, 8]])
    with torch.no_grad():
        before = base(tokens).logits
        inject_lora(base, LoraConfig(r=4, init_lora_weights=False, alora_invocation_tokens=[1, 2]))
        moved = (base(tokens).logits - before).abs().amax(-1) > 0
    assert moved.tolist() == [[False, False, True, True, True, True], [False] * 6]


def test_a_layer_in_few_bits_cannot_be_trained_in_full(llama, quantise):
    with pytest.raises(LoraConfigError, match=r"mlp cannot be trained in full: its weight is quantised"):
        inject_lora(quantise(llama, "nf4"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))


def test_the_state_has_nothing_of_a_frozen_base_outside_the_root(llama, quantised):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.other = llama, quantised(nn.Linear(64, 64), "nf4")

    around = Around().requires_grad_(False)
    inject_lora(around, QLORA)
    assert all("lora_" in name for name in lora_state_dict(around))


@pytest.mark.parametrize("by_callback", [False, True])
def test_inference_leaves_the_gradients_through_what_lies_around_the_adapted_model(
    llama, quantised, by_callback, tmp_path
):
    class Around(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.head = llama, quantised(nn.Linear(64, 64), "nf4")

        def training_step(self, tokens):
            return self.head(self.model(tokens).logits).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    around, tokens = Around(), torch.arange(12)[None]
    if by_callback:
        callback = LoraCallback({**QLORA.to_dict(), "init_lora_weights": False}, module="model")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = pl.Trainer(fast_dev_run=True, callbacks=[callback], default_root_dir=tmp_path, **quiet)
        trainer.fit(around, DataLoader(tokens))
    else:
        inject_lora(around, replace(QLORA, init_lora_weights=False))
    with torch.no_grad():
        around.eval().head(torch.ones(1, 64))
    around.zero_grad()
    around.train().training_step(tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(around).values())


@pytest.mark.parametrize("more", [{"target_modules": ["q_proj", "v_proj"]}, {"alora_invocation_tokens": [5]}])
def test_inference_before_training_leaves_the_gradients(llama, tokens, quantise, more):
    """On some CPUs bitsandbytes packs every layer for inference, adapted or not, and that has no gradient."""
    base = quantise(llama, "nf4").train()
    tokens[:, 1] = 5
    found = []
    for before_injection, before_training in ((False, False), (False, True), (True, True)):
        model = copy.deepcopy(base)
        for inference, inject in ((before_injection, True), (before_training, False)):
            if inference:
                with torch.no_grad():
                    model.eval()(input_ids=tokens)
            if inject:
                packs = model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
                inject_lora(model, LoraConfig(r=4, init_lora_weights=False, **more), seed=1)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        unload_lora(model)
        assert model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu == packs
    assert all(gradient.abs().sum() > 0 for gradient in found[0].values())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    # Packed before, the scales have been rounded already.
    torch.testing.assert_close(found[2], found[0], rtol=0.05, atol=0.01)
