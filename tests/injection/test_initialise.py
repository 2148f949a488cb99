"""Starts from the weight: PiSSA, OLoRA, MiCA and LoftQ, beside PEFT and beside what they say of themselves."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

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
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.injection.starts.loftq import int8, nf4
from lora_lightning.injection.state import load_lora_state, lora_layers

CHANGING = ["pissa", "pissa_niter_8", "olora"]


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16, bias=False)).to(dtype)


def peft_of(model, **fields):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**fields))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}}])
def test_linear_layers_begin_as_in_peft(how, fields):
    ours, theirs = net(), net()
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": how, "target_modules": ["0", "2"], **fields}
    inject_lora(ours, LoraConfig(**options))
    other = peft_of(theirs, **options).base_model.model
    for place in (0, 2):
        mine, his = ours[place], other[place]
        product = his.lora_B["default"].weight @ his.lora_A["default"].weight
        assert mine.lora_scaling == pytest.approx(his.scaling["default"])
        torch.testing.assert_close(mine.lora_B @ mine.lora_A, product, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.lora_B.abs(), his.lora_B["default"].weight.abs(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.weight, his.base_layer.weight, atol=1e-5, rtol=1e-5)
    assert {n: p.requires_grad for n, p in ours.named_parameters() if "lora" in n} == {
        f"{place}.lora_{side}": how != "mica" or side == "A" for place in (0, 2) for side in "AB"
    }


@pytest.mark.parametrize("how", ["pissa", "mica"])
def test_conv1d_begins_as_in_peft(how):
    torch.manual_seed(1)
    ours = nn.Sequential(Conv1D(10, 14))
    theirs = copy.deepcopy(ours)
    inject_lora(ours, LoraConfig(r=3, init_lora_weights=how, target_modules=["0"]))
    his = peft_of(theirs, r=3, init_lora_weights=how, target_modules=["0"], fan_in_fan_out=True).base_model.model[0]
    product = his.lora_B["default"].weight @ his.lora_A["default"].weight
    torch.testing.assert_close(ours[0].lora_B @ ours[0].lora_A, product, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0].weight, his.base_layer.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [*CHANGING, "loftq"])
def test_conv1d_begins_as_the_linear_layer_of_its_transposed_weight(how):
    """PEFT decomposes Conv1D's stored weight by OLoRA, which gives A and B of each other's shapes."""
    torch.manual_seed(1)
    conv, linear = Conv1D(10, 14), nn.Linear(14, 10)
    linear.weight.data = conv.weight.data.t().clone()
    for layer in (conv, linear):
        inject_lora(nn.Sequential(layer), LoraConfig(r=3, init_lora_weights=how, target_modules=["0"]))
    if how != "loftq":  # which rounds in blocks of what lies side by side
        torch.testing.assert_close(conv.lora_B @ conv.lora_A, linear.lora_B @ linear.lora_A, atol=1e-5, rtol=1e-5)
    assert conv.lora_A.shape == linear.lora_A.shape
    torch.testing.assert_close(conv.weight.t(), linear.weight, atol=1e-5, rtol=1e-5)


def test_mica_of_an_embedding_is_pefts():
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Embedding(30, 8))
    theirs = copy.deepcopy(ours)
    inject_lora(ours, LoraConfig(r=3, init_lora_weights="mica", target_modules=["0"]))
    his = peft_of(theirs, r=3, init_lora_weights="mica", target_modules=["0"]).base_model.model[0]
    torch.testing.assert_close(ours[0].lora_B.abs(), his.lora_embedding_B["default"].abs(), atol=1e-5, rtol=1e-5)
    assert not ours[0].lora_A.any()
    assert not ours[0].lora_B.requires_grad
    assert ours[0].lora_A.requires_grad


@settings(max_examples=25, deadline=None)
@given(
    n_in=st.integers(1, 24),
    n_out=st.integers(1, 24),
    r=st.integers(1, 24),
    alpha=st.floats(0.1, 50),
    rslora=st.booleans(),
    how=st.sampled_from(CHANGING),
)
def test_the_outputs_begin_as_they_were_and_the_best_of_rank_r_is_in_the_adapter(n_in, n_out, r, alpha, rslora, how):
    model = nn.Sequential(nn.Linear(n_in, n_out)).double()
    weight, x = model[0].weight.detach().clone(), torch.randn(3, n_in, dtype=torch.float64)
    before = model(x)
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=how, target_modules=["0"])
    if r > min(n_in, n_out):
        with pytest.raises(LoraConfigError, match="singular vectors"):
            inject_lora(model, config)
        assert torch.equal(model[0].weight, weight)
        return
    inject_lora(model, config)
    layer = model[0]
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(layer.weight + layer.lora_weight_delta(), weight, atol=1e-12, rtol=1e-12)
    if how == "pissa":
        values = torch.linalg.svdvals(weight)
        left = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(left[: len(values) - r], values[r:], atol=1e-9, rtol=1e-9)
    with lora_disabled(model):
        assert torch.equal(model(x), before)
    unload_lora(model)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("how", [*CHANGING, "loftq", "mica"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_way_back_is_exact_whatever_has_been_done(how, dtype, dora, shake):
    if how == "mica" and dora:
        pytest.skip("refused")
    model = net(dtype)
    before, x = snapshot(model), torch.randn(5, 12, dtype=dtype)
    base = model(x)
    inject_lora(model, LoraConfig(r=4, init_lora_weights=how, use_dora=dora))
    torch.testing.assert_close(model(x), base, atol=0.1 if dtype == torch.bfloat16 or how == "loftq" else 1e-5, rtol=0)
    shake(model)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    trained = model(x)
    assert not torch.equal(trained, base)
    with lora_disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), trained)
    unload_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not [key for part in model.modules() for key in vars(part) if key.startswith(("_lora", "lora"))]


def test_switching_off_between_forward_and_backward_leaves_the_gradients():
    model = net()
    inject_lora(model, LoraConfig(r=4, init_lora_weights="pissa"))
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    model.zero_grad()
    loss = model(x).square().sum()
    with lora_disabled(model), torch.no_grad():
        model(x)
    loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in lora_parameters(model).items())


@pytest.mark.parametrize("how", CHANGING)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}},
        {"rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}},
        {"use_dora": True},
    ],
)
def test_a_folder_is_for_the_untouched_base_here_and_in_peft(how, fields, tmp_path, shake):
    import peft

    model = net(torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    told = fingerprint(model)
    inject_lora(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, **fields))
    shake(model)
    expected = model(x)
    save_adapter(model, tmp_path / "adapter")
    assert fingerprint(model) == told
    again = net(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x), expected, atol=1e-10, rtol=1e-10)
    theirs = peft.PeftModel.from_pretrained(net(torch.float64), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), expected, atol=1e-10, rtol=1e-10)
    assert theirs.peft_config["default"].r == 8
    assert theirs.peft_config["default"].init_lora_weights is True
    if "use_dora" not in fields:
        save_adapter(model, tmp_path / "folded", fold_scaling=True)
        server = peft.PeftModel.from_pretrained(net(torch.float64), tmp_path / "folded", autocast_adapter_dtype=False)
        torch.testing.assert_close(server(x), expected, atol=1e-10, rtol=1e-10)


def test_embeddings_beside_changed_layers_are_filled_up_with_zeros(tmp_path, shake):
    """PEFT leaves them out of the file that it converts."""
    import peft

    def text():
        torch.manual_seed(2)
        return nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 9)).double()

    model, x = text(), torch.arange(8)
    inject_lora(model, LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0", "1"]))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(text(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), model(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("how", ["pissa", "olora", "mica"])
def test_a_folder_that_peft_has_not_converted_begins_as_there(how, tmp_path, shake):
    theirs = peft_of(net(), r=4, init_lora_weights=how, target_modules=["0", "2"])
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model, x = net(), torch.randn(5, 12)
    load_adapter(model, tmp_path / "adapter", trainable=True)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-4, rtol=1e-4)
    assert model[0].lora_B.requires_grad == (how != "mica")


def test_a_folder_over_a_base_that_cannot_be_had_is_refused(tmp_path):
    peft_of(net(), r=4, init_lora_weights="pissa_niter_4", target_modules=["0"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize("how", CHANGING)
def test_merging_gives_the_adapted_outputs(how, shake):
    model, x = net(torch.float64), torch.randn(5, 12, dtype=torch.float64)
    inject_lora(model, LoraConfig(r=4, init_lora_weights=how))
    shake(model)
    expected = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    assert list(model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize("how", [*CHANGING, "mica", "loftq"])
def test_a_state_put_back_over_the_same_base_gives_the_same_model_to_the_bit(how, shake):
    model, x = net(), torch.randn(5, 12)
    inject_lora(model, LoraConfig(r=4, init_lora_weights=how), seed=1)
    shake(model)
    state = {name: value.clone() for name, value in lora_state_dict(model).items()}
    again = net()
    inject_lora(again, LoraConfig(r=4, init_lora_weights=how), seed=2)  # with other draws
    load_lora_state(again, state, "it")
    assert torch.equal(again(x), model(x))
    assert all(
        torch.equal(a.weight, b.weight) for (_, a), (_, b) in zip(lora_layers(again), lora_layers(model), strict=True)
    )
    assert not any("weight" in name for name in state)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_whole_state_loaded_over_another_base_brings_its_own(how, dora, shake):
    """As PyTorch loads a model: built anew with whatever values, and then filled."""
    config = LoraConfig(r=3, init_lora_weights=how, use_dora=dora)
    model, x = net(), torch.randn(4, 12)
    base = snapshot(model)
    inject_lora(model, config)
    shake(model)
    other = net()
    for parameter in other.parameters():
        parameter.data.normal_()
    inject_lora(other, config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    again = copy.deepcopy(other)
    again.load_state_dict(base, strict=False)
    for found in (other, again):
        with lora_disabled(model), lora_disabled(found):
            torch.testing.assert_close(found(x), model(x))
        torch.testing.assert_close(found(x), model(x))
        unload_lora(found)
        torch.testing.assert_close(snapshot(found), base)
        assert not any(module._load_state_dict_pre_hooks for module in found.modules())


def test_draws_depend_on_seed_and_name_alone():
    def weights(seed):
        model = net()
        torch.rand(1)
        inject_lora(model, LoraConfig(r=2, init_lora_weights="pissa_niter_1"), seed=seed)
        return model[0].lora_A.detach()

    state = torch.get_rng_state()
    first = weights(1)
    torch.manual_seed(9)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))
    torch.set_rng_state(state)


def test_what_cannot_begin_so_is_told_and_nothing_is_changed():
    tied = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(LoraConfigError, match="a: its weight is also that of b"):
        inject_lora(tied, LoraConfig(r=2, init_lora_weights="pissa"))
    conv = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(LoraConfigError, match="Conv2d"):
        inject_lora(conv, LoraConfig(r=2, init_lora_weights="olora", target_modules=["0"]))
    bad = net()
    bad[2].weight.data[0, 0] = torch.nan
    before = snapshot(bad)
    with pytest.raises(LoraConfigError, match="2: its weight has values that are not finite"):
        inject_lora(bad, LoraConfig(r=2, init_lora_weights="pissa"))
    assert bad.state_dict().keys() == before.keys()
    with pytest.raises(LoraConfigError, match="needs 12 singular vectors"):
        inject_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=6, init_lora_weights="lora_ga"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias goes with"),
        ({"init_lora_weights": "mica", "use_dora": True}, "use_dora=False"),
        ({"init_lora_weights": "pisa"}, "did you mean pissa"),
        ({"init_lora_weights": "eva", "eva_config": {"roh": 2}}, "eva_config has no setting 'roh'.*did you mean rho"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "eva_config.rho must be at least 1, got 0.5"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 2}}, "eva_config.tau must be between 0 and 1"),
        ({"init_lora_weights": "eva", "eva_config": {"whiten": 1}}, "eva_config.whiten must be true or false"),
        ({"lora_ga_config": {"direction": "ArB3r"}}, "lora_ga_config.direction must be one of .*did you mean"),
        ({"corda_config": {"corda_method": "imp"}}, "corda_config.corda_method must be one of ipm, kpm"),
        ({"corda_config": {"cache_file": "x.pt"}}, "corda_config.cache_file is not"),
        ({"loftq_config": {"loftq_bits": 3}}, "loftq_config.loftq_bits must be 4 or 8"),
        ({"eva_config": 3}, "eva_config must be a mapping"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"init_lora_weights": "pissa_niter_4", "lora_alpha": -2}, "lora_alpha must be above 0, got -2"),
        (
            {"init_lora_weights": "corda", "alpha_pattern": {"q": -1.5}},
            r"alpha_pattern\['q'\] must be above 0, got -1.5",
        ),
        ({"init_lora_weights": "loftq", "alpha_pattern": {"q": 0.0}}, r"alpha_pattern\['q'\] must be other than 0"),
        ({"init_lora_weights": "lora_ga", "lora_alpha": 0}, "lora_alpha must be other than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(LoraConfigError, match=message):
        LoraConfig(**fields)


def test_settings_of_another_start_are_told():
    with pytest.warns(UserWarning, match="eva_config has no effect with init_lora_weights='pissa'"):
        LoraConfig(init_lora_weights="pissa", eva_config={"rho": 2.0})


def test_an_adapter_made_without_memory_begins_as_one_made_with_it(tmp_path):
    from safetensors.torch import save_file

    from lora_lightning import load_base, meta_parameters

    whole = net()
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    with meta_parameters():
        model = net()
    for each in (whole, model):
        inject_lora(each, LoraConfig(r=4, init_lora_weights="pissa"))
    load_base(model, tmp_path)
    for (_, mine), (_, other) in zip(lora_layers(model), lora_layers(whole), strict=True):
        assert torch.equal(mine.weight, other.weight)
        assert torch.equal(mine.lora_B, other.lora_B)
    x = torch.randn(3, 12)
    with lora_disabled(model):
        torch.testing.assert_close(model(x), net()(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_begins_nearer_to_the_base_than_its_rounded_weight(bits, iterations):
    model = nn.Sequential(nn.Linear(64, 48))
    weight = model[0].weight.detach().clone()
    settings = {"loftq_bits": bits, "loftq_iter": iterations}
    inject_lora(model, LoraConfig(r=8, lora_alpha=32, init_lora_weights="loftq", loftq_config=settings))
    layer = model[0]
    rounded = (nf4 if bits == 4 else int8)(weight)
    if iterations == 1:
        assert torch.equal(layer.weight, rounded)
    distance = (layer.weight + layer.lora_weight_delta() - weight).norm()
    assert distance < 0.9 * (rounded - weight).norm()


def test_a_folder_of_loftq_is_for_the_rounded_base_and_loading_rounds_it(tmp_path, shake):
    model, x = net(), torch.randn(5, 12)
    inject_lora(model, LoraConfig(r=4, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    again = net()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, "loftq")
    assert config["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 2}


def test_a_weight_is_rounded_as_bitsandbytes_rounds_it():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(32, 64)
    quantised = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    torch.testing.assert_close(nf4(weight), bitsandbytes.functional.dequantize_4bit(*quantised), atol=1e-5, rtol=1e-4)
