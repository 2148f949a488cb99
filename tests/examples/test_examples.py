"""The examples run as they stand, in small."""

import copy
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in an empty folder: run("vit.py", "--epochs", "1")."""

    def run(script: str, *arguments: str) -> dict:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        return runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return run


def _module(script: str):
    spec = importlib.util.spec_from_file_location(f"example_{Path(script).stem}", EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dpo_learns_what_is_preferred(run, tmp_path, capsys):
    rows = [{"prompt": f"Say a word, {n}.", "chosen": "good", "rejected": "bad"} for n in range(24)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("dpo.py", "--model", "demo:tiny-llama", "--data", "preferences.jsonl", "--steps", "12")
    assert (tmp_path / "outputs/dpo/adapter/adapter_model.safetensors").is_file()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "val_accuracy" in line)
    assert "1.0" in line


def test_the_reference_of_dpo_is_the_base(llama, shake):
    from lora_lightning import LoraConfig, inject_lora

    dpo = _module("dpo.py").DPO.__new__(_module("dpo.py").DPO)
    torch.nn.Module.__init__(dpo)
    dpo.model, dpo.beta = llama, 0.1
    base = copy.deepcopy(llama)
    inject_lora(dpo.model, LoraConfig(r=4, lora_alpha=8))
    ids = torch.randint(1, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100)}
    torch.testing.assert_close(dpo.margins(batch), torch.zeros(2))  # B is 0: the policy is the reference
    shake(dpo.model)

    def of_answers(model: torch.nn.Module) -> torch.Tensor:
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return log_p.gather(2, ids[:, 1:, None])[:, 2:, 0].sum(1)

    ratios = of_answers(dpo.model) - of_answers(base)
    torch.testing.assert_close(dpo.margins(batch), 0.1 * (ratios[:2] - ratios[2:]), rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_learns_new_classes(run, tmp_path, capsys):
    run("vit.py", "--epochs", "3")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("digits 5 to 9:"))
    assert float(said.split()[4].rstrip("%")) > 50  # of five: 20 % is chance
    names = load_file(tmp_path / "outputs/vit/adapter/adapter_model.safetensors")
    assert any("classifier" in name for name in names)


def test_whisper_gets_an_adapter_on_both_sides(run, tmp_path, capsys):
    run("whisper.py", "--steps", "2", "--rows", "64")
    assert "notes of the organ heard wrong" in capsys.readouterr().out
    names = load_file(tmp_path / "outputs/whisper/adapter/adapter_model.safetensors")
    assert {name.split(".")[3] for name in names} == {"encoder", "decoder"}


def test_lightning_cli(run, tmp_path):
    config = str(EXAMPLES / "lightning_cli/config.yaml")
    run("lightning_cli/main.py", "fit", "--config", config, "--trainer.max_steps=2", "--data.rows=32")
    (adapter,) = tmp_path.glob("outputs/lightning_cli/**/adapter/adapter_config.json")
    assert json.loads(adapter.read_text())["r"] == 8


def test_the_layout_of_lightning_hydra_template(run, tmp_path):
    run("hydra_template/src/train.py", "trainer.max_epochs=1", "lora=high_capacity", "lora.r=8")
    (adapter,) = tmp_path.glob("logs/train/runs/*/lightning_logs/*/adapter/adapter_config.json")
    values = json.loads(adapter.read_text())
    assert (values["r"], values["lora_alpha"], values["use_rslora"]) == (8, 16, True)
