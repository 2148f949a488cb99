"""Networks spread over two real processes compute what they compute whole; what cannot be spread is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp.wrap import _Policy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, unload_lora
from lora_lightning.strategies.blocks import WrapBlocks, blocks
from lora_lightning.strategies.checkpointing import checkpoint_activations, refuse_reentrant
from lora_lightning.strategies.parallelize import mixed_precision, tensor_parallel_plan

NETWORK = """
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width))
        self.up_proj, self.down_proj = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        b, t, _ = x.shape
        projected = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.view(b, t, self.num_heads, self.head_dim).transpose(1, 2) for y in projected)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 30)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""
exec(NETWORK)

SCRIPT = (
    NETWORK
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from lora_lightning import LoraConfig, LoraConfigError, inject_lora
from lora_lightning.strategies.parallelize import shard

kind, which, checkpointing = arguments[0], arguments[1], arguments[2] == "checkpointing"
sizes = {"fsdp2": (2, 1), "tp": (1, 2)}[kind]
mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))


def build():
    torch.manual_seed(1)
    if which == "own":
        model = Network()
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=which == "tied",
        ))
    inject_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    return model.train()


def gradients(model):
    tokens = torch.arange(18).view(2, 9)
    logits = model(tokens)
    logits = logits if which == "own" else logits.logits
    logits.float().logsumexp(-1).square().mean().backward()
    full = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), {name: full(p.grad) for name, p in named.items()}


expected, expected_gradients = gradients(build())
model = build()
assert shard(model, mesh, activation_checkpointing=checkpointing) is model
split = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
if kind == "fsdp2":
    assert split == {name for name, _ in model.named_parameters()}
    layers = model.blocks if which == "own" else model.model.layers
    assert all(isinstance(layer, FSDPModule) for layer in [model, *layers])
else:
    per_layer = 6 if which == "own" else 7
    weights = [name for name in split if name.endswith("proj.weight")]
    assert len(weights) == per_layer * (3 if which == "own" else 2), weights
    if which != "own":
        assert "model.embed_tokens.weight" in split and isinstance(model.lm_head.weight, DTensor)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (which == "tied")
given, given_gradients = gradients(model)
assert (given - expected).abs().max() < 1e-5 * expected.abs().max(), (given - expected).abs().max()
assert given_gradients.keys() == expected_gradients.keys() and len(given_gradients) >= 28
for name, gradient in given_gradients.items():
    assert (gradient - expected_gradients[name]).abs().max() < 1e-5, name

if kind == "fsdp2" and which == "own":
    torch.manual_seed(rank)
    try:
        shard(Network(), mesh)
    except LoraConfigError as error:
        assert "embed.weight and 38 more tensors are not the same on all processes" in str(error), error
    else:
        raise SystemExit("different weights were taken")
    import lightning.pytorch as pl
    try:
        shard(pl.LightningModule(), mesh)
    except LoraConfigError as error:
        assert "takes the network" in str(error)
    else:
        raise SystemExit("a LightningModule was taken")
if kind == "tp" and which == "own":
    odd = Network()
    odd.blocks[0].num_heads = 3
    try:
        shard(odd, mesh)
    except LoraConfigError as error:
        assert "num_heads=3 cannot be divided by 2" in str(error), error
    else:
        raise SystemExit("three heads were divided by two")
"""
)


@pytest.mark.parametrize(
    ("kind", "which", "checkpointing"),
    [
        ("fsdp2", "own", "checkpointing"),
        ("tp", "own", ""),
        ("tp", "untied", ""),
        pytest.param("fsdp2", "tied", "checkpointing", marks=pytest.mark.slow),
        pytest.param("tp", "tied", "checkpointing", marks=pytest.mark.slow),
        pytest.param("tp", "own", "checkpointing", marks=pytest.mark.slow),
    ],
)
def test_two_processes_compute_what_one_computes(processes, kind, which, checkpointing):
    processes(SCRIPT, kind, which, checkpointing)


def test_blocks_are_the_outermost_repeated_ones(llama, bert):
    assert blocks(llama) == list(llama.model.layers)
    assert blocks(bert) == list(bert.bert.encoder.layer)
    nested = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)] * 3)}) for _ in range(2)])
    assert blocks(nn.ModuleDict({"a": nested})) == list(nested)
    assert blocks(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])) == []


def test_the_wrap_policy_wraps_each_block(llama):
    policy = WrapBlocks()
    assert isinstance(policy, _Policy)
    assert list(policy._run_policy(llama, set(), {"a": 1})) == list(llama.model.layers)
    by_name = WrapBlocks(["LlamaMLP"])._run_policy(llama, {llama.model.layers[0].mlp}, {})
    assert list(by_name) == [llama.model.layers[1].mlp]
    with pytest.raises(LoraConfigError, match=r"no module to wrap.*LammaDecoderLayer"):
        WrapBlocks(["LammaDecoderLayer"])._run_policy(llama, set(), {})


FSDP_SCRIPT = (
    NETWORK
    + """
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from lora_lightning.strategies.blocks import WrapBlocks

