"""The same adapter gives the same bytes, in whatever process; what is too much or missing in a file is named."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lightning
from lora_lightning import AdapterError, LoraConfig, inject_lora, load_adapter, lora_state_dict, save_adapter
from lora_lightning.adapters import adapter_from_checkpoint
from lora_lightning.adapters.checkpoint import CHECKPOINT_KEY, FORMAT, checkpoint_entry
from lora_lightning.adapters.merge import fold_in
from lora_lightning.injection.state import injected_roots

SCRIPT = """
import sys
import torch
from torch import nn
from lora_lightning import LoraConfig, inject_lora, save_adapter
torch.manual_seed(0)
block = lambda: nn.ModuleDict({f"{name}_proj": nn.Linear(8, 8) for name in ("q", "k", "v", "o", "up", "down")})
model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 9)})
config = LoraConfig(
    r=2,
    target_modules={"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    exclude_modules={"layers.1.up_proj", "layers.1.o_proj", "layers.0.q_proj"},
    modules_to_save={"head", "norm"},
    rank_pattern={"v_proj": 3, "k_proj": 1},
)
inject_lora(model, config, seed=5)
save_adapter(model, sys.argv[1])
"""
FILES = ("adapter_config.json", "adapter_model.safetensors", "lora_lightning.json")


def test_the_files_are_the_same_bytes_in_every_process(tmp_path):
    started = []
    for seed in ("1", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(lora_lightning.__file__).parents[1])
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / seed)]
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path))
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4242" / name).read_bytes(), name
    assert str(tmp_path) not in (tmp_path / "1" / "adapter_config.json").read_text()


def test_of_patterns_that_overlap_the_first_still_counts(llama, tokens, tmp_path):
    """Sorted, as PEFT's own writer has them, they would mean other ranks."""
    bases = [copy.deepcopy(llama) for _ in range(2)]
    ranks, alphas = {"q_proj": 3, r".*layers\.0\..*": 1}, {"v_proj": 5, r".*": 7}
    inject_lora(llama, LoraConfig(r=2, rank_pattern=ranks, alpha_pattern=alphas, init_lora_weights=False))
    folder = save_adapter(llama, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert list(config["rank_pattern"]) == list(ranks)
    load_adapter(bases[0], folder)
    assert torch.equal(bases[0](tokens).logits, llama(tokens).logits)
    theirs = peft.PeftModel.from_pretrained(bases[1], folder).eval()
    torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits)


# ---- keys


@pytest.fixture
def saved(llama, shake, tmp_path):
    base = copy.deepcopy(llama)
    inject_lora(llama, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    shake(llama)
    return base, save_adapter(llama, tmp_path / "adapter")


def edit(folder, change, name="adapter_model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
WRONG = {
    "missing": (lambda tensors: tensors.pop(KEY), r"missing: model\.layers\.1\.self_attn\.q_proj\.lora_B"),
    "unexpected": (lambda tensors: tensors.update({KEY.replace("q_", "k_"): torch.ones(2)}), r"not expected: .*k_proj"),
    "no adapter's base copy": (
        lambda tensors: tensors.update({"base_model.model.model.norm.base_layer.weight": torch.ones(32)}),
        r"not expected: base_model\.model\.model\.norm\.base_layer\.weight",
    ),
    "an embedding in full": (
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)}),
        r"not expected: base_model\.model\.model\.embed_tokens\.weight",
    ),
}
INJECTED = {"target_modules": ["q_proj", "embed_tokens"], "r": 2}
WAYS = {
    "a fresh model": lambda model, folder: load_adapter(model, folder),
    "to train": lambda model, folder: load_adapter(model, folder, trainable=True),
    "an injected model": lambda model, folder: (inject_lora(model, INJECTED), load_adapter(model, folder)),
    "folded in": fold_in,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", WRONG)
def test_keys_that_are_missing_or_too_many_are_named_on_every_way_in(saved, way, wrong):
    base, folder = saved
    change, message = WRONG[wrong]
    edit(folder, change)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        WAYS[way](base, folder)
    assert bool(injected_roots(base)) is (way == "an injected model")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_the_base_copy_of_an_adapted_embedding_is_no_key_too_many(saved, tokens, llama):
    base, folder = saved
    key = "base_model.model.model.embed_tokens.base_layer.weight"  # PEFT writes it
    edit(folder, lambda tensors: tensors.update({key: torch.full((64, 32), 7.0)}))
    load_adapter(base, folder)
    assert torch.equal(base(tokens).logits, llama(tokens).logits)


def around(llama):
    torch.manual_seed(1)
    return nn.ModuleDict({"model": llama, "value_head": nn.Linear(32, 1)})


def test_a_module_around_the_model_that_the_folder_lacks_is_missing(llama, tmp_path):
    both, alone = around(llama), around(copy.deepcopy(llama))
    inject_lora(both, LoraConfig(r=2))
    folder = save_adapter(both, tmp_path / "adapter")
    inject_lora(alone, LoraConfig(r=2, modules_to_save=["value_head"]))
    with pytest.raises(AdapterError, match=r"missing: value_head\.bias, value_head\.weight"):
        load_adapter(alone, folder)


def test_an_adapter_in_the_place_of_another_leaves_nothing_of_it(llama, tmp_path):
    both, fresh = around(llama), around(copy.deepcopy(llama))
    inject_lora(both, LoraConfig(r=2, modules_to_save=["value_head"]))
    save_adapter(both, tmp_path / "adapter")
    inject_lora(fresh, LoraConfig(r=2))
    save_adapter(fresh, tmp_path / "adapter", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(FILES)


def test_a_checkpoint_that_lacks_values_makes_no_folder(llama, tmp_path):
    inject_lora(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    state = dict(lora_state_dict(llama))
    del state["model.layers.1.self_attn.q_proj.lora_B"]
    entry = {CHECKPOINT_KEY: {"format": FORMAT, "adapters": {"default": checkpoint_entry(llama, None)}}}
    torch.save({"state_dict": state} | entry, tmp_path / "cut.ckpt")
    with pytest.raises(AdapterError, match=r"'default' and lacks values of it: model\.layers\.1\.self_attn\.q_proj"):
        adapter_from_checkpoint(tmp_path / "cut.ckpt")
    assert not (tmp_path / "cut-adapter").exists()
