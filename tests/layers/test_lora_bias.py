"""A bias on ``B``: against the formula in float64, against PEFT's layers and files, and past every short cut."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.layers.bias import BiasLayer
from lora_lightning.layers.group import LoraGroup

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _conv1d(bias):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": lambda bias: nn.Linear(6, 5, bias=bias),
    "own forward": lambda bias: Doubled(6, 5, bias=bias),
    "Conv1D": _conv1d,
}


def _injected(model, **fields):
    fields = {"r": 3, "lora_alpha": 6, "lora_bias": True, "init_lora_weights": True, **fields}
    report = inject_lora(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if "lora_" in name:
                p.add_(torch.randn_like(p))
    return report


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.booleans(), st.integers(1, 4), st.booleans())
def test_outputs_gradients_and_merging(kind, bias, r, rslora):
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[kind](bias)).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    base = model(x)
    _injected(model, r=r, use_rslora=rslora)
    layer = model[0]
    a, b, c = (p.detach().clone().requires_grad_() for p in layer.lora_own.values())
    wanted = base + layer.lora_scaling * (x @ a.t() @ b.t() + c)
    out = model(x)
    torch.testing.assert_close(out, wanted, **EXACT)
    got = torch.autograd.grad(out.square().sum(), list(layer.lora_own.values()))
    for one, other in zip(got, torch.autograd.grad(wanted.square().sum(), [a, b, c]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if layer.bias is not None:
        merge_lora(model)
        torch.testing.assert_close(model(x), out.detach(), **EXACT)
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="not merged:\n  - 0 has no bias"):
        merge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_drops_nothing_of_the_bias():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    _injected(model, lora_dropout=0.5)
    layer = model[0]
    layer.lora_A.data.zero_()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        model(x), x @ layer.weight.t() + layer.bias + layer.lora_scaling * layer.lora_B_bias, **EXACT
    )


def test_it_starts_as_zero_and_trains():
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    before = model(x)
    report = inject_lora(model, LoraConfig(r=2, lora_bias=True))
    assert torch.equal(model(x), before)
    assert set(lora_parameters(model)) == {"0.lora_A", "0.lora_B", "0.lora_B_bias"}
    assert report.rows[0].parameters == 2 * 11 + 5
    model(x).sum().backward()
    torch.testing.assert_close(model[0].lora_B_bias.grad, torch.full((5,), 3 * 4.0))
    state = copy.deepcopy(model.state_dict())
    unload_lora(model)
    assert type(model[0]) is nn.Linear
    assert {name for name in state if "lora_" in name}.isdisjoint(model.state_dict())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_reads_ours_and_we_read_theirs(name, request, tokens, tmp_path):
    base = request.getfixturevalue(name).double().eval()
    ours = copy.deepcopy(base)
    fields = {"target_modules": ["c_attn", "c_fc"]} if name == "gpt2" else {"target_modules": ["q_proj", "up_proj"]}
    _injected(ours, **fields, use_rslora=True)
    logits = ours(tokens).logits
    folder = save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(tokens).logits, logits)
    if name == "gpt2":
        merge_lora(ours)
        torch.testing.assert_close(ours(tokens).logits, logits, **EXACT)
        merged = theirs.merge_and_unload().state_dict()
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, merged[key], **EXACT)


def test_no_short_cut_loses_the_bias(llama, tokens):
    """Groups of layers on one input, gated blocks: each layer counts, and takes the plain way."""
    base = copy.deepcopy(llama)
    _injected(llama)
    layers = [part for part in llama.modules() if isinstance(part, BiasLayer)]
    assert len(layers) == 14
    assert not any(isinstance(vars(part).get("lora_group"), LoraGroup) for part in layers)
    logits = llama(tokens).logits
    for layer in layers:
        kept = layer.lora_B_bias.detach().clone()
        layer.lora_B_bias.data.zero_()
        assert not torch.allclose(llama(tokens).logits, logits, atol=1e-6)
        layer.lora_B_bias.data.copy_(kept)
    with lora_disabled(llama):
        torch.testing.assert_close(llama(tokens).logits, base(tokens).logits)


def test_half_precision_bases():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    half = copy.deepcopy(model).bfloat16()
    for each in (model, half):
        torch.manual_seed(1)
        _injected(each)
    assert half[0].lora_B_bias.dtype == torch.float32
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.2)
    out.sum().backward()
    assert half[0].lora_B_bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "lora_bias does not go with use_dora"),
        ({"init_lora_weights": "pissa"}, "lora_bias goes with init_lora_weights=true or false only, got 'pissa'"),
        ({"init_lora_weights": "gaussian"}, "lora_bias goes with init_lora_weights"),
    ],
)
def test_peft_s_refusals_of_settings(fields, message):
    with pytest.raises(LoraConfigError, match=message) as told:
        LoraConfig(lora_bias=True, **fields)
    assert str(told.value).count("lora_bias") == 1
    with pytest.raises(ValueError, match="lora_bias=True is"):
        peft.LoraConfig(lora_bias=True, **fields)


def test_a_base_without_a_bias_is_told_when_the_adapter_is_made():
    with pytest.warns(UserWarning, match=r"no bias in the base that it could be merged into: 0$"):
        inject_lora(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)), LoraConfig(r=2, lora_bias=True))


def test_embeddings_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(LoraConfigError, match="lora_bias does not go with a layer of class Embedding"):
        inject_lora(model, LoraConfig(lora_bias=True, target_modules=["0"]))
