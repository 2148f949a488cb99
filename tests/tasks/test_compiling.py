"""Compiled blocks against plain ones: the same values and names, one graph for all; refused without a compiler."""

import copy
import logging

import pytest
import torch
from torch import nn

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, inject_lora, lora_parameters
from lora_lightning.tasks import CausalLM, ModelConfig
from lora_lightning.tasks import compiling as module_under_test
from lora_lightning.tasks.compiling import compile_blocks, missing_compiler


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _llama(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **small)).train()


def _backward(model, tokens):
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def test_blocks_share_their_graphs_and_give_the_same_gradients(tokens, shake, monkeypatch):
    graphs = []

    def counting(graph, examples):
        graphs.append(graph)
        return graph.forward

    counts = []
    for layers in (3, 6):
        torch.compiler.reset()
        graphs.clear()
        plain = _llama(layers)
        inject_lora(plain, LoraConfig(r=2, lora_dropout=0.0))
        shake(plain)
        compiled = copy.deepcopy(plain)
        assert compile_blocks(compiled, backend=counting) == layers
        for batch in (tokens, tokens[:, :5], tokens[:1]):
            torch.testing.assert_close(_backward(compiled, batch), _backward(plain, batch))
        for (name, p), (other, q) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
            assert name == other
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        counts.append(len(graphs))
    assert counts[0] == counts[1]


def test_a_network_without_blocks_is_compiled_as_a_whole():
    model = nn.Sequential(nn.Linear(2, 2))
    assert compile_blocks(model, backend="eager") == 1
    assert model._compiled_call_impl is not None


def test_a_run_says_what_warming_up_cost_and_trains_and_saves_as_without(fit, rows, monkeypatch, caplog, tmp_path):
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compile_(self, **{**k, "backend": "aot_eager"}))

    def run(compiled):
        task = CausalLM(ModelConfig("demo:tiny-llama", compile=compiled))
        fit(task, rows, 2, callbacks=[LoraCallback(LoraConfig(r=2))]).save_checkpoint(tmp_path / f"{compiled}.ckpt")
        return lora_parameters(task)

    with caplog.at_level(logging.INFO):
        compiled, plain = run(True), run(False)
    assert caplog.text.count("so warming up cost about") == 1
    assert list(compiled) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
    states = [torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)["state_dict"] for kind in (True, False)]
    assert states[0].keys() == states[1].keys()
    assert not any("_orig_mod" in name for name in states[0])


def test_without_a_compiler_it_is_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module_under_test, "likely_device", lambda: torch.device("cpu"))
    with pytest.raises(LoraConfigError, match=r"compile: true needs a C\+\+ compiler \(g\+\+, .*set compile: false"):
        compile_blocks(_llama(2))
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", "mine -O2")
    assert missing_compiler(torch.device("cpu")) is None
    monkeypatch.setattr(module_under_test.importlib.util, "find_spec", lambda name: None)
    assert "Triton" in missing_compiler(torch.device("cuda"))


@pytest.mark.slow
def test_the_real_compiler(tokens):
    if missing_compiler(torch.device("cpu")) is not None:
        pytest.skip("no compiler here")
    plain = _llama(2)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    torch.testing.assert_close(_backward(compiled, tokens), _backward(plain, tokens))
