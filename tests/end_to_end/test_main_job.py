"""The demo on its real model, cut short: what it leaves, and that every reader agrees on it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    settings = [f"trainer.max_steps={STEPS}", "data.val_rows=8", "data.samples=1", "task.max_new_tokens=8"]
    command = [sys.executable, "scripts/train.py", *settings, f"trainer.val_check_interval={STEPS // 2}"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run / "result.json").read_text())


@pytest.mark.timeout(700)
def test_what_it_leaves(run, result):
    files = {"adapter", "checkpoints", "config.yaml", "metrics.csv", "loss.png", "samples.md", "result.json"}
    assert files <= {path.name for path in run.iterdir()}
    assert result["status"] == "finished"
    assert result["val_loss"] < result["val_loss_before"]
    assert result["steps"] == STEPS
    assert result["trainable_parameters"] == 4_884_480
    assert all(result[key] > 0 for key in ("seconds", "tokens_per_second", "peak_memory_bytes", "perplexity"))
    adapter = run / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in adapter.iterdir()
    }
    samples = (run / "samples.md").read_text()
    assert samples.index("Before training") < samples.index("After 3 steps") < samples.index("After training")


def test_the_checkpoint_is_the_adapter_and_its_optimizer(run):
    adapter = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    for path in (run / "checkpoints").glob("*.ckpt"):
        assert path.stat().st_size < 3 * adapter + 2**20
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(name.endswith(("lora_A", "lora_B")) for name in state)
        assert len(state) == 2 * 210


def test_peft_and_transformers_read_the_adapter_as_we_do(run):
    import peft

    from lora_lightning import load_adapter
    from lora_lightning.tasks import ModelConfig
    from lora_lightning.tasks.model import load_model

    def base():
        return load_model(ModelConfig.of("demo:smollm2-135m-instruct"), "causal_lm").eval()

    folder = run / "adapter"
    tokens = torch.randint(0, 49_152, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = base()(tokens).logits
        ours = base()
        load_adapter(ours, folder)
        logits = ours(tokens).logits
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval()(tokens).logits
        transformers_own = base()
        transformers_own.load_adapter(str(folder))
        assert (logits - plain).abs().max() > 0.1
        torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(transformers_own(tokens).logits, logits, atol=1e-4, rtol=0)
    assert load_file(folder / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == (16, 576)
    assert os.access(folder / "adapter_model.safetensors", os.R_OK)
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o044
