"""Adapters over bases in few bits: right against the plain layer over the same numbers, and against PEFT."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import (
    AdapterError,
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
from lora_lightning.layers import LoraLinear, is_quantised
from lora_lightning.layers.bits import bits_of

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "torchao-nf4")
QLORA = LoraConfig(r=4, lora_alpha=8)


def _pair(quantised, kind, n_in=64, n_out=128, with_bias=True, compute_dtype=None, **config):
    """A layer in few bits and a plain one over the numbers that those are, with equal adapters."""
    few = nn.Sequential(quantised(nn.Linear(n_in, n_out, with_bias), kind, compute_dtype))
    plain = nn.Sequential(nn.Linear(n_in, n_out, with_bias))
    with torch.no_grad():
        plain[0].weight.copy_(bits_of(few[0]).numbers(torch.float32))
        if with_bias:
            plain[0].bias.copy_(few[0].bias)
    for model in (few, plain):
        inject_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **config}), seed=3)
    return few, plain


def _gradients(model, x, dropout_seed=0):
    x = x.clone().requires_grad_(True)
    torch.manual_seed(dropout_seed)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in lora_parameters(model).values())]


def _close(one, other, rtol=1e-5, atol=1e-5):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol * max(1.0, float(right.abs().max())))


VARIANTS = [{}, {"use_dora": True}, {"lora_bias": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_over_the_same_numbers(quantised, kind, variant):
    few, plain = _pair(quantised, kind, **variant)
    assert type(few[0]).__name__.startswith("Lora")
    assert isinstance(few[0], nn.Linear)
    assert not isinstance(few[0], LoraLinear)
    assert (few[0].lora_A.shape, few[0].lora_B.shape, few[0].lora_A.dtype) == ((4, 64), (128, 4), torch.float32)
    x = torch.randn(2, 3, 64)
    _close(_gradients(few, x), _gradients(plain, x))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS[:5]),
    n_in=st.integers(1, 5).map(lambda n: 16 * n),
    n_out=st.integers(1, 5).map(lambda n: 8 * n),
    leading=st.lists(st.integers(1, 3), max_size=2),
    r=st.integers(1, 9),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_any_shape_rank_and_dropout(quantised, kind, n_in, n_out, leading, r, bias, dropout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks larger than the layer
        few, plain = _pair(quantised, kind, n_in, n_out, bias, r=r, lora_dropout=dropout)
    x = torch.randn(*leading, n_in)
    _close(_gradients(few, x), _gradients(plain, x))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_as_numbers_is_not_kept_for_backward(quantised, kind, dora):
    few, _ = _pair(quantised, kind, use_dora=dora)
    x, kept = torch.randn(5, 64, requires_grad=True), []

    def numbers():
        gc.collect()
        return sum(isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() == 64 * 128
                   for t in gc.get_objects() if type(t) is torch.Tensor)  # fmt: skip

    before = numbers()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = few(x)
    assert y.requires_grad
    assert max(t.numel() for t in kept if t.is_floating_point()) <= 5 * 128
    assert sum(t.shape == x.shape for t in kept) == 1  # the input, once
    kept.clear()
    assert numbers() == before


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_to_the_bit(quantised, kind):
    few = nn.Sequential(quantised(nn.Linear(64, 128), kind))
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = few(x)
    inject_lora(few, QLORA)
    assert torch.equal(few(x), before)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_half_precision_inputs_and_autocast(quantised, kind):
    few, plain = _pair(quantised, kind, with_bias=False, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _gradients(few, x)
    assert mixed[1].dtype == mixed[2].dtype == torch.float32
    _close([t.float() for t in mixed], _gradients(plain, x), rtol=0.1, atol=0.05)
    half = _gradients(few, x.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    _close([t.float() for t in half], [2 * t if i > 1 else t for i, t in enumerate(_gradients(plain, x))], 0.2, 0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(quantised, reentrant):
    few, _ = _pair(quantised, "nf4", lora_dropout=0.2)
    x = torch.randn(6, 64)
    expected = _gradients(few, x)
    few.zero_grad()
    inner = few.forward
    few.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    _close(_gradients(few, x), expected, rtol=0, atol=1e-7)


def test_compiled_it_goes_through_the_librarys_own_operations(quantised):
    few, _ = _pair(quantised, "nf4")
    x = torch.randn(6, 64)
    expected = _gradients(few, x)
    few.zero_grad()
    compiled = torch.compile(few, backend="eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)


def test_what_inference_on_some_cpus_lays_otherwise_is_read_all_the_same(quantised):
    from bitsandbytes import functional

    convert = getattr(functional, "_convert_weight_packed_for_cpu", None)
    if convert is None:
        pytest.skip("this bitsandbytes has no such layout")
    layer = quantised(nn.Linear(64, 128), "nf4")
    before = bits_of(layer).numbers(torch.float32)
    layer.weight.data, layer.weight.quant_state = convert(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(
        bits_of(layer).numbers(torch.float32), before, rtol=1e-2, atol=1e-3
    )  # scales are rounded
    assert layer.weight.quant_state.packing_format_for_cpu


class _OneWay(torch.Tensor):
    """As torchao's classes for one kernel: a product with it is all that it can."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear:
                return func(args[0], args[1].as_subclass(torch.Tensor), *args[2:])
            return func(*args, **(kwargs or {}))


