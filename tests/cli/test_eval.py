"""`scripts/eval.py` on a run's products."""

from __future__ import annotations

import json

import pytest

from lora_lightning.cli.eval import main


def test_base_and_adapter_side_by_side(smoke, call, tmp_path):
    folder, _ = smoke
    done = call(main, "experiment=smoke", f"adapter={folder}/adapter", f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stderr
    trained = json.loads((folder / "result.json").read_text())
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["base"]["val_loss"] == pytest.approx(trained["val_loss_before"], rel=1e-5)
    assert measured["adapted"]["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    assert "With adapter" in done.stdout


def test_a_checkpoint_is_measured_likewise(smoke, call, tmp_path):
    folder, _ = smoke
    checkpoint = folder / "checkpoints" / "last.ckpt"
    done = call(main, "experiment=smoke", f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["adapted"]["val_loss"] == pytest.approx(
        json.loads((folder / "result.json").read_text())["val_loss"], rel=1e-5
    )


@pytest.mark.parametrize(("given", "part"), [([], "got neither"), (["adapter=a", "ckpt_path=b"], "got both")])
def test_one_of_the_two_has_to_be_named(call, tmp_path, given, part):
    done = call(main, "experiment=smoke", *given, f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_adapter_is_a_message(call, tmp_path):
    done = call(main, "experiment=smoke", "adapter=/nowhere", f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
