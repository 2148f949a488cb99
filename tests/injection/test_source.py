"""What the source of a forward says, for forwards that say it in many ways."""

import functools

import pytest
import torch
from torch import nn

from lora_lightning.injection.source import called_on_one_input, is_formula
from lora_lightning.layers.gated import FORMULA
from lora_lightning.layers.norm import FORMULAS


class Plain(nn.Module):
    def forward(self, x, mask=None):
        """Words."""
        q, k = self.q(x).view(2, -1), self.norm(self.k(x))
        if mask is not None:
            k = k + mask
        v = self.v(x)
        return self.o(q + k + v)


class Reassigned(nn.Module):
    def forward(self, x):
        q = self.q(x)
        x = x + 1
        return q + self.k(x) + self.v(x)


class ReassignedInABranch(nn.Module):
    def forward(self, x, other=None):
        q = self.q(x)
        if other is not None:
            x = other
        return q + self.k(x)


class WrittenInto(nn.Module):
    def forward(self, x, y):
        q = self.q(x)
        x.mul_(2)
        k = self.k(x)
        x[0] = 1
        v = self.v(x)
        y += 1  # may be the same by another name
        o, g = self.o(x), self.g(x)
        torch.relu(y, out=y)
        return q + k + v + o + g + self.m(x)


class Conditional(nn.Module):
    def forward(self, x, other=None):
        q = self.q(x)
        k = self.k(x) if other is None else self.k(other)
        return q + k + (self.training and self.v(x))


class LeftEarly(nn.Module):
    def forward(self, x, cached=None):
        q = self.q(x)
        if cached is not None:
            return q + cached
        return q + self.k(x)


class Twice(nn.Module):
    def forward(self, x):
        return self.q(x) + self.k(x) + self.q(x)


class WithMore(nn.Module):
    def forward(self, x):
        return self.q(x, 1) + self.k(x=x) + self.v(x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Plain, (("q", "k", "v"),)),
        (Reassigned, (("k", "v"),)),
        (ReassignedInABranch, ()),
        (Conditional, ()),
        (WrittenInto, (("o", "g"),)),
        (LeftEarly, ()),
        (Twice, ()),
        (WithMore, ()),
        (nn.Linear, ()),
        (nn.Identity, ()),
    ],
)
def test_parts_that_are_always_called_on_one_variable(kind, expected):
    assert called_on_one_input(kind) == expected


def test_attention_and_feed_forward_of_transformers():
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5Attention

    assert called_on_one_input(LlamaAttention) == (("q_proj", "k_proj", "v_proj"),)
    assert ("query", "key", "value") in called_on_one_input(BertSelfAttention)
    assert called_on_one_input(T5Attention) in ((), (("k", "v"),))  # by version; q has an input of its own
    assert is_formula(LlamaMLP, FORMULA)
    assert any(is_formula(LlamaRMSNorm, formula) for formula in FORMULAS)


class Named(nn.Module):
    def forward(self, hidden):
        """Words."""
        result = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result  # noqa: RET504


class Swapped(nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Scaled(nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_a_formula_is_recognised_under_other_names_and_no_other_formula_is():
    assert is_formula(Named, FORMULA)
    assert not is_formula(Swapped, FORMULA)
    assert not is_formula(Scaled, FORMULA)
    assert not is_formula(nn.Linear, FORMULA)


def test_a_class_without_source_says_nothing():
    scope: dict = {"nn": nn, "torch": torch}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return self.q(x) + self.k(x)\n", scope)
    assert called_on_one_input(scope["Typed"]) == ()
    assert not is_formula(scope["Typed"], FORMULA)


def _twice(forward):
    @functools.wraps(forward)
    def wrapped(self, x):
        return 2 * forward(self, x)

    return wrapped


class Wrapped(nn.Module):
    @_twice
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


v1 = 3


class OfAnother(nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(v1)) * self.up_proj(x))


def test_what_is_around_a_formula_and_what_only_looks_like_its_variables_make_it_another():
    assert not is_formula(Wrapped, FORMULA)
    assert not is_formula(OfAnother, FORMULA)


def test_a_class_that_is_given_another_forward_is_read_anew(monkeypatch):
    assert is_formula(Named, FORMULA)
    assert called_on_one_input(Plain) == (("q", "k", "v"),)
    monkeypatch.setattr(Named, "forward", Scaled.forward)
    monkeypatch.setattr(Plain, "forward", Conditional.forward)
    assert not is_formula(Named, FORMULA)
    assert called_on_one_input(Plain) == ()