torch.manual_seed(1)
whole = Network()
tokens = torch.arange(18).view(2, 9)
expected = whole(tokens)
model = FSDP(whole, auto_wrap_policy=WrapBlocks(), device_id=torch.device("cpu"))
assert [isinstance(block, FSDP) for block in model.blocks] == [True] * 3
assert sum(isinstance(module, FSDP) for module in model.modules()) == 4
assert (model(tokens) - expected).abs().max() < 1e-6
"""
)


def test_fsdp_takes_the_wrap_policy(processes):
    processes(FSDP_SCRIPT)


def test_plan_of_a_transformers_model_and_by_names(llama):
    plan = tensor_parallel_plan(nn.ModuleDict({"net": llama}))
    assert len(plan) == 2 * 7 + 2
    assert isinstance(plan["net.model.layers.1.self_attn.o_proj"], RowwiseParallel)
    assert isinstance(plan["net.lm_head"], ColwiseParallel)
    assert len(tensor_parallel_plan(Network())) == 3 * 6  # noqa: F821  # made above
    assert set(tensor_parallel_plan(llama, {"model.layers.*.mlp.up_proj": "colwise"})) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_tied_weights_are_split_alike_or_not_at_all(llama):
    llama.lm_head.weight = llama.model.embed_tokens.weight
    layers = {"model.layers.*.mlp.up_proj": "colwise"}
    assert len(tensor_parallel_plan(llama, layers | {"lm_head": "colwise_rep"})) == 2
    both = {"lm_head": "colwise_rep", "model.embed_tokens": "embedding_rowwise"}
    assert len(tensor_parallel_plan(llama, layers | both)) == 4
    assert len(tensor_parallel_plan(llama, layers | both | {"model.embed_tokens": ColwiseParallel()})) == 2


def test_no_plan_and_unknown_styles_are_told(llama):
    with pytest.raises(LoraConfigError, match=r"no tensor-parallel plan for Sequential.*its layers are 0, 1"):
        tensor_parallel_plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(LoraConfigError, match=r"model.layers.0.mlp.up_proj is to be split as 'packed_colwise'"):
        tensor_parallel_plan(llama, {"model.layers.*.mlp.up_proj": "packed_colwise"})


def test_adapters_that_cannot_be_split_are_told(llama):
    inject_lora(llama, LoraConfig(r=2, target_parameters=["q_proj.weight"], target_modules=["v_proj"]))
    with pytest.raises(LoraConfigError, match=r"q_proj has an adapter of its own parameters \(target_parameters\)"):
        tensor_parallel_plan(llama)
    unload_lora(llama)
    tokens = {"lm_head": [1]}
    inject_lora(llama, LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=tokens))
    with pytest.raises(LoraConfigError, match=r"tokens of lm_head train .* inject after shard"):
        tensor_parallel_plan(llama, {"lm_head": "colwise"})


def test_precision():
    assert mixed_precision("bf16-mixed").param_dtype == torch.bfloat16
    assert mixed_precision("bf16-mixed").reduce_dtype == torch.float32
    assert mixed_precision("bf16-true").param_dtype is None
    with pytest.raises(LoraConfigError, match="16-mixed"):
        mixed_precision("16-mixed")


def test_reentrant_checkpointing_is_refused(llama):
    checkpoint_activations(llama)
    refuse_reentrant(llama)
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    refuse_reentrant(llama)  # transformers makes the embeddings' output require gradients
    llama.disable_input_require_grads()
    with pytest.raises(LoraConfigError, match="re-entrant"):
        refuse_reentrant(llama)
    with pytest.raises(LoraConfigError, match="1 uses re-entrant"):
        refuse_reentrant(
            nn.Sequential(nn.ReLU(), checkpoint_wrapper(nn.Linear(2, 2), checkpoint_impl=CheckpointImpl.REENTRANT))
        )
    with pytest.raises(LoraConfigError, match="no activations to checkpoint"):
        checkpoint_activations(nn.Linear(2, 2))
