"""`lora-lightning export`: PEFT's folder, vLLM's, a GGUF file, and what goes to the Hub, each with its card."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning import LoraConfig, inject_lora, save_adapter
from lora_lightning.cli import merge
from lora_lightning.cli.export import main
from lora_lightning.tasks import ModelConfig, load_model
from lora_lightning.tasks.demo import prepare_demo
from lora_lightning.tasks.tiny_llama import write_tiny_llama

TOKENS = torch.arange(12)[None]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_lightning.json", "loss.png"}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    assert left.value.code != 0
    return capsys.readouterr().err


def names(folder):
    return {each.name for each in folder.iterdir()}


def logits(folder):
    base = AutoModelForCausalLM.from_pretrained(prepare_demo("demo:tiny-llama"))
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(TOKENS).logits


def test_a_run_as_a_folder_for_peft(smoke, tmp_path, capsys):
    run, _ = smoke
    main([str(run), str(tmp_path / "out"), "--base", "someone/tiny"])
    screen = capsys.readouterr()
    assert screen.out.splitlines()[-1] == str(tmp_path / "out")
    assert "others cannot have" not in screen.err
    assert names(tmp_path / "out") >= FILES | {"tokenizer.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert torch.equal(logits(tmp_path / "out"), logits(run / "adapter"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.eval_results[0].metric_value == pytest.approx(
        json.loads((run / "result.json").read_text())["val_loss"], abs=1e-5
    )
    assert "![Training and validation loss](loss.png)" in card.text
    assert "What colour is" in card.text
    assert str(run) not in card.content


def test_for_vllm_one_scale_is_right_for_all(smoke, tmp_path, capsys):
    run, _ = smoke  # with rsLoRA
    main([str(run), str(tmp_path / "out"), "--vllm"])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (64, 64, False)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(run / "adapter"), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert "--max-lora-rank 64 --lora-modules out=out" in card
    assert "The adapter names demo:tiny-llama as its base" in capsys.readouterr().err


def test_for_llama_cpp_a_file_beside_its_card(smoke, tmp_path, capsys):
    run, _ = smoke
    base = prepare_demo("demo:tiny-llama")
    main([str(run), str(tmp_path / "out"), "--gguf", "--base", str(base)])
    assert names(tmp_path / "out") >= {"README.md", "adapter.gguf", "loss.png"}
    assert "a GGUF adapter for llama: 14 weights" in capsys.readouterr().out
    file = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    assert file.fields["general.name"].contents() == "out"
    assert file.fields["general.base_model.0.name"].contents() == base.name
    saved = load_file(run / "adapter/adapter_model.safetensors")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert torch.equal(found["blk.1.ffn_down.weight.lora_a"], saved[key.format("A")])
    # rsLoRA: 128 / √64 = 16, of which alpha / r = 128 / 64 is told and 8 stands in B
    torch.testing.assert_close(found["blk.1.ffn_down.weight.lora_b"], 8 * saved[key.format("B")])
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "gguf"
    assert "llama-cli -m base.gguf --lora adapter.gguf" in card.text
    assert f"adapter over {base.name}: " in card.text


def test_what_is_written_is_sent_with_its_card(smoke, tmp_path, capsys, monkeypatch):
    run, _ = smoke
    sent, broken = {}, [OSError("the line is dead")]

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **how):
            sent["repo"] = name, how

        def list_repo_files(self, name, revision=None):
            return []

        def create_commit(self, name, operations, **how):
            if broken:
                raise broken.pop()
            for operation in operations:
                with operation.as_file() as file:
                    sent[operation.path_in_repo] = file.read()
            return SimpleNamespace(commit_url="https://huggingface.co/commit/1", pr_url=None)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    told = refused(capsys, run, tmp_path / "out", "--hub", "someone/colours", "--private")
    assert "the line is dead. The folder is whole, and this sends it:" in told
    again = shlex.split(next(line for line in told.splitlines() if line.startswith("python -c ")))[2]
    exec(again, {})
    assert sent.keys() - {"repo"} == names(tmp_path / "out")
    assert sent["repo"] == ("someone/colours", {"private": True, "exist_ok": True})
    main([str(run), str(tmp_path / "second"), "--hub", "someone/colours", "--private"])
    assert "https://huggingface.co/commit/1" in capsys.readouterr().out
    assert sent["repo"] == ("someone/colours", {"private": True, "exist_ok": True})
    assert sent.keys() - {"repo"} == names(tmp_path / "out")
    assert b'PeftModel.from_pretrained(model, "someone/colours")' in sent["README.md"]
    assert sent["loss.png"] == (run / "loss.png").read_bytes()


def test_the_best_of_a_sweep_has_the_card_of_its_job(smoke, tmp_path, capsys):
    run, _ = smoke
    shutil.copytree(run, tmp_path / "3")
    shutil.copytree(run / "adapter", tmp_path / "best")
    (tmp_path / "best/best.json").write_text(json.dumps({"folder": "3", "adapter": "3/adapter"}))
    main([str(tmp_path / "best"), str(tmp_path / "out"), "--base", "gpt2"])
    assert "others cannot have" not in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.eval_results
    assert "not of this one" not in card.text


@pytest.mark.parametrize("name", ["base", "models/base"])
def test_a_base_of_this_machine_is_nobodys_on_the_hub_wherever_one_stands(name, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    write_tiny_llama(project / name)
    monkeypatch.chdir(project)
    model = load_model(ModelConfig(name), "causal_lm")
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(model, "adapter")
    monkeypatch.chdir(tmp_path)
    main(["project/adapter", "out"])
    assert "which others cannot have" in capsys.readouterr().err
    card = ModelCard.load("out/README.md")
    assert card.data.base_model is None
    assert "huggingface.co" not in card.content
    assert 'from_pretrained("path/to/base")' in card.text
    project = project.rename(tmp_path / "moved")  # with all that is in it
    monkeypatch.chdir(project)
    assert AutoPeftModelForCausalLM.from_pretrained("adapter").peft_config["default"].r == 2
    merge.main(["adapter", "merged"])
    assert (project / "merged/model.safetensors").is_file()


def test_an_adapter_alone_tells_what_it_knows(tmp_path, capsys):
    model = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    save_adapter(model, tmp_path / "mine")
    main([str(tmp_path / "mine"), str(tmp_path / "out")])
    assert names(tmp_path / "out") == FILES - {"loss.png"}
    card = (tmp_path / "out/README.md").read_text()
    assert "rank 4, alpha 16 (scale 4)" in card  # the start's own values stand beside: twice the rank
    assert "model_name" not in card
    assert "What came out" not in card
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "mine"))


def test_an_adapter_over_another_one_says_so(smoke, tmp_path, capsys):
    run, _ = smoke
    shutil.copytree(run / "adapter", tmp_path / "second")
    record = json.loads((tmp_path / "second/lora_lightning.json").read_text()) | {"bases": ["/home/me/first"]}
    (tmp_path / "second/lora_lightning.json").write_text(json.dumps(record))
    for form in ("--vllm", "--gguf"):
        assert "lora-lightning merge" in refused(capsys, tmp_path / "second", tmp_path / "out", form)
    main([str(tmp_path / "second"), str(tmp_path / "out")])
    assert "over a base with /home/me/first folded in" in capsys.readouterr().err
    assert "It goes over that base with `first` folded in" in (tmp_path / "out/README.md").read_text()


def test_mistakes_are_told_and_nothing_is_left(smoke, tmp_path, capsys):
    run, _ = smoke
    out = tmp_path / "out"
    assert "there are some; name one of them" in refused(capsys, run.parent, out)
    assert "--hub is owner/name" in refused(capsys, run, out, "--hub", "colours")
    assert "leave --gguf out" in refused(capsys, run, out, "--gguf", "--hub", "me/x")
    assert "not the folder of a run" in refused(capsys, run, out, "--run", run / "adapter")
    assert "not allowed with argument" in refused(capsys, run, out, "--gguf", "--vllm")
    shutil.copytree(run / "adapter", tmp_path / "dora")
    config = json.loads((tmp_path / "dora/adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps(config))
    assert "vLLM does not yet support DoRA" in refused(capsys, tmp_path / "dora", out, "--vllm")
    assert "use_dora: there is no place for it" in refused(capsys, tmp_path / "dora", out, "--gguf")
    assert names(tmp_path) == {"dora"}
    assert "is there already" in refused(capsys, run, tmp_path)


def test_help_comes_without_torch():
    code = "import sys; from lora_lightning.cli import export\ntry: export.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
