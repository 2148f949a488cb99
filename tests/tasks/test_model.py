import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import ModelConfig, dtype, load_model, load_tokenizer, prepare_demo
from lora_lightning.tasks import model as loading

GATED = "meta-llama/Llama-3.1-8B"


def hub_error(kind, status):
    # The client library that answers is built on differs between versions; what is read of an answer does not.
    response = SimpleNamespace(status_code=status, headers={}, request=None, url="")
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    error.response = response
    return error


def raising(error, inside_oserror):
    def from_pretrained(*_, **__):
        if not inside_oserror:
            raise error
        raise OSError("You are trying to access a gated repo.") from error

    return from_pretrained


@pytest.mark.parametrize("inside_oserror", [True, False])
@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        (GatedRepoError, 401, [f"https://huggingface.co/{GATED}", "licence", "HF_TOKEN"]),
        (GatedRepoError, 403, [f"https://huggingface.co/{GATED}", "licence", "HF_TOKEN"]),
        (HfHubHTTPError, 403, [f"https://huggingface.co/{GATED}", "licence", "HF_TOKEN"]),
        (RepositoryNotFoundError, 401, ["no model", "private", "HF_TOKEN"]),
        (RevisionNotFoundError, 404, ["no revision 'v9'"]),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, kind, status, expected, inside_oserror):
    monkeypatch.setattr(AutoConfig, "from_pretrained", raising(hub_error(kind, status), inside_oserror))
    with pytest.raises(LoraConfigError) as caught:
        load_model(ModelConfig(GATED, revision="v9"), "causal_lm")
    for part in (GATED, *expected):
        assert part in str(caught.value)


def test_offline(monkeypatch):
    error = LocalEntryNotFoundError("cannot find the requested files in the local cache")
    monkeypatch.setattr(AutoConfig, "from_pretrained", raising(error, inside_oserror=True))
    with pytest.raises(LoraConfigError, match=r"acme/thing.*cannot be reached") as caught:
        load_model(ModelConfig("acme/thing"), "causal_lm")
    assert isinstance(caught.value.__cause__, OSError)


def test_own_code_needs_consent(monkeypatch):
    error = ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
    monkeypatch.setattr(AutoConfig, "from_pretrained", raising(error, inside_oserror=False))
    with pytest.raises(LoraConfigError, match="trust_remote_code=true"):
        load_model(ModelConfig("acme/thing"), "causal_lm")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "runs/today/model"])
def test_missing_folder_names_what_was_looked_for(name):
    with pytest.raises(LoraConfigError, match=r"there is no folder /.*(nowhere|model)"):
        load_tokenizer(ModelConfig(name))


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(LoraConfigError, match=r"no config\.json"):
        load_model(ModelConfig(str(tmp_path)), "causal_lm")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraConfigError, match="holds an adapter"):
        load_model(ModelConfig(str(tmp_path)), "causal_lm")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_kind"}))
    with pytest.raises(LoraConfigError, match="no_such_kind"):
        load_model(ModelConfig(str(tmp_path)), "causal_lm")


def test_switches():
    model = load_model(
        ModelConfig("demo:tiny-llama", gradient_checkpointing=True, attn_implementation="eager", dtype="float32"),
        "causal_lm",
    )
    assert model.is_gradient_checkpointing
    assert model.config._attn_implementation == "eager"
    assert model.dtype is torch.float32
    assert model.training
    assert model.name_or_path == "demo:tiny-llama"


def test_gradient_checkpointing_recomputes_and_changes_nothing(rows):
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    gradients, calls = [], []
    for switch in (False, True):
        model = load_model(ModelConfig("demo:tiny-llama", gradient_checkpointing=switch), "causal_lm")
        counted = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        model.model.embed_tokens.requires_grad_(False)
        model(**batch, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
        calls.append(len(counted))
    torch.testing.assert_close(*gradients)
    assert calls == [1, 2]


def test_compile_keeps_every_name(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: compiled.append((self, settings)))
    model = load_model(ModelConfig("demo:tiny-llama", compile=True), "causal_lm")
    assert compiled == [(layer, {"dynamic": True, "backend": "inductor"}) for layer in model.model.layers]
    plain = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    assert list(model.state_dict()) == list(plain.state_dict())


def test_saved_half_precision_becomes_float32_where_emulated(tmp_path, monkeypatch):
    load_model(ModelConfig("demo:tiny-llama"), "causal_lm").to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(dtype, "_CPU_BF16_PROBES", ())
    monkeypatch.setattr(loading, "likely_device", lambda: torch.device("cpu"))
    told = []
    monkeypatch.setattr(loading, "rank_zero_info", told.append)
    assert load_model(ModelConfig(str(tmp_path)), "causal_lm").dtype is torch.float32
    assert "bfloat16" in told[0]
    with pytest.warns(UserWarning, match="slower"):
        assert load_model(ModelConfig(str(tmp_path), dtype="bfloat16"), "causal_lm").dtype is torch.bfloat16


def test_chat_template(tmp_path):
    turn = [{"role": "user", "content": "hi"}]
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    for template in (str(tmp_path / "mine.jinja"), (tmp_path / "mine.jinja").read_text()):
        tokenizer = load_tokenizer(ModelConfig("demo:tiny-llama", chat_template=template))
        assert tokenizer.apply_chat_template(turn, tokenize=False) == "<hi>"
    with pytest.raises(LoraConfigError, match=r"chat_template.*nowhere\.jinja"):
        load_tokenizer(ModelConfig("demo:tiny-llama", chat_template="nowhere.jinja"))


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    tokenizer = load_tokenizer(ModelConfig("demo:tiny-llama"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((prepare_demo("demo:tiny-llama") / "config.json").read_bytes())
    assert load_tokenizer(ModelConfig(str(tmp_path))).pad_token == tokenizer.eos_token


def test_a_config_that_contradicts_itself_is_told(tmp_path):
    fields = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(LoraConfigError, match=f"'{tmp_path}' cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)), "causal_lm")
