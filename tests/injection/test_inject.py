"""Injection, freezing, switching off, and the way back."""

import copy
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    unload_lora,
)
from lora_lightning.injection import freeze_base
from lora_lightning.injection.state import load_lora_state, lora_layers


def _snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing_and_only_adapters_train(model_name, tokens, request):
    model = request.getfixturevalue(model_name)
    before, logits = _snapshot(model), model(tokens).logits
    report = inject_lora(model, LoraConfig(r=4))
    assert torch.equal(model(tokens).logits, logits)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    assert all(name.endswith(("lora_A", "lora_B")) for name in lora_parameters(model))
    assert report.trainable_parameters == sum(p.numel() for p in lora_parameters(model).values())
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
    assert report.trainable_parameters == sum(row.parameters for row in report.rows)
    model(tokens, labels=tokens).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_price_of_one_layer():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    report = inject_lora(model, LoraConfig(r=16))
    assert (report.trainable_parameters, report.rows[0].parameters) == (131_072, 131_072)
    assert report.total_parameters == 131_072 + 4096 * 4096


def test_first_values_depend_on_seed_and_name_alone(llama, monkeypatch):
    def values(model, **options):
        torch.rand(1)  # the global generator has no say
        inject_lora(model, LoraConfig(r=4, **options.pop("fields", {})), **options)
        return {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    twins = [copy.deepcopy(llama) for _ in range(5)]
    state = torch.get_rng_state()
    inject_lora(copy.deepcopy(llama), LoraConfig(r=4))
    assert torch.equal(state, torch.get_rng_state())
    zero = values(twins[0])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    five = values(twins[1])
    assert all(torch.equal(five[name], value) for name, value in values(twins[2], seed=5).items())
    assert any(not torch.equal(zero[name], five[name]) for name in zero)
    some = values(twins[3], seed=5, fields={"target_modules": ["down_proj"]})
    assert all(torch.equal(some[name], five[name]) for name in some)
    wrapped = values(nn.ModuleDict({"inner": twins[4]}), seed=5)
    assert all(torch.equal(wrapped[f"inner.{name}"], value) for name, value in five.items())
    q, k = (five[f"model.layers.0.self_attn.{n}_proj.lora_A"] for n in "qk")
    assert not torch.equal(q, k)


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", False])
def test_initialisations_have_pefts_distribution(how):
    import peft

    torch.manual_seed(1)
    ours, theirs = nn.Sequential(nn.Linear(400, 300)), nn.Sequential(nn.Linear(400, 300))
    inject_lora(ours, LoraConfig(r=8, init_lora_weights=how))
    layer = ours[0]
    other = peft.get_peft_model(theirs, peft.LoraConfig(r=8, init_lora_weights=how, target_modules=["0"])).base_model
    other = other.model[0]
    for mine, his in ((layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)):
        assert mine.shape == his.shape
        assert mine.std().item() == pytest.approx(his.std().item(), rel=0.1)
        assert mine.abs().max().item() == pytest.approx(his.abs().max().item(), rel=0.3)
    if how == "orthogonal":
        torch.testing.assert_close(layer.lora_weight_delta(), torch.zeros(300, 400), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [{}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head", "ln_f"]}, {"target_modules": ["wte"]}],
)
def test_unloading_restores_the_base_to_the_bit(gpt2, tokens, shake, fields):
    gpt2.transformer.h[0].requires_grad_(False)
    names = [name for name, p in gpt2.named_parameters() if p.requires_grad]
    before, logits = _snapshot(gpt2), gpt2(tokens).logits
    inject_lora(gpt2, LoraConfig(r=4, **fields))
    shake(gpt2)
    changed = gpt2(tokens).logits
    assert not torch.allclose(changed, logits, atol=1e-4)
    with lora_disabled(gpt2):
        assert torch.equal(gpt2(tokens).logits, logits)
    assert torch.equal(gpt2(tokens).logits, changed)
    unload_lora(gpt2)
    after = gpt2.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(gpt2(tokens).logits, logits)
    assert [name for name, p in gpt2.named_parameters() if p.requires_grad] == names


def test_what_trains_equals_pefts_count(bert, gpt2):
    import peft

    for model, fields in (
        (bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
        (gpt2, {"bias": "all", "target_modules": ["c_attn"]}),
        (gpt2, {"bias": "lora_only", "target_modules": ["c_attn"]}),
    ):
        twin = copy.deepcopy(model)
        theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, **fields)).get_nb_trainable_parameters()[0]
        model = copy.deepcopy(model)
        assert inject_lora(model, LoraConfig(r=4, **fields)).trainable_parameters == theirs


def test_injecting_again_is_harmless_with_the_same_config_and_refused_with_another(llama, shake):
    inject_lora(llama, LoraConfig(r=4))
    shake(llama)
    values = {name: p.clone() for name, p in lora_parameters(llama).items()}
    inject_lora(llama, LoraConfig(r=4))
    assert all(torch.equal(p, values[name]) for name, p in lora_parameters(llama).items())
    with pytest.raises(LoraConfigError, match=r"already has another.*\n  - r: 4 here, 8 there"):
        inject_lora(llama, LoraConfig(r=8))


def test_injecting_again_adapts_what_was_added_since():
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model, LoraConfig(r=2))
    model.append(nn.Linear(4, 4))
    assert len(inject_lora(model, LoraConfig(r=2)).rows) == 2
    assert not model[1].weight.requires_grad


