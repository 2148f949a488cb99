"""What trackers get: W&B itself, offline, whose own file says what it would send."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lora_lightning.cli.loggers import finish, log_adapter, log_config

CONFIG = {"lora": {"r": 8, "target_modules": "all-linear"}, "seed": 3}


@pytest.fixture
def logger(wandb_offline):
    return WandbLogger(save_dir=wandb_offline)


def test_the_adapter_becomes_an_artifact(logger, wandb_offline, wandb_records, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text(name)
    csv = CSVLogger(tmp_path / "csv")
    name = f"adapter-{logger.experiment.id}"
    log_adapter([csv, logger], adapter, {"val_loss": 1.5, "steps": 30})
    finish()
    (artifact,) = wandb_records(wandb_offline, "artifact")
    assert (artifact.type, artifact.name) == ("lora-adapter", name)
    assert json.loads(artifact.metadata) == {"val_loss": 1.5, "steps": 30}
    contents = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert contents == {path.name: path.stat().st_size for path in adapter.iterdir()}


def test_the_configuration_goes_to_all_but_the_csv_file(logger, wandb_offline, wandb_records, tmp_path):
    csv = CSVLogger(tmp_path / "csv")
    log_config([csv, logger], CONFIG)
    assert logger.experiment.config["lora"] == {"r": 8, "target_modules": "all-linear"}
    assert not csv.experiment.hparams
    finish()
    sent = {
        update.key: json.loads(update.value_json)
        for each in wandb_records(wandb_offline, "config")
        for update in each.update
    }
    assert sent == CONFIG


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_is_ended_so_that_the_next_logger_has_one_of_its_own(logger, wandb_offline, wandb_records, failed):
    first = logger.experiment.id
    finish(failed=failed)
    (ended,) = wandb_records(wandb_offline, "exit")
    assert ended.exit_code == int(failed)
    assert WandbLogger(save_dir=wandb_offline).experiment.id != first


def test_nothing_to_end_is_no_mistake(monkeypatch):
    import sys

    import wandb

    assert wandb.run is None
    finish()
    monkeypatch.delitem(sys.modules, "wandb")
    finish()
    assert "wandb" not in sys.modules  # it is not imported to be told that there is nothing
