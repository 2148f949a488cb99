"""Adapters over bases in few bits: right against the plain layer over the same numbers, and against PEFT."""

from __future__ import annotations

import copy
import warnings
import weakref

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
    lora_parameters,
    lora_state_dict,
    merge_lora,
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
    model.zero_grad()
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


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
def test_the_weight_as_numbers_is_not_kept_for_backward(quantised, monkeypatch, kind, dora):
    few, _ = _pair(quantised, kind, use_dora=dora)
    x, kept, made = torch.randn(5, 64, requires_grad=True), [], []
    bits = type(bits_of(few[0]))
    numbers = bits.numbers
    monkeypatch.setattr(bits, "numbers", lambda *a: made.append(weakref.ref(w := numbers(*a))) or w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = few(x)
    assert max(t.numel() for t in kept if t.is_floating_point()) <= 5 * 128
    assert sum(t.shape == x.shape for t in kept) == 1  # the input, once
    y.sum().backward()
    assert made
    assert all(weight() is None for weight in made)


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
    _close([t.float() for t in half], _gradients(plain, x), rtol=0.1, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao-int8"])
def test_on_a_gpu(quantised, kind):
    few, plain = _pair(quantised, kind, compute_dtype=torch.bfloat16, lora_dropout=0.1)
    x = torch.randn(64, 64, device="cuda").bfloat16()
    found = _gradients(few.to("cuda"), x)
    assert found[2].dtype == torch.float32
    assert few[0].lora_A.is_cuda
    with torch.autocast("cuda", torch.bfloat16):
        expected = _gradients(plain.to("cuda"), x)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).norm() < 0.05 * other.float().norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(quantised, reentrant):
    few, _ = _pair(quantised, "nf4", lora_dropout=0.2)
    x = torch.randn(6, 64)
    expected = _gradients(few, x)
    inner = few.forward
    few.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    _close(_gradients(few, x), expected, rtol=0, atol=1e-7)


def test_compiled_it_goes_through_the_librarys_own_operations(quantised):
    few, _ = _pair(quantised, "nf4")
    x = torch.randn(6, 64)
    expected = _gradients(few, x)
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


def test_a_base_that_has_been_used_for_inference_trains(quantised):
    few = nn.Sequential(quantised(nn.Linear(64, 128), "nf4"))
    x = torch.randn(4, 64)
    few.eval()
    with torch.no_grad():
        few(x)  # which changes the layout of the weight on some CPUs
    inject_lora(few.train(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), seed=3)
    plain = nn.Sequential(nn.Linear(64, 128))
    with torch.no_grad():
        plain[0].weight.copy_(bits_of(few[0]).numbers(torch.float32))
        plain[0].bias.copy_(few[0].bias)
    inject_lora(plain, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), seed=3)
    _close(_gradients(few, x), _gradients(plain, x), rtol=0.02, atol=0.02)
    with pytest.warns(UserWarning, match="quantised base"):
        merge_lora(few)
    torch.testing.assert_close(few(x), plain(x), rtol=0.5, atol=0.5)


class _OneWay(torch.Tensor):
    """As torchao's classes for one kernel: a product with it is all that it can."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.detach:
                return func(args[0]).as_subclass(cls)
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


def test_dora_waits_for_the_weight_that_it_will_train_on():
    import bitsandbytes as bnb

    with pytest.raises(LoraConfigError, match="not quantised yet: move the model to its device"):
        inject_lora(nn.Sequential(bnb.nn.Linear4bit(64, 64)), LoraConfig(r=2, use_dora=True))


@pytest.mark.parametrize("dora", [False, True])
def test_eight_bits_made_anew_at_each_forward(dora):
    """bitsandbytes' ``has_fp16_weights``: the weight itself is plain, its products are in 8 bits."""
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)).to("cpu").eval()
    inject_lora(model, LoraConfig(r=2, init_lora_weights=False, use_dora=dora))
    x = torch.randn(5, 64)
    expected = model(x)
    expected.sum().backward()
    assert model[0].lora_A.grad.abs().sum() > 0
    merge_lora(model)
    model.requires_grad_(False)  # a weight that trains wants kernels for CUDA
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.1)


def test_adapters_of_a_layer_that_is_quantised_afterwards():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"))
    inject_lora(model, LoraConfig(r=2, init_lora_weights=False))
    model.to("cpu")
    assert model[0].weight.shape == (1024, 1)
    _close([model(torch.eye(64)).detach()], [bits_of(model[0]).numbers().t() + model[0].lora_weight_delta().t().detach()
                                             + model[0].bias.detach()])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_quantised_layers_train(quantised, kind):
    few, plain = _pair(quantised, kind, bias="lora_only")
    x = torch.randn(3, 64)
    _close(_gradients(few, x), _gradients(plain, x))
    assert few[0].bias.grad is not None
