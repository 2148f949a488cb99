"""`lora-lightning resize`: the best adapter of a lower rank, what it kept and what it costs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from lora_lightning import LoraConfig, inject_lora, save_adapter
from lora_lightning.adapters.folder import chain_of
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli.resize import main
from lora_lightning.cli.run_metrics import run_metrics
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.state import record_of
from lora_lightning.tasks import ModelConfig, load_model


@pytest.fixture(autouse=True)
def _seeds(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # measuring sets these; given here, they are taken back
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "160")


def row(name: str, screen: str) -> list[float]:
    """The numbers of a table's row."""
    line = next(line for line in screen.splitlines() if re.match(rf"\W*{name}\b", line))
    return [float(each) for each in re.findall(r"[-+]?\d+(?:\.\d+)?", line)]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    assert left.value.code != 0
    return capsys.readouterr().err


def test_a_run_is_resized_and_the_loss_told(smoke, tmp_path, capsys):
    run, _ = smoke
    main([str(run), str(tmp_path / "small"), "r=8"])
    screen = capsys.readouterr().out
    trained = json.loads((run / "result.json").read_text())
    base, before, after, change = row("val_loss", screen)
    assert base == pytest.approx(trained["val_loss_before"], abs=1e-3)
    assert before == pytest.approx(trained["val_loss"], abs=1e-3)
    assert change == pytest.approx(after - before, abs=2e-4)
    assert change > 0
    number, was, now, kept, least = row("q_proj", screen)
    assert (number, was, now) == (2, 64, 8)
    assert 50 < least <= kept < 100
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] / 8**0.5 == pytest.approx(128 / 64**0.5)
    assert (tmp_path / "small/chat_template.jinja").is_file()
    assert screen.splitlines()[-1] == str(tmp_path / "small")
    again = run_metrics(run, {"small": tmp_path / "small"})
    assert again["small"]["val_loss"] == pytest.approx(after, abs=1e-4)


def test_of_each_layer_and_without_a_loss(smoke, tmp_path, capsys):
    run, _ = smoke
    main([str(run / "adapter"), str(tmp_path / "small"), "--energy", "0.9", "--layers", "--no-loss"])
    screen = capsys.readouterr().out
    assert "q_proj" in screen
    assert "layers.1" in screen
    assert "val_loss" not in screen
    assert "The loss was not measured" in screen
    assert json.loads((tmp_path / "small/adapter_config.json").read_text())["rank_pattern"]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_over_another_one_is_measured_over_that(smoke, tmp_path):
    run, _ = smoke
    model = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    fold_in(model, run / "adapter")
    inject_lora(model, LoraConfig(r=2))  # does nothing yet
    record_of(model).bases = chain_of(run / "adapter")
    save_adapter(model, tmp_path / "second")
    metrics = run_metrics(run, {"second": tmp_path / "second"})["second"]
    assert metrics["val_loss"] == pytest.approx(json.loads((run / "result.json").read_text())["val_loss"], rel=1e-3)


def test_mistakes_are_told(smoke, tmp_path, capsys):
    run, _ = smoke
    assert "was trained at r=64" in refused(capsys, run, tmp_path / "x", "r=65")
    assert "the rank is a whole number, got 'eight'" in refused(capsys, run, tmp_path / "x", "r=eight")
    assert "name the new rank" in refused(capsys, run, tmp_path / "x")
    assert "there are some; name one of them" in refused(capsys, run.parent, tmp_path / "x", "r=8")
    assert "is there already" in refused(capsys, run, tmp_path, "r=8")
    assert "on this machine" in refused(capsys, "owner/name", "r=8")
    (tmp_path / "config.yaml").write_text("model: {model: demo:tiny-llama}\n")  # another program's
    assert "not the folder of a run" in refused(capsys, run, tmp_path / "x", "r=8", "--run", tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(LoraConfigError, match=r"not the folder of a run"):
        run_metrics(tmp_path, {})


def test_it_lies_beside_the_adapter_however_that_was_named(smoke, tmp_path, capsys, monkeypatch):
    run, _ = smoke
    shutil.copytree(run / "adapter", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    before = sorted(tmp_path.glob("mine/*"))
    main([".", "r=2"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "mine-r2")
    assert sorted(tmp_path.glob("mine/*")) == before
    assert (tmp_path / "mine-r2/adapter_model.safetensors").is_file()


def test_what_is_written_is_told_where_it_cannot_be_measured(smoke, tmp_path, capsys):
    run, _ = smoke
    told = refused(capsys, run, tmp_path / "small", "r=8", "base=not/there/at/all")
    assert f"{tmp_path / 'small'} is written, and its loss could not be measured" in told
    assert (tmp_path / "small/adapter_model.safetensors").is_file()


def test_help_comes_without_torch():
    code = "import sys; from lora_lightning.cli import resize\ntry: resize.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
