"""An adapter for each row of a batch: every row is what its own adapter would make of it, alone."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import AdapterError, Adapters, LoraConfig, inject_lora, lora_disabled, save_adapter
from lora_lightning.layers.per_row import BASE, PerRow

CONFIGS = {
    "math": {"r": 4, "lora_alpha": 8},
    "chat": {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["v_proj", "down_proj", "embed_tokens"]},
    "head": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}
MIXED = ["math", BASE, "chat", "dora", "math", "head", BASE]


@pytest.fixture
def rows():
    """Token numbers ``(7, 6)``."""
    return torch.randint(0, 64, (len(MIXED), 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def adapters(llama, shake):
    found = Adapters(llama)
    for number, (name, fields) in enumerate(CONFIGS.items()):
        found.add(name, LoraConfig(**fields), seed=number)
        shake(llama, 0.2)
    found.disable()
    return found


def alone(adapters, name, x):
    adapters.set(*([] if name == BASE else [name]))
    logits = adapters.model(x).logits.detach()
    adapters.disable()
    return logits


def test_each_row_is_as_with_its_own_adapter(llama, adapters, rows):
    expected = {name: alone(adapters, name, rows) for name in [*CONFIGS, BASE]}
    adapters.set("chat", "math")
    classes = [type(module) for module in llama.modules()]
    with adapters.rows(MIXED) as whose:
        assert adapters.active == ()
        logits = llama(rows).logits
        for row, name in enumerate(MIXED):
            torch.testing.assert_close(logits[row], expected[name][row], atol=2e-6, rtol=1e-5)
            if name == BASE:
                assert torch.equal(logits[row], expected[name][row])
        whose.assign(MIXED[::-1])
        logits = llama(rows).logits
        for row, name in enumerate(MIXED[::-1]):
            torch.testing.assert_close(logits[row], expected[name][row], atol=2e-6, rtol=1e-5)
        assert not any("lora" in name for name in llama.state_dict())
    assert adapters.active == ("chat", "math")
    assert [type(module) for module in llama.modules()] == classes
    adapters.disable()
    assert torch.equal(llama(rows).logits, expected[BASE])
    assert not any(isinstance(module, PerRow) for module in llama.modules())


def test_rows_are_pefts(llama, adapters, rows, tmp_path):
    names = ["math", "__base__", "chat", "chat", "math", "__base__", "chat"]
    adapters.save(tmp_path, ["math", "chat"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "math", adapter_name="math")
        theirs.load_adapter(tmp_path / "chat", "chat")
    theirs.eval()
    with torch.no_grad(), adapters.rows(names):
        torch.testing.assert_close(llama(rows).logits, theirs(rows, adapter_names=names).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(llama, adapters, rows, beams):
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for row, name in enumerate(MIXED):
        adapters.set(*([] if name == BASE else [name]))
        expected.append(llama.generate(rows[row : row + 1], **asked)[0])
    with adapters.rows(MIXED, beams=beams):
        found = llama.generate(rows, **asked)
    assert torch.equal(found, torch.stack(expected))


def test_an_encoder_has_each_row_once(shake, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    adapters = Adapters(model)
    for number, name in enumerate(("one", "two")):
        adapters.add(name, LoraConfig(r=2, target_modules=["q", "v", "wi"]), seed=number)
        shake(model, 0.5)
    x = torch.randint(0, 64, (3, 5))
    names = ["two", BASE, "one"]
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    expected = []
    for row, name in enumerate(names):
        adapters.set(*([] if name == BASE else [name]))
        expected.append(model.generate(x[row : row + 1], **asked)[0])
    with adapters.rows(names, beams=2):
        assert torch.equal(model.generate(x, **asked), torch.stack(expected))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three", BASE]), min_size=1, max_size=6))
def test_other_layers_too_in_float64(names):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Conv1d(4, 3, 2), nn.LayerNorm(5), nn.Linear(5, 2)).double().eval()
    x = torch.randn(len(names), 4, 5, dtype=torch.float64)
    adapters = Adapters(model)
    fields = {
        "one": {"r": 2, "target_modules": ["0", "1"]},
        "two": {"r": 3, "target_modules": ["1", "3"], "bias": "all"},
        "three": {"r": 1, "target_modules": ["3"], "modules_to_save": ["2"], "lora_bias": True},
    }
    expected = {BASE: model(x)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, chosen in fields.items():
            adapters.add(name, LoraConfig(init_lora_weights=False, **chosen))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
            expected[name] = model(x)
        with adapters.rows(names):
            found = model(x)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-10, atol=1e-10)


def test_scaled_embeddings_and_half_precision(shake):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config).eval().bfloat16()
    adapters = Adapters(model)
    for number, name in enumerate(("one", "two")):
        adapters.add(name, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), seed=number)
        shake(model, 0.3)
    x = torch.randint(0, 64, (2, 5))
    expected = [alone(adapters, name, x)[row] for row, name in enumerate(("one", "two"))]
    with adapters.rows(["one", "two"]):
        logits = model(x).logits
    assert logits.dtype == torch.bfloat16
    for row in range(2):
        torch.testing.assert_close(logits[row], expected[row], atol=0.05, rtol=0.05)


def test_torchs_own_encoder_calls_its_layers(shake):
    torch.manual_seed(6)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    adapters = Adapters(model)
    adapters.add("one", LoraConfig(r=2, target_modules=["linear1"]))
    shake(model, 0.5)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = [model(x)[0]]
        adapters.disable()
        expected.append(model(x)[1])
        with adapters.rows(["one", BASE]):
            found = model(x)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x)[1], expected[1])
    adapters.add("attention", LoraConfig(r=2, target_modules=["self_attn"]))
    with pytest.raises(AdapterError, match=r"nn\.MultiheadAttention reads weights"), adapters.rows(["attention", BASE]):
        pass
    assert adapters.active == ("attention",)


def test_what_cannot_be_done_by_rows_is_told(llama, adapters, rows):
    with pytest.raises(AdapterError, match=r"no adapter 'mth' \(did you mean math\?\)"), adapters.rows(["mth"]):
        pass
    with adapters.rows(["math", BASE]) as whose:
        with pytest.raises(AdapterError, match=r"shape \(7, 6.*\) where adapters are named for 2 rows"):
            llama(rows)
        with pytest.raises(AdapterError, match=r"no adapter 'chat' for a row.*there are math, and '__base__'"):
            whose.assign(["chat", BASE])
        llama.train()
        with pytest.raises(AdapterError, match="for inference"):
            llama(rows[:2])
        llama.eval()
        with pytest.raises(AdapterError, match="no adapter"), lora_disabled(llama):
            pass
    assert adapters.active == ()
    with pytest.raises(AdapterError, match="a name for each row"), adapters.rows([]):
        pass
    with pytest.raises(AdapterError, match="list with a name"), adapters.rows("math"):
        pass


def test_a_layer_without_rows_is_told(gpt2, rows):
    adapters = Adapters(gpt2)
    adapters.add("places", LoraConfig(r=2, target_modules=["wpe", "c_attn"]))
    told = r"transformer\.wpe is called on .* \(1, 6\) .* 2 rows: .* has no rows"
    with pytest.raises(AdapterError, match=told), adapters.rows(["places", BASE]):
        gpt2(rows[:2])
    with adapters.rows(["places"]):
        gpt2(rows[:1])


def test_an_error_inside_leaves_the_model_as_it_was(llama, adapters, rows):
    adapters.train("math")
    before = llama(rows).logits
    with pytest.raises(KeyError), adapters.rows(MIXED):
        raise KeyError
    assert adapters.active == ("math",)
    assert torch.equal(llama(rows).logits, before)
    assert any(p.requires_grad for p in llama.parameters())


def test_adapters_of_files(llama, rows, shake, tmp_path):
    model = copy.deepcopy(llama)
    inject_lora(model, LoraConfig(r=2))
    shake(model)
    adapters = Adapters(llama)
    adapters.load("one", save_adapter(model, tmp_path / "one"))
    with adapters.rows(["one"] * 7):
        torch.testing.assert_close(llama(rows).logits, model(rows).logits, atol=1e-6, rtol=1e-5)
