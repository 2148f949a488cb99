"""Adapted ``nn.MultiheadAttention`` against torch's own with the adapted weights, and against PEFT's files."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.attention import LoraMultiheadAttention, LoraReadsOutProj

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = "adapter_model.safetensors"
TARGETS = (["attn"], ["out_proj"])


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.after = nn.Linear(8, 3)

    def forward(self, q, k=None, v=None, **options):
        out, weights = self.attn(q, q if k is None else k, q if v is None else v, **options)
        return self.after(out), weights


class Renamed(nn.MultiheadAttention):
    """A forward of its own, as vision models wrap it."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def _injected(model, targets=TARGETS[0], **fields):
    return inject_lora(
        model, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **fields})
    )


def _adapted_weights(attn):
    """In- and out-projection as a plain attention would have them; differentiable."""
    found = {}
    if isinstance(attn, LoraLayer):
        found["in_proj_weight"] = attn.in_proj_weight + attn.lora_scaling * attn.lora_B @ attn.lora_A
    if isinstance(out := attn.out_proj, LoraLayer):
        found["out_proj.weight"] = out.weight + out.lora_scaling * out.lora_B @ out.lora_A
    return found


def _plain(attn, **options):
    plain = nn.MultiheadAttention(8, 2, dtype=attn.in_proj_weight.dtype, **options)
    plain.load_state_dict({name: value for name, value in attn.state_dict().items() if "lora_" not in name})
    return plain.train(attn.training)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["self", "cross", "unbatched"]),
    st.sampled_from(["none", "causal", "padding", "float"]),
    st.booleans(),
    st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_adapted_weights(
    targets, batch_first, bias, add_kv, inputs, mask, need_weights, training
):
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "bias": bias, "add_bias_kv": add_kv}
    attn = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **options).double()})
    _injected(attn, targets)
    attn = attn["attn"].train(training)
    shape = (5, 8) if inputs == "unbatched" else (2, 5, 8) if batch_first else (5, 2, 8)
    q = torch.randn(shape, dtype=torch.float64)
    k = torch.randn(shape, dtype=torch.float64) if inputs == "cross" else q
    v = torch.randn(shape, dtype=torch.float64) if inputs == "cross" else k
    asked = {"need_weights": need_weights, "average_attn_weights": False}
    if mask == "padding":
        asked["key_padding_mask"] = torch.arange(5) > 2
        if inputs != "unbatched":
            asked["key_padding_mask"] = asked["key_padding_mask"].expand(2, 5)
    elif mask != "none":
        asked["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        if mask == "float":
            asked["attn_mask"] = torch.zeros(5, 5, dtype=torch.float64).masked_fill(asked["attn_mask"], -1e9)
    out, weights = attn(q, k, v, **asked)
    plain, shown = _plain(attn, **options), _adapted_weights(attn)
    wanted, wanted_weights = torch.func.functional_call(plain, shown, (q, k, v), asked)
    torch.testing.assert_close(out, wanted, **EXACT)
    assert (weights is None) == (wanted_weights is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(weights, wanted_weights, **EXACT)
    own = [p for p in attn.parameters() if p.requires_grad]
    assert len(own) == (4 if targets == TARGETS[0] else 2)
    got = torch.autograd.grad(out.square().sum(), own)
    for one, other in zip(got, torch.autograd.grad(wanted.square().sum(), own), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # in eval the fused kernel of inference, where it can be taken
        torch.testing.assert_close(attn(q, k, v, **asked)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", TARGETS)
def test_an_encoder_in_eval_and_in_training_and_merged_and_without(targets, shake):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        base_out, weights = model(x), copy.deepcopy(model.state_dict())
        base_padded = model(x, src_key_padding_mask=padding)
    targets = ["self_attn", "linear1"] if targets == TARGETS[0] else targets
    _injected(model, targets, r=2)
    shake(model)
    trained = model.train()(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
        real = ~padding
        torch.testing.assert_close(evaluated[real], trained[real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(evaluated[real], base_padded[real], atol=1e-3)
        with lora_disabled(model):
            torch.testing.assert_close(model(x), base_out, rtol=1e-4, atol=1e-5)
        merged = copy.deepcopy(model)
        merge_lora(merged)
        assert {type(part) for part in merged.modules()} == {
            type(part) for part in nn.TransformerEncoder(layer, 2).modules()
        }
        torch.testing.assert_close(merged(x, src_key_padding_mask=padding)[real], trained[real], rtol=1e-4, atol=1e-5)
        unload_lora(model)
        assert torch.equal(model(x), base_out)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_names_kinds_and_what_trains():
    model = Block()
    report = _injected(model)
    assert [(row.name, row.kind, row.shape, row.parameters) for row in report.rows] == [
        ("attn", "MultiheadAttention", (8, 24), 3 * 32),
        ("attn.out_proj", "Linear", (8, 8), 3 * 16),
    ]
    expected = {f"attn.{part}lora_{side}" for part in ("", "out_proj.") for side in "AB"}
    assert expected == set(lora_state_dict(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert type(model.attn) is LoraMultiheadAttention
    assert "r=3, scaling=2" in repr(model.attn)
    unload_lora(model)
    assert type(model.attn) is nn.MultiheadAttention
    alone = Block()
    _injected(alone, ["out_proj"])
    assert isinstance(alone.attn, LoraReadsOutProj)
    assert not isinstance(alone.attn, LoraLayer)
    unload_lora(alone)
    assert type(alone.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("targets", TARGETS)
def test_copies_pickles_and_compiled_models_compute_the_same(targets):
    model, x = Block(batch_first=True).eval(), torch.randn(2, 5, 8)
    _injected(model, targets)
    out = model(x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0], out)
        unload_lora(twin)
        assert type(twin.attn) is nn.MultiheadAttention
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x)[0], out)
    assert "in_proj_weight" not in vars(model.attn)
    assert "weight" not in vars(model.attn.out_proj)


def test_a_subclass_with_a_forward_of_its_own(shake):
    model, x = nn.Sequential(Renamed(8, 2, batch_first=True)).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    before = model(x)
    _injected(model, ["0"])
    out = model(x)
    assert not torch.allclose(out, before, atol=1e-3)
    merge_lora(model)
    assert type(model[0]) is Renamed
    torch.testing.assert_close(model(x), out, **EXACT)


def test_an_error_inside_leaves_the_weights_where_they_were():
    model = Block()
    _injected(model)
    with pytest.raises(Exception, match=r"size|shape|expect"):
        model(torch.randn(2, 5, 7))
    assert "in_proj_weight" not in vars(model.attn)
    assert "weight" not in vars(model.attn.out_proj)


def test_checkpointed_activations_give_the_same_gradients():
    model, x = Block().double(), torch.randn(5, 2, 8, dtype=torch.float64)
    _injected(model)
    own = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x)[0].sum(), own)
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False)[0].sum(), own)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert "in_proj_weight" not in vars(model.attn)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_pefts(bias, tmp_path, shake):
    base = Block(add_bias_kv=True).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["attn"], bias=bias))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="twice"):
        load_adapter(ours, tmp_path / "theirs", trainable=True)
    trains = sorted(name for name, p in ours.named_parameters() if p.requires_grad)
    assert len(trains) == sum(p.requires_grad for p in theirs.parameters())
    assert "attn.out_proj.bias" in trains
    assert ("after.bias" in trains) == (bias == "all")
    assert {row.kind for row in inject_lora(ours, LoraConfig(r=2, target_modules=["attn"], bias=bias)).rows} == {
        "MultiheadAttention",
        "Linear",
        "bias",
    }
    shake(ours)
    with pytest.warns(UserWarning, match="twice"):
        folder = save_adapter(ours, tmp_path / "ours")
    assert load_file(folder / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    unload_lora(ours)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in ours.state_dict().items())


