"""EVA, CorDA and LoRA-GA over batches, beside PEFT and without a Trainer."""

import contextlib
import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    initialise_from_data,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.starts.data import look_at_data
from lora_lightning.injection.starts.inputs import leaders_of, scored
from lora_lightning.injection.state import lora_layers, record_of

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # those whose inputs have 32 sides
pytestmark = pytest.mark.filterwarnings("ignore:init_lora_weights=.* begins as data show")


def batches(count, rows=6, length=14):
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(0, 64, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 1 - number % 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, :3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def peft_eva(model, given, **fields):
    import peft

    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights="eva", **fields))
        peft.initialize_lora_eva_weights(theirs, given, show_progress_bar=False)
    return theirs


@pytest.mark.parametrize(
    ("options", "rslora"),
    [({}, True), ({"rho": 1.0}, False), ({"use_label_mask": False}, False), ({"adjust_scaling_factors": False}, True)],
)
def test_eva_is_pefts(llama, options, rslora, tmp_path):
    import peft

    given, options = batches(3), {"tau": 0.9, **options}
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "use_rslora": rslora}
    theirs = peft_eva(copy.deepcopy(llama), given, eva_config=peft.tuners.lora.EvaConfig(**options), **fields)
    inject_lora(llama, LoraConfig(init_lora_weights="eva", eva_config=options, **fields))
    report = initialise_from_data(llama, itertools.cycle(given))
    other = {n: m for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    mine = dict(lora_layers(llama))
    assert mine.keys() == other.keys()
    assert {row.name: row.r for row in report.rows} == {name: m.r["default"] for name, m in other.items()}
    for name, layer in mine.items():
        his = other[name]
        assert layer.lora_scaling == pytest.approx(his.scaling["default"])
        torch.testing.assert_close(layer.lora_A.detach(), his.lora_A["default"].weight.detach(), atol=5e-3, rtol=0)
        assert not layer.lora_B.any()
    config = theirs.peft_config["default"]
    record = record_of(llama)
    assert record.config.rank_pattern == config.rank_pattern
    assert record.config.alpha_pattern == pytest.approx(config.alpha_pattern)
    save_adapter(llama, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(unloaded(llama), tmp_path / "adapter")
    found = {n: m.r["default"] for n, m in again.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found == {name: layer.lora_r for name, layer in mine.items()}


def unloaded(model):
    model = copy.deepcopy(model)
    unload_lora(model)
    return model


def test_eva_whitens_each_layer_once():
    """PEFT divides the directions that layers share once more for each of these layers."""
    x = torch.randn(64, 8)
    values = {}
    for whiten in (False, True):
        model = nn.Sequential(nn.Linear(8, 8))
        config = {"rho": 1.0, "whiten": whiten}
        inject_lora(model, LoraConfig(r=4, init_lora_weights="eva", target_modules=["0"], eva_config=config))
        initialise_from_data(model, [x, x, x])
        values[whiten] = model[0].lora_A.detach()
    spread = torch.linalg.svdvals(torch.cat([x - x.mean(dim=0)] * 2))  # settled after two
    torch.testing.assert_close(values[True] * spread[:4, None].sqrt(), values[False], atol=1e-4, rtol=1e-3)


def test_eva_finds_the_directions_of_all_batches():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(240, 12, generator=generator) @ torch.diag(torch.logspace(0, -2, 12))
    model = nn.Sequential(nn.Linear(12, 5))
    config = {"rho": 1.0, "tau": 1.0}
    inject_lora(model, LoraConfig(r=6, init_lora_weights="eva", target_modules=["0"], eva_config=config))
    with pytest.warns(UserWarning, match="still turned"):
        initialise_from_data(model, x.split(40))
    _, _, vh = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    cosines = (model[0].lora_A.detach() * vh[:6]).sum(dim=1).abs()
    assert cosines[:3].min() > 0.999
    assert cosines.min() > 0.9


def test_layers_without_a_rank_lose_their_adapter(tmp_path):
    torch.manual_seed(4)
    model = nn.ModuleDict({"wide": nn.Linear(16, 16), "flat": nn.Linear(16, 16)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            # All of one layer's inputs lie along one direction, which explains everything.
            return self.parts["wide"](x) + self.parts["flat"](x @ torch.diag(torch.logspace(0, -6, 16)))

    net = Net()
    plain = copy.deepcopy(net)
    config = LoraConfig(r=1, init_lora_weights="eva", eva_config={"rho": 2.0})
    inject_lora(net, config)
    x = torch.randn(64, 1) @ torch.randn(1, 16) + 0.5 * torch.randn(64, 1) @ torch.randn(1, 16)
    report = initialise_from_data(net, [x] * 3)
    assert sum(row.r for row in report.rows) == 2
    inject_lora(net, config)  # the same again: in place already
    assert len(list(lora_layers(net))) == len(report.rows)
    save_adapter(net, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    assert [name for name, _ in lora_layers(plain)] == [name for name, _ in lora_layers(net)]


def test_eva_needs_as_many_tokens_as_directions():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_lora(model, LoraConfig(r=4, init_lora_weights="eva"))
    with pytest.raises(LoraConfigError, match="wants 8 directions of 0"):
        initialise_from_data(model, [torch.randn(3, 8)])
    with pytest.raises(LoraConfigError, match="there is no batch"):
        initialise_from_data(model, [])


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts(direction, scale):
    import peft
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    def net():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 14))

    data = [(torch.randn(7, 12), torch.randn(7, 14)) for _ in range(3)]

    def loss_of(model):
        return lambda batch: (model(batch[0]) - batch[1]).square().mean()

    options = {"direction": direction, "scale": scale, "stable_gamma": 9}
    fields = {"r": 3, "lora_alpha": 5, "init_lora_weights": "lora_ga", "target_modules": ["0", "2"]}
    theirs = net()
    config = peft.LoraConfig(lora_ga_config=LoraGAConfig(**options), **fields)
    preprocess_loraga(theirs, config, lambda: [loss_of(theirs)(batch).backward() for batch in data])
    theirs = peft.get_peft_model(theirs, config).base_model.model
    ours = net()
    inject_lora(ours, LoraConfig(lora_ga_config=options, **fields))
    initialise_from_data(ours, data, loss=loss_of(ours))
    for place in (0, 2):
        mine, his = ours[place], theirs[place]
        assert_alike = torch.testing.assert_close
        assert_alike(mine.lora_A.abs(), his.lora_A["default"].weight.abs(), atol=1e-4, rtol=1e-3)
        close = 0.02 if scale == "weight_svd" else 1e-3  # where PEFT's decomposition is not exact
        assert_alike(mine.lora_B.abs(), his.lora_B["default"].weight.abs(), atol=1e-4, rtol=close)
        assert_alike(mine.weight + mine.lora_weight_delta(), net()[place].weight, atol=1e-5, rtol=1e-5)
    x = torch.randn(4, 12)
    assert_alike(ours(x), net()(x), atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for p in ours.parameters())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(lora_parameters(ours))


def test_lora_ga_of_conv1d_is_that_of_the_linear_layer_of_its_transposed_weight():
    """PEFT scales by the input's side there, where the paper and its own linear layers have the output's."""
    torch.manual_seed(1)
    conv, linear = Conv1D(10, 14), nn.Linear(14, 10)
    linear.weight.data = conv.weight.data.t().clone()
    conv.bias.data = linear.bias.data.clone()
    batch = torch.randn(6, 14)
    for layer in (conv, linear):
        model = nn.Sequential(layer)
        inject_lora(model, LoraConfig(r=3, init_lora_weights="lora_ga", target_modules=["0"]))
        initialise_from_data(model, [batch], loss=lambda x, model=model: model(x).square().mean())
    torch.testing.assert_close(conv.lora_A.abs(), linear.lora_A.abs(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(conv.lora_B.abs(), linear.lora_B.abs(), atol=1e-4, rtol=1e-3)


def test_lora_gas_first_step_goes_down_the_gradient(llama):
    """With A and B from the gradient's largest directions, the loss falls faster than from a plain start."""
    given = batches(3)
    falls = {}
    for how in ("lora_ga", True):
        model = copy.deepcopy(llama)
        inject_lora(model, LoraConfig(r=4, init_lora_weights=how))
        if how == "lora_ga":
            initialise_from_data(model, given)
        first = model(**given[0]).loss
        first.backward()
        with torch.no_grad():
            for p in lora_parameters(model).values():
                p -= 0.05 * p.grad
        falls[how] = (first - model(**given[0]).loss).item()
    assert falls["lora_ga"] > 1.5 * falls[True] > 0


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method):
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def net():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), Conv1D(14, 10))

    data = [torch.randn(1, 40, 12) for _ in range(3)]
    fields = {"r": 3, "lora_alpha": 5, "init_lora_weights": "corda", "target_modules": ["0", "2"]}
    theirs = net()
    config = peft.LoraConfig(corda_config=CordaConfig(corda_method=method), **fields)
    preprocess_corda(theirs, config, lambda: [theirs(x) for x in data])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, config).base_model.model
    ours = net()
    inject_lora(ours, LoraConfig(corda_config={"corda_method": method}, **fields))
    initialise_from_data(ours, data)
    for place in (0, 2):
        mine, his = ours[place], theirs[place]
        product = his.lora_B["default"].weight @ his.lora_A["default"].weight
        torch.testing.assert_close(mine.lora_B @ mine.lora_A, product, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mine.weight, his.base_layer.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("dora", [False, True])
def test_files_and_the_way_back(llama, how, dora, tmp_path, shake):
    given, plain = batches(4), copy.deepcopy(llama)
    state = torch.get_rng_state()
    inject_lora(llama, LoraConfig(r=4, init_lora_weights=how, use_dora=dora, modules_to_save=["norm"]))
    before = {name: module.training for name, module in llama.named_modules()}
    initialise_from_data(llama, given)
    assert torch.equal(state, torch.get_rng_state())
    assert before == {name: module.training for name, module in llama.named_modules()}
    torch.testing.assert_close(llama(**given[0]).logits, plain(**given[0]).logits, atol=1e-4, rtol=1e-4)
    shake(llama)
    expected = llama(**given[0]).logits
    save_adapter(llama, tmp_path / "adapter")
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(**given[0]).logits, expected, atol=1e-4, rtol=1e-4)
    with lora_disabled(llama):
        assert torch.equal(llama(**given[0]).logits, plain(**given[0]).logits)
    unload_lora(llama)
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), plain.parameters(), strict=True))


