"""Real searches of ``scripts/train.py``, and what an agent of W&B starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from tests.cli.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_starts")]
TRAIN = ROOT / "scripts" / "train.py"
SHORT = ["experiment=smoke", "callbacks=minimal", "trainer.max_steps=4", "trainer.val_check_interval=2"]
_SEEN = """
import json
from pathlib import Path
from lightning.pytorch import Callback
from lora_lightning import LoraCallback


class Seen(Callback):
    def on_train_end(self, trainer, pl_module):
        lora = next(each for each in trainer.callbacks if isinstance(each, LoraCallback))
        seen = {"r": lora.report.rows[0].r, "lr": trainer.optimizers[0].defaults["lr"], "steps": trainer.global_step}
        seen |= {"world": trainer.world_size, "alpha": lora.config.lora_alpha}
        (Path(trainer.default_root_dir) / f"seen{trainer.global_rank}.json").write_text(json.dumps(seen))
"""


@pytest.fixture
def train(tmp_path):
    """train(*words): run the script to its end in an empty folder."""
    (tmp_path / "seen.py").write_text(_SEEN)

    def run(command, **environment):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_", "PYTEST"))}
        settings = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        settings["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        keywords = {"cwd": tmp_path, "env": clean | settings | environment, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, **keywords)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def seen(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seen*.json"))]


def test_optuna_under_ddp(train, tmp_path):
    optuna = pytest.importorskip("optuna")
    pruner = "{_target_: optuna.pruners.MedianPruner, n_startup_trials: 1}"
    said = train(
        [
            *(sys.executable, TRAIN, "-m", *SHORT, "hparams_search=optuna", "hydra.sweep.dir=out"),
            *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "+callbacks.seen._target_=seen.Seen"),
            *("hydra.sweeper.params=null", "lora.r=2,4", "learning_rate=1e-2,1e-5"),
            *("hydra.sweeper.sampler=grid", "hydra.sweeper.n_jobs=2", f"hydra.sweeper.pruner={pruner}", "seed=1"),
        ]
    )
    from lora_lightning.sweeps.study import open_storage

    trials = optuna.load_study(study_name=None, storage=open_storage(tmp_path / "out" / "study.journal")).trials
    assert sorted((trial.params["lora.r"], trial.params["learning_rate"]) for trial in trials) == [
        *(("2", "0.01"), ("2", "1e-05"), ("4", "0.01"), ("4", "1e-05"))
    ]
    values = set()
    for trial in trials:
        folder = tmp_path / "out" / str(trial.number)
        [first, second] = seen(folder)
        assert first == second
        assert first["world"] == 2
        assert first["r"] == int(trial.params["lora.r"])
        assert first["lr"] == float(trial.params["learning_rate"])
        result = json.loads((folder / "result.json").read_text())
        assert result["val_loss"] == pytest.approx(trial.value)
        assert list(trial.intermediate_values.values())[-1] == pytest.approx(trial.value)
        if trial.state.name == "PRUNED":
            assert (first["steps"], result["ended_by"]) == (2, "pruned at step 2")
        else:
            assert (trial.state.name, first["steps"], result["ended_by"]) == ("COMPLETE", 4, None)
        values.add(trial.value)
    assert len(values) == 4
    best = min(trials, key=lambda trial: trial.value)
    results = OmegaConf.load(tmp_path / "out" / "optimization_results.yaml")
    assert results.best_value == best.value
    assert results.best_params == {"lora.r": int(best.params["lora.r"]), "learning_rate": 0.01}
    assert f"Best {best.value:.6g}, job {best.number}" in said
    assert not (tmp_path / "outputs").exists()


def test_the_default_search_takes_the_rate_first_and_holds_alpha(train, tmp_path):
    words = ["hparams_search=lora_default", "hydra.sweep.dir=out", "+callbacks.seen._target_=seen.Seen"]
    said = train([sys.executable, TRAIN, "-m", *SHORT, *words, "optimizer.lr=1e-3,1e-2", "lora.r=4,16"])
    folders = sorted(
        (path for path in (tmp_path / "out").iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
    )
    # Rank 16 on all linear layers is the winner of the first stage: three of the four are new, and all are trained.
    assert len(folders) == 5
    losses = [json.loads((folder / "result.json").read_text())["val_loss"] for folder in folders]
    rate = [1e-3, 1e-2][losses.index(min(losses[:2]))]
    assert [(each["lr"], each["r"], each["alpha"]) for folder in folders for each in seen(folder)] == [
        *((1e-3, 16, 32), (1e-2, 16, 32)),
        *(
            (rate, 4, 32),
            (rate, 4, 32),
            (rate, 16, 32),
        ),
    ]
    assert OmegaConf.load(tmp_path / "out" / "optimization_results.yaml").best_value == min(losses)
    assert "Stage 2 of 2" in said
    modules = [OmegaConf.load(folder / "config.yaml").lora.target_modules for folder in folders]
    assert [each == "all-linear" for each in modules] == [True, True, True, False, False]
    adapted = json.loads((folders[3] / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert adapted == modules[3]


def test_what_an_agent_of_wandb_starts(train, tmp_path, wandb_records):
    """The command that ``wandb agent`` makes of the YAML, in the environment that it gives, without a network."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    drawn = {"learning_rate": {"value": 0.002}, "lora.r": {"value": sweep["parameters"]["lora.r"]["values"][0]}}
    assert drawn.keys() == sweep["parameters"].keys()
    known = utils.create_sweep_command_args({"args": drawn}) | {
        "env": ["/usr/bin/env"],
        "program": [str(ROOT / sweep["program"])],
    }
    command = []
    for word in utils.create_sweep_command(sweep["command"]):
        command += known[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    command[command.index("python")] = sys.executable
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump({"wandb_version": 1} | drawn))
    train(
        [*command, *SHORT, "+callbacks.seen._target_=seen.Seen"],
        WANDB_SWEEP_ID="abc",
        WANDB_RUN_ID="def",
        WANDB_SWEEP_PARAM_PATH=str(tmp_path / "parameters.yaml"),
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
        WANDB_CACHE_DIR=str(tmp_path / "cache"),
        WANDB_DATA_DIR=str(tmp_path / "data"),
    )
    folder = tmp_path / "outputs" / "wandb" / "abc" / "def"
    assert seen(folder) == [{"r": 4, "lr": 0.002, "steps": 4, "world": 1, "alpha": 8}]
    assert list(folder.rglob("run-def.wandb"))
    history = wandb_records(folder, "history")
    assert sweep["metric"]["name"] in {item.key or ".".join(item.nested_key) for each in history for item in each.item}
    assert sweep["metric"]["goal"] == "minimize"
