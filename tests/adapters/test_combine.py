"""Adapters made into one: as PEFT's add_weighted_adapter does it, draw for draw, or as the mathematics says."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import AdapterError, Adapters, LoraConfig, LoraConfigError
from lora_lightning.adapters.combine import COMBINATIONS, Combination, Part, combined
from lora_lightning.injection.state import lora_layers

WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}
PRUNING = [how for how in COMBINATIONS if how not in ("linear", "cat", "svd")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 9)
        self.middle = Conv1D(7, 9)
        self.conv = nn.Conv2d(7, 5, 3, padding=1)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.middle(torch.tanh(self.first(self.embed(x)))))
        return self.last(self.conv(h.transpose(1, 2)[..., None])[..., 0].transpose(1, 2))


TARGETS = {
    "one": ["embed", "first", "middle", "conv", "last"],
    "two": ["embed", "first", "conv", "last"],
    "three": ["first", "middle", "last"],
}


@pytest.fixture(autouse=True)
def _double():
    # PEFT keeps weights in torch's default dtype: in float32 they would be off in the eighth digit.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and a function that writes PEFT's random adapters over it into a folder."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    base = Net()

    def write(ranks, **fields):
        torch.set_default_dtype(torch.float64)
        folder = tmp_path_factory.mktemp("adapters")
        model = theirs(base, ranks, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        return folder, model

    yield base, write
    torch.set_default_dtype(torch.float32)


def theirs(base, ranks, **fields):
    torch.manual_seed(2)
    model = None
    for name, r in ranks.items():
        config = peft.LoraConfig(r=r, lora_alpha=3 * r, target_modules=TARGETS[name], init_lora_weights=False, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    return model


def ours(base, folder, names):
    adapters = Adapters(copy.deepcopy(base))
    for name in names:
        adapters.load(name, folder / name)
    return adapters


def their_updates(model, name):
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.scaling:
            found[path] = layer.get_delta_weight(name)
    return found


def our_updates(adapters, name):
    adapters.set(name)
    return {path: layer.lora_weight_delta().detach() for path, layer in lora_layers(adapters.model)}


@pytest.mark.parametrize("how", COMBINATIONS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_every_combination_is_pefts(saved, how, sign, monkeypatch):
    if sign == "frequency" and "ties" not in how:
        pytest.skip("no signs are elected")
    base, write = saved
    folder, model = write({"one": 4, "two": 4, "three": 4})
    adapters = ours(base, folder, WEIGHTS)
    density = 0.6 if how in PRUNING else None
    inject = model.base_model.inject_adapter

    def inject_and_seed(*args, **kwargs):
        inject(*args, **kwargs)  # which draws first values that are written over
        torch.manual_seed(5)

    monkeypatch.setattr(model.base_model, "inject_adapter", inject_and_seed)
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "all", how, density=density, majority_sign_method=sign
    )
    torch.manual_seed(5)
    adapters.add_weighted("all", WEIGHTS, how=how, density=density, majority_sign_method=sign)
    expected, found = their_updates(model, "all"), our_updates(adapters, "all")
    assert expected.keys() == found.keys()
    for path, update in expected.items():
        torch.testing.assert_close(found[path], update, rtol=1e-10, atol=1e-10)
    assert {layer.lora_scaling for _, layer in lora_layers(adapters.model)} == {1.0}


@pytest.mark.parametrize("how", ["cat", "svd", "ties_svd"])
def test_other_ranks_go_together_where_updates_do(saved, how):
    base, write = saved
    folder, model = write({"one": 2, "two": 4, "three": 3})
    adapters = ours(base, folder, WEIGHTS)
    fields = {"density": 0.5} if how == "ties_svd" else {}
    rank = {} if how == "cat" else {"svd_rank": 3}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "all", how, **rank, **fields)
    adapters.add_weighted("all", WEIGHTS, how=how, **rank, **fields)
    found = our_updates(adapters, "all")
    for path, update in their_updates(model, "all").items():
        torch.testing.assert_close(found[path], update, rtol=1e-10, atol=1e-10)


def test_clamping_is_pefts(saved):
    base, write = saved
    folder, model = write({"one": 2, "two": 4})
    adapters = ours(base, folder, ["one", "two"])
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both", "svd", svd_clamp=0.8)
    adapters.add_weighted("both", {"one": 1.0, "two": 0.5}, how="svd", svd_clamp=0.8)
    found = our_updates(adapters, "both")
    for path, update in their_updates(model, "both").items():
        torch.testing.assert_close(found[path], update, rtol=1e-10, atol=1e-10)


def test_rslora_is_combined_with_the_scale_that_it_has(saved):
    """PEFT's result is too large by √r there: it takes the setting along into a config whose alpha is r."""
    base, write = saved
    folder, model = write({"one": 4, "two": 4}, use_rslora=True)
    adapters = ours(base, folder, ["one", "two"])
    adapters.add_weighted("both", {"one": 0.5, "two": -2.0}, how="cat")
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both", "cat")
    one, two, wrong = (their_updates(model, name) for name in ("one", "two", "both"))
    found = our_updates(adapters, "both")
    torch.testing.assert_close(found["last"], 0.5 * one["last"] - 2 * two["last"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wrong["last"], 8**0.5 * found["last"], rtol=1e-10, atol=1e-10)


def test_what_cannot_be_combined_is_told(saved):
    base, write = saved
    folder, _ = write({"one": 2, "two": 4})
    adapters = ours(base, folder, ["one", "two"])
    both = {"one": 1.0, "two": 1.0}
    with pytest.raises(LoraConfigError, match=r"same r; got r=2, 4"):
        adapters.add_weighted("both", both, how="linear")
    with pytest.raises(LoraConfigError, match=r"did you mean ties"):
        adapters.add_weighted("both", both, how="tise")
    with pytest.raises(LoraConfigError, match=r"needs the share of values to keep"):
        adapters.add_weighted("both", both, how="ties_svd")
    with pytest.raises(LoraConfigError, match=r"density has no effect(.|\n)*svd_rank has no effect"):
        adapters.add_weighted("both", both, how="cat", density=0.5, svd_rank=2)
    with pytest.raises(AdapterError, match=r"no adapter 'tow' \(did you mean two\?\)"):
        adapters.add_weighted("both", {"one": 1.0, "tow": 1.0})
    with pytest.raises(AdapterError, match=r"there is an adapter 'two' already"):
        adapters.add_weighted("two", both)
    with pytest.raises(LoraConfigError, match=r"finite numbers, got one: nan, two: '1'"):
        adapters.add_weighted("both", {"one": float("nan"), "two": "1"})
    with pytest.raises(AdapterError, match="name at least one"):
        adapters.add_weighted("none", {})
    adapters.add("dora", LoraConfig(r=2, use_dora=True, target_modules=["first"]))
    with pytest.raises(AdapterError, match="dora cannot be combined with others: DoRA"):
        adapters.add_weighted("both", {"one": 1.0, "dora": 1.0}, how="cat")
    assert adapters.names == ("one", "two", "dora")
    assert adapters.active == ("dora",)


def test_heads_in_full_go_along_from_one_and_not_from_two(saved, shake):
    base, write = saved
    folder, _ = write({"one": 2})
    adapters = ours(base, folder, ["one"])
    for name in ("two", "three"):
        adapters.add(name, LoraConfig(r=2, target_modules=["first"], modules_to_save=["conv"]))
        shake(adapters.model)
    head = adapters.model.conv.weight.detach().clone()
    with pytest.raises(AdapterError, match=r"three and two both have values of their own for conv\.bias, conv\.weight"):
        adapters.add_weighted("both", {"two": 1.0, "three": 1.0}, how="cat")
    with pytest.raises(AdapterError, match="conv is adapted by one of one, three and trained in full by another"):
        adapters.add_weighted("both", {"one": 1.0, "three": 1.0}, how="cat")
    adapters.delete("one")
    adapters.add("one", LoraConfig(r=2, target_modules=["last"]))
    adapters.add_weighted("both", {"one": 1.0, "three": 1.0}, how="cat")
    adapters.set("both")
    assert torch.equal(adapters.model.conv.weight, head)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2), st.floats(0.1, 4)), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_exact_sums_are_the_sum_of_the_updates(members, kernel):
    torch.manual_seed(3)
    parts = [
        Part(torch.randn(r, 3, kernel, dtype=torch.float64), torch.randn(5, r, 1, dtype=torch.float64), s, w)
        for r, w, s in members
    ]
    whole = sum(p.weight * p.scaling * (p.b.flatten(1) @ p.a.flatten(1)) for p in parts)
    total = sum(r for r, _, _ in members)
    for way in (Combination("cat"), Combination("svd", svd_rank=total)):
        a, b = combined(parts, way, total)
        assert a.shape == (total, 3, kernel)
        assert b.shape == (5, total, 1)
        torch.testing.assert_close(b.flatten(1) @ a.flatten(1), whole, rtol=1e-10, atol=1e-10)


def test_half_precision_is_decomposed_in_full(saved):
    """torch has no decomposition of bfloat16, and in float32 the small singular values would be noise."""
    a, b = torch.randn(3, 8), torch.randn(6, 3)
    part = Part(a.bfloat16(), b.bfloat16(), 2.0, 0.5)
    found_a, found_b = combined([part], Combination("svd"), 3)
    assert found_a.dtype == found_b.dtype == torch.bfloat16
    exact = part.b.double() @ part.a.double()
    torch.testing.assert_close(found_b.double() @ found_a.double(), exact, rtol=0.02, atol=0.05)