def test_an_adapter_below_is_kept_when_what_is_around_it_is_injected(shake):
    around = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4)), "other": nn.Linear(4, 4)})
    inject_lora(around["net"], LoraConfig(r=2))
    shake(around)
    before = around["net"][0].lora_B.clone()
    assert len(inject_lora(around, LoraConfig(r=2)).rows) == 1
    assert torch.equal(around["net"][0].lora_B, before)
    assert type(around["other"]) is nn.Linear


def test_fresh_heads_are_named(bert, llama):
    assert inject_lora(bert, LoraConfig(target_modules=["query"])).frozen_heads == ("classifier",)
    assert inject_lora(llama, LoraConfig()).frozen_heads == ()
    partly = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 2))})
    partly["body"].requires_grad_(False)
    assert inject_lora(partly, LoraConfig(target_modules=["body"])).frozen_heads == ("head",)


def test_a_module_around_the_root_can_be_trained_in_full(llama):
    around = nn.ModuleDict({"model": llama, "value_head": nn.Linear(32, 1)})
    inject_lora(around, LoraConfig(r=2, modules_to_save=["value_head"]))
    assert {"value_head.weight", "value_head.bias"} <= lora_parameters(around).keys()
    assert "value_head.weight" in lora_state_dict(around)


def test_the_state_is_all_but_the_frozen_base_and_goes_back(llama, tokens, shake):
    inject_lora(llama, LoraConfig(r=4, modules_to_save=["norm"]))
    fresh = copy.deepcopy(llama)
    shake(llama)
    state = lora_state_dict(llama)
    assert set(state) == set(lora_parameters(llama))
    load_lora_state(fresh, state, "it")
    assert torch.equal(fresh(tokens).logits, llama(tokens).logits)
    broken = dict(state)
    broken["model.norm.weight"] = torch.zeros(3)
    broken["extra"] = torch.zeros(1)
    del broken["model.layers.0.mlp.up_proj.lora_A"]
    with pytest.raises(AdapterError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.lora_A") as caught:
        load_lora_state(fresh, broken, "it")
    assert "not expected: extra" in str(caught.value)
    assert "model.norm.weight is (3,), the model's is (32,)" in str(caught.value)
    assert torch.equal(fresh(tokens).logits, llama(tokens).logits)


def test_running_statistics_of_frozen_normalisation_belong_to_the_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inject_lora(model, LoraConfig(r=2))
    assert {name for name in lora_state_dict(model) if name.startswith("1.")} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_unloading_puts_running_statistics_back():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))})
    model["net"](torch.randn(8, 4))
    before = _snapshot(model)
    inject_lora(model["net"], LoraConfig(r=2))
    model["net"](torch.randn(8, 4) + 3)
    assert not torch.equal(model["net"][1].running_mean, before["net.1.running_mean"])
    unload_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_forward_of_the_base_in_train_mode_leaves_what_is_kept_of_it():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    before = _snapshot(model)
    inject_lora(model, LoraConfig(target_modules=["fc"], modules_to_save=["norm"], r=2))
    model["norm"](torch.randn(8, 4) - 2)
    adapted = _snapshot(model)
    with lora_disabled(model):
        assert torch.equal(model["norm"].running_mean, before["norm.running_mean"])
        model["norm"](torch.randn(8, 4) + 3)
    assert all(torch.equal(value, adapted[name]) for name, value in model.state_dict().items())
    unload_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_base_parameters_that_happen_to_be_called_lora_stay_base():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.lora_extra = nn.Parameter(torch.zeros(4))

    model = nn.Sequential(Odd())
    inject_lora(model, LoraConfig(r=2))
    assert not model[0].lora_extra.requires_grad
    assert set(lora_state_dict(model)) == {"0.lora_A", "0.lora_B"}


