import json
import math
import os
import stat

import pytest
import torch
from lightning.pytorch import Callback

from lora_lightning.reports import RunRecorder
from lora_lightning.reports.recorder import FIELDS, peak_memory_bytes, write_json


class Stopper(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise self.error


def mean_loss(module, data):
    batch = {key: torch.stack([row[key] for row in data.rows]) for key in data.rows[0]}
    with torch.no_grad():
        return float(module.model(**batch).loss)


@pytest.mark.parametrize("way", ["sanity check", "validate"])
def test_a_run_is_measured(module, data, make_trainer, tmp_path, way):
    recorder = RunRecorder()
    module.model.model.embed_tokens.requires_grad_(False)
    before = mean_loss(module, data)
    trainer = make_trainer(recorder, num_sanity_val_steps=-1 if way == "sanity check" else 0)
    if way == "validate":
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    result = json.loads(recorder.write_result(tmp_path / "deep" / "result.json", adapter_path="adapter").read_text())
    assert set(result) >= set(FIELDS)
    assert result["status"] == "completed"
    assert result["val_loss_before"] == pytest.approx(before, rel=1e-5)
    assert result["val_loss"] == pytest.approx(mean_loss(module, data), rel=1e-5)
    assert result["val_loss"] < before
    assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-4)
    assert result["total_parameters"] == sum(weight.numel() for weight in module.parameters())
    assert result["trainable_parameters"] == result["total_parameters"] - 384 * 64
    assert result["steps"] == 8
    assert 0 < result["seconds"] < 100
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 50e6
    assert result["adapter_path"] == "adapter"
    assert result["overrides"] is None


def test_part_of_a_validation_is_no_measure(module, data, make_trainer):
    recorder = RunRecorder()
    make_trainer(recorder, num_sanity_val_steps=1).fit(module, datamodule=data)
    assert recorder.fields["val_loss_before"] is None
    assert recorder.fields["val_loss"] is not None


def test_a_later_validation_counts(module, data, make_trainer):
    recorder = RunRecorder()
    trainer = make_trainer(recorder)
    trainer.fit(module, datamodule=data)
    with torch.no_grad():
        module.model.lm_head.weight.zero_()
    trainer.validate(module, datamodule=data, verbose=False)
    assert recorder.fields["val_loss"] == pytest.approx(math.log(384), rel=1e-5)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RuntimeError("broken\n\tand how"), "failed", "RuntimeError: broken"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_a_run_that_breaks_off(module, data, make_trainer, tmp_path, error, status, told):
    recorder = RunRecorder()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        make_trainer(recorder, Stopper(error)).fit(module, datamodule=data)
    result = json.loads(recorder.write_result(tmp_path / "result.json").read_text())
    assert result["status"] == status
    assert result["error"] == told
    assert result["steps"] == 3


def test_a_resumed_run_remembers_its_start(module, data, make_trainer, tmp_path):
    first = make_trainer(RunRecorder(), num_sanity_val_steps=-1, max_epochs=1)
    first.fit(module, datamodule=data)
    first.save_checkpoint(tmp_path / "run.ckpt")
    recorder = RunRecorder()
    make_trainer(recorder).fit(module, datamodule=data, ckpt_path=tmp_path / "run.ckpt")
    assert recorder.fields["val_loss_before"] == first.callbacks[0].fields["val_loss_before"]
    assert recorder.fields["val_loss_before"] > recorder.fields["val_loss"]


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": tmp_path}, "e": True, "f": None})
    assert json.loads(path.read_text()) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": str(tmp_path)},
        "e": True,
        "f": None,
    }
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_memory_grows_with_use():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(64 * 2**20)
    assert peak_memory_bytes(torch.device("cpu")) >= before
    assert peak_memory_bytes(torch.device("cpu")) > held.numel() * 4