def test_what_is_in_the_way_is_told(llama):
    with pytest.raises(AdapterError, match="has no adapter"):
        initialise_from_data(llama, batches(1))
    inject_lora(llama, LoraConfig(r=4))
    with pytest.raises(LoraConfigError, match="looks at no data"):
        initialise_from_data(llama, batches(1))
    unload_lora(llama)
    with pytest.warns(UserWarning, match="call initialise_from_data"):
        inject_lora(llama, LoraConfig(r=4, init_lora_weights="lora_ga"))
    with pytest.raises(LoraConfigError, match="needs a loss"):
        initialise_from_data(llama, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    initialise_from_data(llama, batches(1))
    with pytest.raises(LoraConfigError, match="has begun already"):
        initialise_from_data(llama, batches(1))


def test_layers_of_one_input_are_known_by_it(llama):
    layers = {name: module for name, module in llama.named_modules() if isinstance(module, nn.Linear)}
    leader = leaders_of(layers, lambda: llama(**batches(1)[0]))
    inside = {name.removeprefix("model.layers.0."): first for name, first in leader.items() if "layers.0" in name}
    assert inside["self_attn.k_proj"] == inside["self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"
    assert inside["mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
    assert inside["mlp.down_proj"] == "model.layers.0.mlp.down_proj"


def test_tokens_that_count():
    batch = batches(1, rows=2, length=5)[0]
    x = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert torch.equal(scored(x, batch, -100), torch.cat([x[0, :4], x[1, 3:]]))
    assert torch.equal(scored(x, batch, None), torch.cat([x[0, :4], x[1]]))
    assert torch.equal(scored(x.view(10, 3), batch, None), torch.cat([x[0, :4], x[1]]))
    assert scored(x[:, :2], batch, None).shape == (4, 3)  # other rows than the tokens: all count
    assert scored(x, x, -100).shape == (10, 3)


@pytest.mark.parametrize("how", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_a_tied_head_follows_its_embedding_and_the_data_deal_with_the_rest(how, named, tmp_path, shake):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).eval()
    plain, given = copy.deepcopy(tied), batches(2)
    targets = [named, "q_proj", "down_proj"]
    fields = {"rank_pattern": {"embed_tokens": 3}, "ensure_weight_tying": True}
    inject_lora(tied, LoraConfig(r=4, target_modules=targets, init_lora_weights=how, **fields))
    initialise_from_data(tied, given)
    assert tied.lm_head.lora_r == tied.model.embed_tokens.lora_r == 3
    torch.testing.assert_close(tied(**given[0]).logits, plain(**given[0]).logits, atol=1e-4, rtol=1e-4)
    shake(tied)
    save_adapter(tied, tmp_path / "adapter")
    load_adapter(again := copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(again(**given[0]).logits, tied(**given[0]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["eva", "corda", "lora_ga"])
def test_another_stack_of_layers_is_refused(llama, how):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=how, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(LoraConfigError, match="does not go with layer_replication"):
        inject_lora(llama, config)
    assert not list(lora_layers(llama))


def test_layers_without_a_rank_have_their_bias_back(tmp_path, shake):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():  # what the second gets lies along two directions, which explain more than any of the first's
        net[0].weight.copy_(torch.eye(16))[2:] = 0
        net[0].bias.zero_()
    plain, x = copy.deepcopy(net), torch.randn(256, 16)
    config = LoraConfig(r=1, init_lora_weights="eva", bias="lora_only", eva_config={"rho": 2.0, "tau": 1.0})
    inject_lora(net, config)
    initialise_from_data(net, [x] * 2)
    assert [name for name, _ in lora_layers(net)] == ["1"]
    assert [name for name, p in net.named_parameters() if p.requires_grad and "bias" in name] == ["1.bias"]
    shake(net)
    save_adapter(net, tmp_path / "adapter")
    load_adapter(again := copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(again(x), net(x))
    unload_lora(net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


def test_what_trains_around_the_adapted_model_gets_no_gradient_from_the_look(llama):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = llama, nn.Linear(64, 3)

        def forward(self, **batch):
            return {"loss": self.head(self.model(input_ids=batch["input_ids"]).logits).square().mean()}

    model = Around()
    inject_lora(model, LoraConfig(r=4, init_lora_weights="lora_ga"))
    model.head.requires_grad_(True)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    look_at_data(model, batches(1))
    assert all(p.grad is None for p in model.parameters())
    assert trains == [name for name, p in model.named_parameters() if p.requires_grad]
    initialise_from_data(model, batches(1))
    assert trains == [name for name, p in model.named_parameters() if p.requires_grad]
