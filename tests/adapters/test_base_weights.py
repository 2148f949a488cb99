"""A model without memory, sharded over real processes, filled from files: bit for bit as a whole one is sharded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lora_lightning import AdapterError, LoraConfig, inject_lora, load_base, lora_state_dict, meta_parameters

SIZES = {
    "vocab_size": 65,  # not divisible by two processes
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LORA = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["norm"]}

SCRIPT = """
import json
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from lora_lightning import LoraConfig, inject_lora, load_base, meta_parameters

folder, kind, sizes, lora = arguments[0], arguments[1], json.loads(arguments[2]), json.loads(arguments[3])
dp, tp = {"fsdp2": (world, 1), "tp": (1, world), "both": (world // 2, 2)}[kind]
mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("data_parallel", "tensor_parallel"))
plan = {
    "model.layers.*.self_attn.q_proj": ColwiseParallel(), "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(), "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(), "model.layers.*.mlp.up_proj": ColwiseParallel(),
}


def shard(model):
    inject_lora(model, LoraConfig(**lora), seed=5)
    if tp > 1:
        parallelize_module(model, mesh["tensor_parallel"], plan)
    if dp > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
    return model


torch.manual_seed(rank)  # ranks need not agree on anything
whole = shard(LlamaForCausalLM.from_pretrained(folder))
with meta_parameters():
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
assert all(p.is_meta for p in model.parameters())
shard(model)
load_base(model, folder)

assert model.lm_head.weight is model.model.embed_tokens.weight
assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
expected, given = dict(whole.named_parameters()), dict(model.named_parameters())
assert expected.keys() == given.keys() and sum("lora_" in name for name in given) == 28
sharded = 0
for name, value in given.items():
    assert value.requires_grad == expected[name].requires_grad == ("lora_" in name or name == "model.norm.weight")
    assert type(value) is type(expected[name])
    if isinstance(value, DTensor):
        assert value.placements == expected[name].placements and value.shape == expected[name].shape
        sharded += value.to_local().shape != value.shape
        value, there = value.to_local(), expected[name].to_local()
        assert torch.equal(value, there), name
    else:
        assert torch.equal(value, expected[name]), name
assert sharded > 10, sharded

tokens = torch.arange(18).view(2, 9)
losses = []
for each in (whole, model):
    with torch.no_grad():
        for name, parameter in each.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    loss = each(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    losses.append(loss.item())
assert losses[0] == losses[1], losses
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["fsdp2", "tp", pytest.param("both", marks=pytest.mark.slow)])
def test_each_process_gets_its_part(processes, folder, kind):
    processes(SCRIPT, folder, kind, json.dumps(SIZES), json.dumps(LORA), world=4 if kind == "both" else 2)


def _empty(folder, kind=LlamaForCausalLM, **settings):
    with meta_parameters():
        return kind(LlamaConfig.from_pretrained(folder, **settings))


def _one_file(folder, change=lambda tensors: tensors):
    """The folder with its tensors in one file, changed."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def test_one_process_is_what_from_pretrained_gives(folder):
    expected = LlamaForCausalLM.from_pretrained(folder)
    inject_lora(expected, LoraConfig(**LORA), seed=2)
    model = _empty(folder)
    inject_lora(model, LoraConfig(**LORA), seed=2)
    load_base(model, _one_file(folder))
    assert expected.state_dict().keys() == model.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lora_state_dict(model).keys() == lora_state_dict(expected).keys()


def test_unload_after_training_gives_back_the_values_of_the_file(folder, shake):
    from lora_lightning import unload_lora

    model = _empty(folder)
    inject_lora(model, LoraConfig(**LORA))
    load_base(model, folder)
    shake(model)
    unload_lora(model)
    assert torch.equal(model.model.norm.weight, LlamaForCausalLM.from_pretrained(folder).model.norm.weight)


def test_dtype_is_the_models_or_the_one_asked_for(folder):
    model = _empty(folder).to(torch.bfloat16)
    load_base(model, folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = _empty(folder)
    inject_lora(model, LoraConfig(**LORA))
    load_base(model, folder, dtype=torch.float16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert model.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float32


def test_inside_a_lightning_module_and_of_the_backbone_alone(folder):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _empty(folder)
            self.head = nn.Linear(2, 2)

    outer = Outer()
    before = outer.head.weight.clone()
    backbone = _one_file(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    load_base(outer, backbone)
    tensors = load_file(backbone / "model.safetensors")
    assert torch.equal(outer.net.model.layers[1].mlp.up_proj.weight, tensors["layers.1.mlp.up_proj.weight"])
    assert torch.equal(outer.head.weight, before)


def test_a_fresh_head_and_an_unused_one(folder):
    _one_file(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    models = [_empty(folder, LlamaForSequenceClassification, num_labels=3) for _ in range(2)]
    with pytest.raises(AdapterError) as told:
        load_base(models[0], folder)
    for part in ("missing: score.weight", "not expected: lm_head.weight", "fresh=['score']", "unused=['lm_head']"):
        assert part in str(told.value)
    assert models[0].score.weight.is_meta
    for model in models:
        load_base(model, folder, fresh=["score"], unused=["lm_head"], seed=4)
    assert torch.equal(models[0].score.weight, models[1].score.weight)
    assert 0.01 < models[0].score.weight.std() < 0.03


def test_what_does_not_fit_is_told_at_once(folder, tmp_path):
    model = _empty(folder)

    def change(tensors):
        tensors["model.layers.0.mlp.up_porj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 48, dtype=torch.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older files have it: passed over
        return tensors

    with pytest.raises(AdapterError) as told:
        load_base(model, _one_file(folder, change))
    for part in (
        "missing: model.layers.0.mlp.up_proj.weight",
        "not expected: model.layers.0.mlp.up_porj.weight\n",
        "did you mean model.layers.0.mlp.up_porj.weight?",
        "model.norm.weight is (31,), the model's is (32,)",
        "down_proj.weight is stored as whole numbers",
    ):
        assert part in str(told.value)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(AdapterError, match=r"nowhere has no model.safetensors: .* There is: no such folder"):
        load_base(model, tmp_path / "nowhere")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../base/x"}}')
    with pytest.raises(AdapterError, match="outside its folder"):
        load_base(model, tmp_path / "outside")


def test_buffers_without_values_are_refused(folder):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    with pytest.raises(AdapterError, match=r"rotary_emb.inv_freq.*meta_parameters"):
        load_base(model, folder)


def test_running_statistics_come_from_the_file(tmp_path):
    source = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    source(torch.randn(16, 4))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with meta_parameters():
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    inject_lora(model, LoraConfig(r=2))
    load_base(model, tmp_path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
