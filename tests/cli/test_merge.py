"""`lora-lightning merge`: a folder that transformers loads, with the adapted model's logits, or a message."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_lightning import LoraConfig, inject_lora, load_adapter, save_adapter
from lora_lightning.adapters.folder import chain_of
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli import main as console
from lora_lightning.cli import merge
from lora_lightning.injection.state import record_of, the_root
from lora_lightning.tasks import ModelConfig, load_model
from lora_lightning.tasks.tiny_llama import write_tiny_llama

TOKENS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama (its head is tied), a tokenizer and a generation config of its own."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_llama(folder)
    told = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 17}
    (folder / "generation_config.json").write_text(json.dumps(told))
    return folder


def adapted(base, fields, loader=AutoModelForCausalLM, **more):
    model = loader.from_pretrained(base, **more).eval()
    inject_lora(model, LoraConfig(r=4, init_lora_weights=False, **fields))
    return model


@pytest.fixture
def adapter(base, tmp_path):
    """An adapted model, and the folder of its adapter."""
    model = adapted(base, {})
    return model, save_adapter(model, tmp_path / "adapter")


def run(*arguments):
    merge.main([str(argument) for argument in arguments])


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_the_folder_gives_the_adapted_logits(base, tmp_path, capsys, fields):
    model = adapted(base, fields)
    folder = save_adapter(model, tmp_path / "adapter")
    run(folder, tmp_path / "whole")
    said = capsys.readouterr()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert whole.generation_config.max_new_tokens == 17
    text = "the minister has won"
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (tmp_path / "whole", base)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert "outputs differ by at most" in said.out
    assert said.out.splitlines()[-1] == str(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.tmp"))
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_another_type_more_files_and_the_adapters_tokenizer(adapter, base, tmp_path, capsys):
    model, folder = adapter
    for path in base.glob("tokenizer*"):
        shutil.copy2(path, folder)
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    run(folder, tmp_path / "whole", "--dtype", "bfloat16", "--max-shard-size", "60KB", "--exact")
    assert "model.safetensors.index.json" in {path.name for path in (tmp_path / "whole").iterdir()}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype is torch.bfloat16
    torch.testing.assert_close(logits(whole.float()), logits(model), rtol=0.1, atol=0.2)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").model_max_length == 99
    assert "outputs differ by at most" in capsys.readouterr().out


def test_a_half_precision_base_gets_a_wider_type_without_loss(base, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = adapted(tmp_path / "half", {}, dtype=torch.float32)
    folder = save_adapter(model, tmp_path / "adapter")
    run(folder, tmp_path / "whole", "--dtype", "float32")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype is torch.float32
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapted_tied_head_is_untied_when_asked(base, tmp_path, capsys):
    model = adapted(base, {"target_modules": ["lm_head", "q_proj"]})
    folder = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "whole")
    assert "--untie" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()
    with pytest.warns(UserWarning, match="untied before merging"):
        run(folder, tmp_path / "whole", "--untie")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)


def test_a_classifier_keeps_its_trained_head(base, tmp_path):
    model = adapted(base, {"task_type": "SEQ_CLS"}, AutoModelForSequenceClassification, num_labels=5)
    model.score.weight.data.normal_()
    folder = save_adapter(model, tmp_path / "adapter")
    run(folder, tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert whole.config.num_labels == 5
    torch.testing.assert_close(logits(whole, TOKENS[:1]), logits(model, TOKENS[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "beside"),
    [
        ({"trainable_token_indices": [-2, -1]}, True),
        ({"trainable_token_indices": [-2, -1]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    ],
)
def test_the_base_gets_rows_for_tokens_that_were_added(base, tmp_path, fields, beside):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    rows = model.config.vocab_size
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows + 2 - len(tokenizer))])
    model.resize_token_embeddings(rows + 2)
    if "trainable_token_indices" in fields:
        fields = {"trainable_token_indices": [rows, rows + 1]}
    inject_lora(model, LoraConfig(r=4, init_lora_weights=False, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = save_adapter(model, tmp_path / "adapter")
    if beside:
        tokenizer.save_pretrained(folder)
    run(folder, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.config.vocab_size == rows + 2
    tokens = torch.tensor([[5, rows, 7, rows + 1]]) if "target_modules" not in fields else TOKENS
    known = rows if "target_modules" in fields else None  # what resizing draws at random is in no adapter
    torch.testing.assert_close(
        logits(whole, tokens)[..., :known], logits(model, tokens)[..., :known], rtol=1e-4, atol=1e-4
    )


def test_adapters_below_it_are_folded_in_first(base, tmp_path):
    first = adapted(base, {"target_modules": ["q_proj"]})
    below = save_adapter(first, tmp_path / "first")
    second = AutoModelForCausalLM.from_pretrained(base)
    fold_in(second, below)
    inject_lora(second, LoraConfig(r=2, init_lora_weights=False))
    record_of(the_root(second)[1]).bases = chain_of(below)
    folder = save_adapter(second, tmp_path / "second")
    run(folder, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(second), rtol=1e-4, atol=1e-4)


def test_a_chain_of_local_folders_is_found_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(base)
    save_adapter(adapted(base, {"target_modules": ["q_proj"]}), "runs/first")  # by its form a name on the Hub, too
    fold_in(second, "runs/first")
    inject_lora(second, LoraConfig(r=2, init_lora_weights=False))
    chain = record_of(the_root(second)[1]).bases = chain_of("runs/first")
    assert chain == (str(tmp_path / "runs" / "first"),)
    folder = save_adapter(second, tmp_path / "second")
    assert chain_of(folder) == (*chain, str(folder))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(folder, "whole")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained("whole")), logits(second), rtol=1e-4, atol=1e-4
    )


def test_the_adapter_of_a_run_needs_no_other_word(smoke, tmp_path, capsys):
    run(smoke[0] / "adapter", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model = load_model(ModelConfig("demo:tiny-llama"), "causal_lm").eval()
    load_adapter(model, smoke[0] / "adapter")
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (tmp_path / "whole", smoke[0] / "adapter")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


# ---- what does not go


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_nothing_is_written_over(adapter, tmp_path, capsys):
    _, folder = adapter
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "precious.txt").write_text("mine")
    assert "is there already" in refused(capsys, folder, tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["precious.txt"]


def test_an_adapter_that_is_none_or_damaged_is_told(adapter, base, tmp_path, capsys):
    _, folder = adapter
    assert f"there is no adapter in {base}: no adapter_config.json" in refused(capsys, base, tmp_path / "whole")
    assert "there is no folder" in refused(capsys, tmp_path / "nothing", tmp_path / "whole")
    edit(folder, lambda tensors: next(iter(tensors.values()))[0].fill_(float("inf")))
    assert "not finite" in refused(capsys, folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_sum_that_is_not_finite_is_told(adapter, tmp_path, capsys):
    _, folder = adapter
    edit(folder, lambda tensors: [value.fill_(3e30) for value in tensors.values()])
    assert "would not be finite" in refused(capsys, folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_another_base_is_refused_unless_it_is_wanted(adapter, base, tmp_path, capsys):
    _, folder = adapter
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.norm.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    said = refused(capsys, folder, tmp_path / "whole", "--base", tmp_path / "other")
    assert "is not the model that" in said
    assert "--any-base" in said
    assert not (tmp_path / "whole").exists()
    run(folder, tmp_path / "whole", "--base", tmp_path / "other", "--any-base")
    load_adapter(other, folder, trainable=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(other), rtol=1e-4, atol=1e-4)


def test_the_same_base_in_half_precision_is_the_same_base(base, tmp_path):
    model = adapted(base, {}, dtype=torch.bfloat16)  # trained so, though the weights are stored as float32
    folder = save_adapter(model, tmp_path / "adapter")
    run(folder, tmp_path / "whole")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype is torch.float32


def test_a_base_that_is_not_named_or_not_there_is_told(adapter, tmp_path, capsys):
    _, folder = adapter
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert "name the base model with --base" in refused(capsys, folder, tmp_path / "whole")
    assert "There is no model" in refused(capsys, folder, tmp_path / "whole", "--base", tmp_path / "gone")


def test_it_is_a_console_command(adapter, tmp_path, monkeypatch, capsys):
    _, folder = adapter
    monkeypatch.setattr("sys.argv", ["lora-lightning", "merge", str(folder), str(tmp_path / "whole")])
    console.main()
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as left:
        merge.main(["--help"], "lora-lightning merge")
    assert left.value.code == 0
    assert "--untie" in capsys.readouterr().out


def test_a_run_stands_for_its_adapter(adapter, tmp_path):
    run(tmp_path, tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(merged), logits(adapter[0]))