def test_an_encoder_layers_fast_path_sees_the_adapter(shake):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = model(x)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        inject_lora(model, LoraConfig(r=2))
    shake(model)
    with torch.no_grad():
        evaluated = model(x)
    torch.testing.assert_close(evaluated, model.train()(x).detach())
    assert not torch.allclose(evaluated, fast, atol=1e-4)
    unload_lora(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fast)
    assert model.activation_relu_or_gelu


def test_models_pickle_deep_copy_and_compile(llama, tokens, shake):
    inject_lora(llama, LoraConfig(r=4))
    shake(llama)
    logits = llama(tokens).logits
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(twin(tokens).logits, logits)
        unload_lora(twin)
    compiled = torch.compile(llama, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, logits)
    assert set(lora_state_dict(compiled)) == set(lora_state_dict(llama))


def test_freezing_again_undoes_what_others_made_trainable(llama):
    inject_lora(llama, LoraConfig(r=4))
    llama.model.norm.weight.requires_grad_(True)
    freeze_base(llama)
    assert not llama.model.norm.weight.requires_grad


def test_without_an_adapter_it_says_what_to_do(llama):
    for function in (lora_state_dict, unload_lora, lambda model: lora_disabled(model).__enter__()):
        with pytest.raises(AdapterError, match="call inject_lora"):
            function(llama)


def test_the_report_reads_in_a_terminal_and_in_a_notebook(llama):
    report = inject_lora(llama, LoraConfig(r=4, lora_alpha=8, modules_to_save=["norm"]))
    assert "14 layers adapted, r=4, scale 2.0" in str(report)
    assert "in full: model.norm" in report.line()
    assert report._repr_html_().count("<tr>") == len(report.summary()) + 1
    assert report.facts()["lora/layers"] == 14
    assert len(list(lora_layers(llama))) == 14


def test_importing_the_package_is_light():
    import subprocess
    import sys

    heavy = ("torch", "lightning", "hydra", "transformers")
    code = f"import lora_lightning, sys; print([name for name in {heavy} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip() == "[]"


class Trained(nn.Module):
    """A network inside something with a parameter of its own, which is in no module that could be named."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.temperature = nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        return self.net(batch)


def test_a_parameter_that_is_in_no_module_is_named_when_it_is_frozen(llama):
    around = nn.ModuleDict({"outer": Trained(llama), "scales": nn.ParameterList([torch.zeros(2)])})
    with pytest.warns(
        UserWarning, match=r"froze outer\.temperature, .*no module.*nn\.ParameterDict.*modules_to_save"
    ) as told:
        report = inject_lora(around, LoraConfig(r=2))
    assert len(told) == 1
    assert not around["outer"].temperature.requires_grad
    assert report.frozen_heads == ("scales",)  # a ParameterList is a module, and can be named


def test_what_is_told_of_such_a_parameter_helps(llama):
    around = Trained(llama)
    del around.temperature
    around.own = nn.ParameterDict({"temperature": nn.Parameter(torch.ones(1))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(around, LoraConfig(r=2, modules_to_save=["own"]))
    assert around.own["temperature"].requires_grad
    assert "own.temperature" in lora_state_dict(around)


def test_so_is_that_of_a_lightning_module_which_is_all_there_is():
    with pytest.warns(UserWarning, match="froze temperature, "):
        inject_lora(Trained(nn.Sequential(nn.Linear(4, 4))), LoraConfig(r=2))


def test_parameters_that_are_the_networks_own_or_were_frozen_are_not_named(llama):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(4))
            self.layer = nn.Linear(4, 4)

    frozen = Trained(nn.Linear(4, 4))
    frozen.temperature.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(Network(), LoraConfig(r=2))
        inject_lora(frozen, LoraConfig(r=2))
        inject_lora(llama, LoraConfig(r=2))


def test_in_a_network_frozen_in_part_what_was_left_trainable_is_named():
    network = nn.ModuleDict({"body": Trained(nn.Linear(4, 4))})
    network["body"].net.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"froze body\.temperature, "):
        inject_lora(network, LoraConfig(r=2))
