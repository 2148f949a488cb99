"""What a plan reckons beside what the C library's heap grows to in a real training, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from lora_lightning import LoraConfig
from lora_lightning.reports.plan import plan

GLIBC = platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 33)
pytestmark = pytest.mark.skipif(not GLIBC, reason="glibc's account of its heap")

ROWS, TOKENS = 8, 128
TRAINING = """
import ctypes, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from lora_lightning import LoraConfig, inject_lora
from lora_lightning.strategies.allocator import keep_freed_memory
from lora_lightning.strategies.checkpointing import checkpoint_activations
from lora_lightning.tasks.loss import causal_lm_loss

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap

keep_freed_memory()
config, (rows, tokens) = AutoConfig.from_pretrained(sys.argv[1]), map(int, sys.argv[2:])
ids = torch.randint(1000, (rows, tokens))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

def training(layers):
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).train()
    checkpoint_activations(model)
    inject_lora(model, LoraConfig(r=16, lora_dropout=0.05))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        causal_lm_loss(model, batch).mean.backward()
        optimizer.step()
        optimizer.zero_grad()

layers = config.num_hidden_layers
training(1)  # what only the first one imports
before = heap()
training(layers)
after = heap()
print(after.arena + after.hblkhd - before.uordblks - before.hblkhd)
"""


def test_the_heap_of_a_training_that_computes_activations_again(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 16, "vocab_size": 2000}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    command = [sys.executable, "-c", TRAINING, str(tmp_path), str(ROWS), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    model = {"name": str(tmp_path), "gradient_checkpointing": True}
    settings = {"rows": ROWS, "tokens": TOKENS, "padded": False, "calibration": False}
    assert plan(model, LoraConfig(r=16, lora_dropout=0.05), **settings).memory.total == pytest.approx(peak, rel=0.15)