def test_half_precision_bases():
    model, x = Block(batch_first=True), torch.randn(2, 5, 8)
    half = copy.deepcopy(model).bfloat16()
    for each in (model, half):
        _injected(each)
    assert half.attn.lora_A.dtype == torch.float32
    out = half(x.bfloat16())[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 5}}]
)
def test_peft_reads_ours_and_applies_the_out_projection_twice(fields, tmp_path, shake):
    base = Block(batch_first=True).double()
    ours, x = copy.deepcopy(base), torch.randn(2, 5, 8, dtype=torch.float64)
    _injected(ours, **fields)
    shake(ours)
    with pytest.warns(UserWarning, match=r"out_proj twice.*PEFT will give other outputs.*Layers: attn\.out_proj"):
        folder = save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
    wanted = theirs(x)[0]
    assert not torch.allclose(ours(x)[0], wanted, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    with pytest.warns(UserWarning, match=r"applies the update.*twice.*double it after loading: layer\.lora_B"):
        load_adapter(again, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(again(x)[0], ours(x)[0], **EXACT)
    again.attn.out_proj.lora_B.data.mul_(2)
    torch.testing.assert_close(again(x)[0], wanted, **EXACT)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, folder)
    torch.testing.assert_close(fresh(x)[0], ours(x)[0], **EXACT)


@pytest.mark.parametrize("targets", [["attn", "out_proj"], r".*attn.*"])
def test_targets_that_match_both_the_attention_and_its_projection(targets, tmp_path, caplog):
    """PEFT makes a second adapter of ``out_proj`` then, and never uses it."""
    base, x = Block().double(), torch.randn(5, 2, 8, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="twice"), caplog.at_level("INFO"):
        load_adapter(base, tmp_path / "theirs")
    assert "never used by PEFT either: base_model.model.attn.out_proj.base_layer.bias" in caplog.text
    with pytest.warns(UserWarning, match="twice"):
        folder = save_adapter(base, tmp_path / "ours")
    base.attn.out_proj.lora_B.data.mul_(2)
    torch.testing.assert_close(base(x)[0], theirs(x)[0], **EXACT)
    unload_lora(base)
    again = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    torch.testing.assert_close(again(x)[0], theirs(x)[0], **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("targets", TARGETS)
def test_on_cuda(targets):
    model, x = Block(batch_first=True).eval(), torch.randn(2, 5, 8)
    _injected(model, targets)
    wanted = model(x)[0]
    model.cuda()
    torch.testing.assert_close(model(x.cuda())[0].cpu(), wanted, rtol=1e-2, atol=1e-2)
    with torch.no_grad():  # the fused kernel of inference
        torch.testing.assert_close(model(x.cuda())[0].cpu(), wanted, rtol=1e-2, atol=1e-2)


def test_siglip_s_pooling_attention_and_patches_are_pefts(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["attention", "patch_embedding"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"twice.*Layers: .*head\.attention\.out_proj"):
        report = load_adapter(base, tmp_path)
    assert [row.kind for row in report.rows] == ["Conv", "MultiheadAttention", "Linear"]
    outs = [part for name, part in base.named_modules() if name.endswith("head.attention.out_proj")]
    outs[0].lora_B.data.mul_(2)
    torch.testing.assert_close(base(x).pooler_output, theirs(x).pooler_output, **EXACT)


def test_an_out_projection_alone_goes_both_ways_in_files(tmp_path, shake):
    base = Block(batch_first=True)
    ours, x = copy.deepcopy(base), torch.randn(2, 5, 8)
    _injected(ours, ["out_proj"])
    shake(ours)
    with pytest.warns(UserWarning, match="never applies"):
        folder = save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(theirs(x)[0], base(x)[0])
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="never applies"):
        load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(x)[0], ours(x)[0])


def test_dora_on_an_out_projection_alone_is_seen():
    model, x = nn.ModuleDict({"attn": Renamed(8, 2)}).double(), torch.randn(5, 2, 8, dtype=torch.float64)
    _injected(model, ["out_proj"], use_dora=True)
    model.attn.out_proj.lora_magnitude.data.mul_(1.5)
    out = model.attn(x)
    out.sum().backward()
    assert all(p.grad.any() for p in model.attn.out_proj.lora_own.values())
    merge_lora(model)
    torch.testing.assert_close(model.attn(x), out.detach(), **EXACT)


def test_a_bias_of_b_on_an_out_projection_alone_is_seen():
    model, x = nn.ModuleDict({"attn": Renamed(8, 2)}).double(), torch.randn(5, 2, 8, dtype=torch.float64)
    _injected(model, ["out_proj"], lora_bias=True)
    model.attn.out_proj.lora_B_bias.data.normal_()
    out = model.attn(x)
    merge_lora(model)
    torch.testing.assert_close(model.attn(x), out.detach(), **EXACT)


def test_one_scale_is_for_linear_layers_alone(tmp_path):
    model = Block()
    _injected(model)
    with pytest.raises(AdapterError, match=r"not base_model\.model\.attn\.base_layer\.out_proj\.lora_A"):
        save_adapter(model, tmp_path, fold_scaling=True)


def test_patterns_know_the_projections_by_the_attention_s_name():
    model = Block()
    with pytest.warns(UserWarning, match=r"no effect: rank_pattern\['out_proj'\]"):
        report = _injected(model, rank_pattern={"out_proj": 1, "attn": 2})
    assert [row.r for row in report.rows] == [2, 2]


def test_exclude_modules_leaves_the_out_projection_out():
    model = Block()
    assert [row.name for row in _injected(model, exclude_modules=["out_proj"]).rows] == ["attn"]


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (lambda: Block(kdim=4), {}, r"attn cannot be adapted: its keys \(kdim=4\)"),
        (lambda: Block(vdim=4), {}, r"values \(vdim=4\)"),
        (Block, {"use_dora": True}, "use_dora does not go with a layer of class MultiheadAttention"),
        (Block, {"lora_bias": True, "init_lora_weights": True}, "lora_bias does not go with .* MultiheadAttention"),
        (
            Block,
            {"target_modules": ["out_proj"], "target_parameters": ["in_proj_weight"]},
            "as a whole: leave",
        ),
        (
            Block,
            {"target_modules": ["after"], "target_parameters": ["out_proj.weight"]},
            "name attn.out_proj in target",
        ),
        (Block, {"init_lora_weights": "pissa"}, "'pissa' is not for a MultiheadAttention"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(make, fields, message):
    model = make()
    with pytest.raises(LoraConfigError, match=message):
        _injected(model, **fields)
    assert not any(isinstance(part, LoraLayer) for part in model.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_that_is_recomputed_is_refused():
    model = Block()
    nn.utils.weight_norm(model.attn, "in_proj_weight")
    with pytest.raises(LoraConfigError, match="in_proj_weight is recomputed before each forward"):
        _injected(model)


def test_threads_do_not_take_each_others_weights_away():
    model = Block().eval()
    _injected(model)
    inputs = [torch.randn(5, 2, 8) for _ in range(8)]
    wanted = [model(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for one, other in zip(pool.map(lambda x: model(x)[0], inputs), wanted, strict=True):
                assert torch.equal(one, other)


def test_an_attention_that_cannot_be_changed_refuses_its_out_projection_too():
    model = Block()
    model.attn.forward = model.attn.forward
    with pytest.raises(LoraConfigError, match=r"attn\.out_proj cannot be adapted: the attention around it reads"):
        _injected(model, ["out_proj"])


@pytest.mark.parametrize("targets", TARGETS)
def test_an_attention_under_a_hook_of_accelerate_reads_what_is_adapted(targets):
    model, x = Block(), torch.randn(5, 2, 8)
    before = model(x)[0]
    add_hook_to_module(model.attn, AlignDevicesHook("cpu"))
    _injected(model, targets)
    assert not torch.allclose(model(x)[0], before, atol=1e-3)
    unload_lora(model)
    assert torch.equal(model(x)[0], before)
    assert hasattr(model.attn, "_hf_hook")


def test_dropout_that_has_no_place_is_told():
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 has no effect in attn, attn\.out_proj"):
        _injected(Block(), lora_dropout=0.1)
