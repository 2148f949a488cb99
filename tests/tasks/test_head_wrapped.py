"""The loss of models that something is wrapped around: compilers, engines that spread weights, checkpointing."""

import gc
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.tasks.loss import causal_lm_loss, token_losses

V = 67
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def build(kind="Llama", layers=2):
    torch.manual_seed(0)
    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=layers, **SIZES))
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=V, num_hidden_layers=layers, head_dim=8, final_logit_softcapping=0.5, **SIZES)
    )


@pytest.fixture
def batch():
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def assert_equal(wrapped, model, batch, *, made=False):
    """The loss and gradients of a wrapped model are those of the model by itself, with or without its logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = causal_lm_loss(wrapped, batch).mean
    found = torch.autograd.grad(loss, trained)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, torch.autograd.grad(expected, trained), atol=1e-6, rtol=1e-4)
    assert (token_losses(wrapped, batch).outputs.logits.shape[1] > 2) == made


def test_compiled(batch):
    """The head is left out of the graph, which is made once."""
    torch._dynamo.reset()
    model = build("Gemma2", layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    assert_equal(compiled, model, batch)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batch["labels"][2, 3:] = -100
    for _ in range(3):
        assert_equal(compiled, model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    model.compile(backend="aot_eager")
    assert_equal(model, model, batch)


def test_compiled_as_one_graph(batch):
    torch._dynamo.reset()
    model = build(layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="makes its logits in full"):
        causal_lm_loss(compiled, batch)
    assert_equal(compiled, model, batch, made=True)


def test_a_whole_step_compiled(batch):
    torch._dynamo.reset()
    model = build(layers=1)
    step = torch.compile(lambda batch: causal_lm_loss(model, batch).mean, backend="aot_eager")
    torch.testing.assert_close(step(batch), causal_lm_loss(model, batch).mean)


def test_a_step_compiled_while_other_models_go_away(batch):
    """What is remembered of models lives as long as they do: the compiler must not count on where it stood."""
    torch._dynamo.reset()
    others = [build(layers=1) for _ in range(8)]
    for other in others:
        causal_lm_loss(other, batch)
    del other

    def forgetting(graph, _):
        del others[:1]
        gc.collect()
        return graph

    model = build(layers=1)
    step = torch.compile(lambda batch: causal_lm_loss(model, batch).mean, backend=forgetting)
    torch.testing.assert_close(step(batch), causal_lm_loss(model, batch).mean)
    assert len(others) < 8


class Around(nn.Module):
    """Says nothing of what it takes."""

    def __init__(self, inner):
        super().__init__()
        self.other, self.inner = nn.Linear(2, 2), inner

    def forward(self, *args, **kwargs):
        assert {"input_ids", "attention_mask"} <= kwargs.keys()
        return self.inner(*args, **kwargs)


def test_a_wrapper_that_says_nothing_of_what_it_takes(batch):
    model = build()
    assert_equal(Around(model), model, batch | {"note": torch.zeros(4)})


def test_peft(batch):
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert_equal(model, model, batch)
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    assert_equal(model, model, batch, made=True)


def test_recomputed_activations(batch):
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(model, model, batch)
    model = build()
    assert_equal(checkpoint_wrapper(model), model, batch, made=True)


def test_autocast(batch):
    model = build("Gemma2")
    with torch.autocast("cpu", torch.bfloat16):
        loss = causal_lm_loss(model, batch).mean
        expected = model(**batch).loss
    torch.testing.assert_close(loss, expected, atol=1e-2, rtol=0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(batch, dtype):
    for kind in ("Llama", "Gemma2"):
        model = build(kind).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = causal_lm_loss(model, batch).mean
        torch.testing.assert_close(loss, model(**batch).loss, atol=1e-2, rtol=0)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_inference_mode_before_training(batch):
    model = build("Gemma2")
    with torch.inference_mode():
        seen = causal_lm_loss(model, batch).mean
    assert_equal(model, model, batch)
    torch.testing.assert_close(causal_lm_loss(model, batch).mean.detach(), seen.clone())


# In two processes, each on half of the rows, with an adapter on linear layers, the head among them.
SPREAD = """
import warnings
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from lora_lightning.injection.names import canonical
from lora_lightning.tasks.loss import causal_lm_loss, token_losses
from tests.tasks.test_head_wrapped import WAYS, adapted

warnings.filterwarnings("error", "(?s).*makes its logits in full")
mesh = init_device_mesh("cpu", (world,))
batch = torch.load(arguments[0])
rows = {key: value[rank::world] for key, value in batch.items()}

def spread(model, way):
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if way == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if way == "fsdp2 of the head":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=way != "fsdp2 kept")

def whole(gradient, way):
    if way == "fsdp1":
        pieces = [None] * world
        dist.all_gather_object(pieces, None if gradient is None else gradient.flatten())
        return torch.cat([piece for piece in pieces if piece is not None])
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient

results = []
for way, kind, _ in WAYS:
    model = adapted(kind)
    outer = spread(model, way)
    with torch.no_grad():
        before = causal_lm_loss(outer, rows).total
    for _ in range(2):
        loss = causal_lm_loss(outer, rows).total
        torch.testing.assert_close(loss.detach(), before)
        (loss * world).backward()  # engines take the mean over the processes
    gradients = {canonical(n): whole(p.grad, way) for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        made = token_losses(outer, rows).outputs.logits.shape[1] > 2
    results.append({"loss": before, "gradients": gradients, "made": made})
torch.save(results, out / f"{rank}.pt")
"""
WAYS = [
    ("ddp", "Llama", False),
    ("ddp", "Gemma2", False),
    ("fsdp1", "Llama", False),
    ("fsdp2", "Llama", False),
    ("fsdp2", "Gemma2", False),
    ("fsdp2 kept", "Llama", False),
    ("fsdp2 of the head", "Llama", True),  # its weights are there only while it is called by itself
]


def adapted(kind):
    model = build(kind)
    targets = ["q_proj", "down_proj"] + (["lm_head"] if kind == "Llama" else [])
    inject_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets), seed=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_spread_over_processes(processes, batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    out = processes(SPREAD, tmp_path / "batch.pt")
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    for (way, kind, made), *found in zip(WAYS, *ranks, strict=True):
        model = adapted(kind)
        loss = causal_lm_loss(model, batch).total
        loss.backward()
        torch.testing.assert_close(sum(each["loss"] for each in found), loss.detach())
        expected = {name: 2 * p.grad for name, p in model.named_parameters() if "lora_" in name}  # of two backwards
        for each in found:
            assert each["made"] == made, way
            assert each["gradients"].keys() == expected.keys()
            for name, gradient in each["gradients"].items():
                close = torch.allclose(gradient.view_as(expected[name]), expected[name], atol=2e-5, rtol=1e-4)
                assert close, (way, name)
