"""`experiment=smoke` as a user runs it, and what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lora_lightning
from lora_lightning.cli.optimized import optimized
from lora_lightning.cli.train import main
from lora_lightning.errors import LoraConfigError

ROOT = Path(lora_lightning.__file__).parents[1]
TRAIN = ROOT / "scripts" / "train.py"
FAST = ("experiment=smoke", "trainer.max_steps=4", "trainer.val_check_interval=2", "callbacks=minimal")


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_everything_that_a_run_leaves(smoke):
    folder, _ = smoke
    for name in ("metrics.csv", "loss.png", "samples.md", "config.yaml", "result.json", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }


def test_the_result(smoke):
    folder, _ = smoke
    result = result_of(folder)
    assert result["status"] == "finished"
    assert result["val_loss"] < result["val_loss_before"] - 1
    assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-3)
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    assert result["steps"] == 30
    assert result["seconds"] > 0
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 0
    assert Path(result["adapter_path"]) == folder / "adapter"
    assert result["overrides"][:3] == ["experiment=smoke", "lora.r=64", "lora.use_rslora=true"]


def test_the_command_line_does_what_it_says(smoke):
    folder, screen = smoke
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_rslora"]) == (64, 128, True)
    assert adapter["task_type"] == "CAUSAL_LM"
    rows = [line for line in screen.splitlines() if "_proj" in line and "│" in line]
    assert len(rows) == 7
    for row in rows:
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[4:6] == ["64", "16"], row


def test_the_configuration_is_kept_resolved(smoke):
    folder, _ = smoke
    config = OmegaConf.load(folder / "config.yaml")
    assert config.lora.lora_alpha == 128
    assert config.optimizer.lr == pytest.approx(1e-2 / 8)
    assert config.callbacks.lora.config.r == 64
    assert "${" not in (folder / "config.yaml").read_text()


def test_the_screen_shows_what_counts(smoke):
    _, screen = smoke
    for part in ("One training example", "Adapted layers", "30/30", "Before training", "After training", "Result"):
        assert part in screen, part
    assert "💡" not in screen


def test_the_adapter_went_to_wandb(smoke, wandb_records):
    folder, _ = smoke
    artifacts = {artifact.type: artifact for artifact in wandb_records(folder.parent, "artifact")}
    adapter = artifacts["lora-adapter"]
    assert {entry.path for entry in adapter.manifest.contents} == {path.name for path in (folder / "adapter").iterdir()}
    result = result_of(folder)
    told = json.loads(adapter.metadata)
    assert {key: result[key] for key in told} == told
    assert {"val_loss_before", "val_loss", "steps", "seed"} <= told.keys()
    config = {
        update.key: json.loads(update.value_json)
        for each in wandb_records(folder.parent, "config")
        for update in each.update
    }
    assert config["lora"]["use_rslora"] is True
    assert config["lora/r"] == 64
    assert config["lora/trainable_parameters"] == result["trainable_parameters"]
    (*_, ended) = wandb_records(folder.parent, "exit")
    assert ended.exit_code == 0


def test_a_finished_run_is_not_overwritten(smoke, call):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".hydra" not in path.parts}
    done = call(main, "experiment=smoke", f"hydra.run.dir={folder}")
    assert done.status == 1
    assert "would be overwritten" in done.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".hydra" not in path.parts}
    assert before == after


def test_a_run_is_resumed_in_its_folder(call, tmp_path, monkeypatch):
    from lora_lightning.reports import plots

    drawn = []
    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", lambda *what: drawn.append(what[:2]) or draw(*what))
    folder = tmp_path / "run"
    assert call(main, *FAST, f"hydra.run.dir={folder}").status == 0
    steps = [argument.replace("max_steps=4", "max_steps=6") for argument in FAST]
    assert call(main, *steps, "ckpt_path=last", f"hydra.run.dir={folder}").status == 0
    result, earlier = result_of(folder), json.loads((folder / "result-1.json").read_text())
    assert (earlier["steps"], result["steps"]) == (4, 6)
    assert result["val_loss_before"] == earlier["val_loss_before"]
    (_, first), (_, validated) = drawn
    assert validated[: len(first)] == first  # the picture is that of the whole run
    assert [step for step, _ in validated] == [0, 2, 4, 6]
    assert (folder / "loss.png").stat().st_mtime_ns > (folder / "loss-1.png").stat().st_mtime_ns
    assert (folder / "adapter").is_dir()
    assert result["adapter_path"] == str(folder / "adapter-2")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["experiment=smoke", "lora.target_modules=[q_porj]"], "q_proj"),
        (["experiment=smoke", "lora.task_type=SEQ_CLS"], "contradicts"),
        (["data=jsonl", "model=tiny_llama", "data.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_ends_with_a_message(call, tmp_path, arguments, part):
    done = call(main, *arguments, f"hydra.run.dir={tmp_path}/run")
    assert done.status == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert result_of(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_misspelt_key_is_told_without_a_traceback_unless_asked_for(command, tmp_path):
    told = command(TRAIN, "lora.rank=8", f"hydra.run.dir={tmp_path}/run")
    assert told.returncode == 1
    assert f"{TRAIN} lora.r=8" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()
    full = command(TRAIN, "lora.rank=8", f"hydra.run.dir={tmp_path}/run", HYDRA_FULL_ERROR="1")
    assert full.returncode == 1
    assert "Traceback" in full.stderr


def test_a_mistake_is_told_before_torch_is_imported(command):
    code = (
        "import sys; from lora_lightning.cli.train import main; sys.argv[1:] = ['lora.rank=8']\n"
        "try: main()\n"
        "except SystemExit: print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    assert command("-c", code).stdout.strip() == "[]"


def test_a_multirun_gives_each_job_its_folder(command, warm_python, tmp_path):
    words = ["-m", *FAST, "lora.r=2,4", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = command(TRAIN, *words, python=warm_python)
    assert done.returncode == 0, done.stderr
    configs = [tmp_path / "sweep" / job / "adapter" / "adapter_config.json" for job in ("0", "1")]
    assert [json.loads(config.read_text())["r"] for config in configs] == [2, 4]


def test_the_metric_for_sweepers_is_returned():
    assert optimized("perplexity", {"val_loss": 1.5, "perplexity": 4.5, "steps": 3}) == 4.5
    assert optimized(None, {}) is None
    with pytest.raises(LoraConfigError, match="did you mean val_loss"):
        optimized("val_los", {"val_loss": 1.5})


@pytest.mark.parametrize("entry", [pytest.param("script", marks=pytest.mark.slow), "console"])
def test_two_processes_share_a_run(command, warm_python, tmp_path, entry):
    """Both ways in: Lightning starts the second process from sys.argv. Temporary files of either go at its end."""
    folder, temporary = tmp_path / "run", tmp_path / "t"
    temporary.mkdir()
    console = "import sys; from lora_lightning.cli.main import main; sys.argv[0] = 'lora-lightning'; main()"
    program = [TRAIN] if entry == "script" else ["-c", console, "train"]
    settings = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"hydra.run.dir={folder}"]
    (tmp_path / "own.py").write_text(
        "import tempfile\nfrom lightning.pytorch import Callback\n\nclass Keeping(Callback):\n"
        "    def __init__(self, place):\n        self.place = tempfile.TemporaryDirectory(dir=place)\n"
    )
    settings += ["+callbacks.own._target_=own.Keeping", f"+callbacks.own.place={temporary}"]
    done = command(*program, *FAST, *settings, python=warm_python, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    result = result_of(folder)
    assert (result["status"], result["steps"]) == ("finished", 4)
    assert "8 rows × 2 devices = 16" in done.stdout
    assert result["val_loss"] < result["val_loss_before"]
    assert not (folder / "adapter-2").exists()


@pytest.mark.parametrize(("typed", "status"), [([], 0), (["optimized_metric=val_loss"], 1)])
def test_a_run_without_validation_is_no_failure_unless_its_metric_was_asked_for(call, tmp_path, typed, status):
    done = call(main, *FAST, "trainer.limit_val_batches=0", *typed, f"hydra.run.dir={tmp_path}/run")
    assert done.status == status, done.stderr
    assert result_of(tmp_path / "run")["status"] == "finished"


def test_it_runs_from_any_folder_and_leaves_nothing_there_but_outputs(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(main, *FAST).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (run,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert result_of(run)["status"] == "finished"


@pytest.mark.parametrize(("more", "told"), [([], True), (["trainer.max_steps=2"], False)])
def test_rows_of_ones_own_come_with_a_word_about_the_length(call, tmp_path, more, told):
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["data=jsonl", f"data.path={tmp_path}/rows.jsonl", "model=tiny_llama", "callbacks=minimal"]
    limits = ["trainer.limit_train_batches=2", "trainer.max_time=00:00:00:03", "trainer.val_check_interval=2"]
    done = call(main, *settings, *limits, *more, f"hydra.run.dir={tmp_path}/run")
    assert done.status == 0
    assert ("add experiment=own" in done.stdout) is told