_OneWay.__module__ = "torchao.somewhere"


def test_a_tensor_class_that_only_multiplies():
    layer = nn.Linear(8, 5)
    values = layer.weight.detach().clone()
    layer.weight = nn.Parameter(values.as_subclass(_OneWay), requires_grad=False)
    assert is_quantised(layer)
    torch.testing.assert_close(bits_of(layer).numbers(), values)
    model = nn.Sequential(layer)
    inject_lora(model, LoraConfig(r=2, init_lora_weights=False))
    before = copy.deepcopy(lora_state_dict(model))
    with pytest.raises(AdapterError, match="_OneWay cannot be made anew"):
        merge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in lora_state_dict(model).items())


# ---- whole models


def _peft(base, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao-int8"])
def test_files_go_to_peft_and_come_back(llama, tokens, quantise, shake, tmp_path, kind, dora):
    base = quantise(llama, kind)
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
    adapted = base(tokens).logits
    with pytest.warns(UserWarning, match=r"quantis.*layers\.\d\.[\w.]+"):
        merge_lora(base)
    assert torch.equal(bits_of(layer).numbers(torch.float32), requantised)
    assert not lora_named(base)
    error = float((base(tokens).logits - adapted).abs().max() / adapted.abs().max())
    assert error < {"int8": 0.1, "torchao-int8": 0.1}.get(kind, 0.9)


def lora_named(model):
    return [name for name, _ in model.named_parameters() if "lora_" in name]


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


def test_a_layer_in_few_bits_cannot_be_trained_in_full(llama, quantise):
    with pytest.raises(LoraConfigError, match=r"mlp cannot be trained in full: its weight is quantised"):
        inject_lora(quantise(llama, "nf4"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))


def test_dora_waits_for_the_weight_that_it_will_train_on():
    import bitsandbytes as bnb

    with pytest.raises(LoraConfigError, match="not quantised yet: move the model to its device"):
        inject_lora(nn.Sequential(bnb.nn.Linear4bit(64, 64)), LoraConfig(r=2, use_dora=True))


def test_adapters_of_a_layer_that_is_quantised_afterwards():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"))
    inject_lora(model, LoraConfig(r=2, init_lora_weights=False))
    model.to("cpu")
    assert model[0].weight.shape == (1024, 1)
    _close([model(torch.eye(64)).detach()], [bits_of(model[0]).numbers().t() + model[0].lora_weight_delta().t().detach()
                                             + model[0].bias.detach()])  # fmt: skip


def test_the_state_has_nothing_of_a_frozen_base_outside_the_root(llama, quantised):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.other = llama, quantised(nn.Linear(64, 64), "nf4")

    around = Around().requires_grad_(False)
    inject_lora(around, QLORA)
    assert all("lora_" in name for name in lora_state_dict(around))


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_quantised_layers_train(quantised, kind):
    few, plain = _pair(quantised, kind, bias="lora_only")
    x = torch.randn(3, 64)
    _close(_gradients(few, x), _gradients(plain, x))
    assert few[0].bias.grad is not None
