"""DoRA's files both ways: PEFT's and transformers' readers give our outputs, and we give PEFT's; merging, unloading."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.materialise import meta_parameters

WEIGHTS = "adapter_model.safetensors"
FIELDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "r": 3},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}, "lora_dropout": 0.1},
}


def _logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.fixture
def trained(llama, tokens, shake, tmp_path):
    """A base, the model adapted over it by given fields, and its folder."""

    def make(**fields):
        base = copy.deepcopy(llama)
        inject_lora(llama, LoraConfig(use_dora=True, **fields))
        torch.testing.assert_close(_logits(llama, tokens), _logits(base, tokens), rtol=1e-5, atol=1e-6)
        shake(llama)
        assert not torch.allclose(_logits(llama, tokens), _logits(base, tokens), atol=1e-3)
        return base, llama, save_adapter(llama, tmp_path / "adapter")

    return make


@pytest.mark.parametrize("which", FIELDS)
def test_every_reader_gives_the_same_logits(trained, tokens, which):
    from peft import PeftModel

    base, model, folder = trained(**FIELDS[which])
    wanted = _logits(model, tokens)
    ours, theirs, transformers_ = (copy.deepcopy(base) for _ in range(3))
    load_adapter(ours, folder)
    assert torch.equal(_logits(ours, tokens), wanted)
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(theirs, folder), tokens), wanted, rtol=1e-4, atol=1e-5)
    transformers_.load_adapter(str(folder))
    torch.testing.assert_close(_logits(transformers_, tokens), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", FIELDS)
def test_what_peft_saved_is_read(llama, tokens, shake, tmp_path, which):
    import peft

    base = copy.deepcopy(llama)
    fields = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | FIELDS[which]
    model = peft.get_peft_model(llama, peft.LoraConfig(use_dora=True, **fields))
    shake(model)
    wanted = _logits(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / WEIGHTS).keys()
    assert any(key.endswith(".lora_magnitude_vector") for key in keys)
    load_adapter(base, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(_logits(base, tokens), wanted, rtol=1e-4, atol=1e-5)
    # and back again
    save_adapter(base, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    assert {key.removesuffix(".weight") for key in ours} == {
        key.removesuffix(".weight") for key in keys if ".base_layer." not in key
    }


def test_training_follows_pefts(llama, tokens, shake):
    import peft

    theirs = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"])
    )
    inject_lora(llama, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"]))
    ours = {name.replace("lora_magnitude", "lora_magnitude_vector"): p for name, p in lora_parameters(llama).items()}
    trainable = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == trainable.keys()
    with torch.no_grad():
        for name, p in ours.items():
            trainable[name].copy_(p)
    losses = []
    for model, parameters in ((llama, ours), (theirs, trainable)):
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, fused=True)
        losses.append([])
        for _ in range(8):
            loss = model.train()(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.02
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for name, p in ours.items():
        torch.testing.assert_close(p, trainable[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("which", ["plain", "embedding"])
@pytest.mark.parametrize("safe", [True, False])
def test_merged_is_plain_and_gives_the_same_logits(trained, tokens, which, safe):
    base, model, _ = trained(**FIELDS[which])
    if which == "embedding":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    wanted = _logits(model, tokens)
    merge_lora(model, safe=safe)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(_logits(model, tokens), wanted, rtol=1e-4, atol=1e-5)


def test_gpt2_with_conv1d_merges_and_is_read_by_peft(gpt2, tokens, shake, tmp_path):
    from peft import PeftModel

    base = copy.deepcopy(gpt2)
    inject_lora(gpt2, LoraConfig(use_dora=True, target_modules=["c_attn", "c_proj", "wte"], r=4))
    torch.testing.assert_close(_logits(gpt2, tokens), _logits(base, tokens), rtol=1e-5, atol=1e-6)
    shake(gpt2, 0.05)
    wanted = _logits(gpt2, tokens)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), save_adapter(gpt2, tmp_path / "adapter"))
    torch.testing.assert_close(_logits(theirs, tokens), wanted, rtol=1e-4, atol=1e-5)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    load_adapter(base, tmp_path / "adapter")
    merge_lora(base)
    torch.testing.assert_close(_logits(base, tokens), wanted, rtol=1e-4, atol=1e-5)


def test_unloaded_and_disabled_is_the_base_to_the_bit(trained, tokens):
    base, model, _ = trained()
    wanted = _logits(base, tokens)
    with lora_disabled(model):
        assert torch.equal(_logits(model, tokens), wanted)
    unload_lora(model)
    assert torch.equal(_logits(model, tokens), wanted)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_a_bfloat16_base_is_merged_with_one_rounding(llama, tokens, shake):
    llama.bfloat16()
    inject_lora(llama, LoraConfig(use_dora=True))
    shake(llama)
    layer = llama.model.layers[0].mlp.up_proj
    assert layer.lora_magnitude.dtype == torch.float32
    exact = layer.weight.double() + layer.lora_weight_delta().double()
    exact *= (layer.lora_magnitude.double() / exact.norm(dim=1))[:, None]
    merge_lora(llama)
    torch.testing.assert_close(layer.weight.double(), exact, rtol=2**-8, atol=1e-7)


def test_the_report_counts_magnitudes(llama):
    report = inject_lora(llama, LoraConfig(r=4, use_dora=True, target_modules=["up_proj"]))
    assert [row.parameters for row in report.rows] == [4 * (32 + 48) + 48] * 2
    assert report.trainable_parameters == 2 * (4 * (32 + 48) + 48)


def test_an_adapter_of_the_other_variant_is_refused(trained, tokens):
    base, _, folder = trained()
    inject_lora(base, LoraConfig())
    before = _logits(base, tokens)
    with pytest.raises(AdapterError, match=r"lora_magnitude|use_dora"):
        load_adapter(base, folder)
    assert torch.equal(_logits(base, tokens), before)
    with pytest.raises(LoraConfigError, match="use_dora: False here, True there"):
        inject_lora(base, LoraConfig(use_dora=True))


def test_a_file_without_magnitudes_is_refused(trained):
    base, _, folder = trained()
    kept = {key: value for key, value in load_file(folder / WEIGHTS).items() if "magnitude" not in key}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"missing: .*lora_magnitude"):
        load_adapter(base, folder)


@pytest.mark.parametrize("memory", [False, True])
def test_a_base_read_later_gives_the_magnitudes(llama, tokens, tmp_path, memory):
    from lora_lightning import load_base

    llama.save_pretrained(tmp_path / "base")
    with contextlib.nullcontext() if memory else meta_parameters():
        empty = type(llama)(llama.config).eval()
    inject_lora(empty, LoraConfig(use_dora=True), seed=3)
    load_base(empty, tmp_path / "base")
    wanted = copy.deepcopy(llama)
    inject_lora(wanted, LoraConfig(use_dora=True), seed=3)
    for name, parameter in lora_parameters(wanted).items():
        torch.testing.assert_close(lora_parameters(empty)[name], parameter)
    torch.testing.assert_close(_logits(empty, tokens), _logits(llama, tokens), rtol=1e-5, atol=1e-6)


def test_a_base_read_later_leaves_a_loaded_adapter_as_it_is(trained, tokens, tmp_path):
    from lora_lightning import load_base

    base, model, folder = trained()
    base.save_pretrained(tmp_path / "base")
    load_adapter(base, folder)
    load_base(base, tmp_path / "base")
    assert torch.equal(_logits(base, tokens), _logits(model, tokens))
