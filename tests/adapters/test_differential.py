"""Every kind of layer under every variant against PEFT: outputs, gradients and merged weights of the same adapter.

An adapter is made here, saved, and read by PEFT over the same base; PEFT saves it, and it is read here again. Cases are
generated. Where PEFT is wrong or cannot do it, the case is left out here and is checked against the mathematics where
its layer is tested: dilated convolutions and padding other than zeros, DoRA in groups, attentions. What PEFT cannot
merge, a convolution in groups, is refused here.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    AdapterError,
    LoraConfig,
    inject_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from lora_lightning.adapters.peft_names import as_written_here, peft_names
from lora_lightning.injection.state import the_root

EXACT = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
small = st.integers(1, 5)


class Net(nn.Module):
    """Two layers of one kind, so that patterns can tell them apart."""

    def __init__(self, make, dtype):
        super().__init__()
        self.config = {"model_type": "none"}
        self.first, self.second = make(), make()
        self.to(dtype)

    def forward(self, x):
        return self.first(x) + 0.5 * self.second(x)


def linear(draw):
    n_in, n_out, bias = draw(small), draw(small), draw(st.booleans())
    return lambda: nn.Linear(n_in, n_out, bias=bias), (*draw(st.lists(small, min_size=1, max_size=2)), n_in)


def conv1d_of_transformers(draw):
    n_in, n_out = draw(small), draw(small)
    return lambda: Conv1D(n_out, n_in), (2, draw(small), n_in)


def embedding(draw):
    rows, width = draw(st.integers(3, 9)), draw(small)
    return lambda: nn.Embedding(rows, width), (draw(small), draw(small), rows)


def convolution(dims):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def make(draw):
        groups = draw(st.sampled_from([1, 1, 2]))
        n_in, n_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
        kernel = draw(st.integers(1 + (dims == 3), 3))  # PEFT fails to merge one of 1 x 1 x 1
        stride, padding, bias = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
        shape = (2, n_in, *[draw(st.integers(3, 5)) for _ in range(dims)])
        options = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
        return lambda: kind(n_in, n_out, kernel, **options), shape

    return make


KINDS = {
    "Linear": linear,
    "Conv1D": conv1d_of_transformers,
    "Embedding": embedding,
    **{kind: convolution(dims) for dims, kind in enumerate(("Conv1d", "Conv2d", "Conv3d"), 1)},
}
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "patterns": {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3.0}},
}
CASES = [(kind, variant) for kind in KINDS for variant in VARIANTS if (kind, variant) != ("Embedding", "bias of B")]


@st.composite
def cases(draw, kind, variant):
    make, shape = KINDS[kind](draw)
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    base = Net(make, dtype)
    x = torch.randint(shape[-1], shape[:-1]) if kind == "Embedding" else torch.randn(shape, dtype=dtype)
    groups = getattr(base.first, "groups", 1)
    if groups > 1 and variant == "dora":
        groups = 1
        base = Net(lambda: type(base.first)(x.shape[1], 3, 2), dtype)
    settings = dict(VARIANTS[variant])
    if variant == "bias of B" and getattr(base.first, "bias", None) is None:
        settings.pop("lora_bias")  # nothing to merge it into
    r = groups * draw(st.integers(1, 4))
    if "rank_pattern" in settings:
        settings["rank_pattern"] = {"first": groups * draw(st.integers(1, 3))}
    config = {"r": r, "lora_alpha": draw(st.integers(1, 20)), "target_modules": ["first", "second"], **settings}
    return base, x, config, dtype


@pytest.mark.parametrize(("kind", "variant"), CASES)  # neither has a bias of B in embeddings
def test_the_same_as_peft(kind, variant):
    @settings(max_examples=8, deadline=None, database=None)
    @given(cases(kind, variant))
    def check(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tempfile.TemporaryDirectory() as folder:
                compare(*case, Path(folder))

    check()


def compare(base, x, config, dtype, folder):
    near = EXACT[dtype]
    ours = copy.deepcopy(base)
    inject_lora(ours, LoraConfig(**config, init_lora_weights=False), seed=1)
    for name, parameter in lora_parameters(ours).items():
        if name.endswith(("magnitude", "bias")):
            parameter.data.add_(0.1 * torch.rand_like(parameter))
    save_adapter(ours, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours", is_trainable=True)

    out = ours(x)
    torch.testing.assert_close(theirs(x), out, **near)
    probe = torch.randn(out.shape, dtype=dtype)
    (out * probe).sum().backward()
    (theirs(x) * probe).sum().backward()
    assert_gradients_equal(ours, theirs, near)

    theirs.save_pretrained(folder / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, folder / "theirs")
    torch.testing.assert_close(again(x), out, rtol=0, atol=0)

    if getattr(base.first, "groups", 1) > 1:
        with pytest.raises(AdapterError, match="has groups=2"):
            merge_lora(ours)
        return
    merge_lora(ours)
    merged = theirs.merge_and_unload(safe_merge=True)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, **near)
    torch.testing.assert_close(ours(x), out, **near)


def assert_gradients_equal(ours, theirs, near):
    names = peft_names(the_root(ours)[1])
    expected = {
        as_written_here(name.replace(".default", "")): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    found = {names[name]: parameter.grad for name, parameter in lora_parameters(ours).items()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **near)
