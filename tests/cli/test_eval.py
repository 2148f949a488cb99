"""`scripts/eval.py` and `scripts/to_adapter.py` on a run's products."""

from __future__ import annotations

import json
from pathlib import Path

import lora_lightning
import pytest
from safetensors.torch import load_file

ROOT = Path(lora_lightning.__file__).parents[1]
EVAL = ROOT / "scripts" / "eval.py"


def test_base_and_adapter_side_by_side(smoke, command, tmp_path):
    folder, _ = smoke
    done = command(EVAL, "experiment=smoke", f"adapter={folder}/adapter", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    trained = json.loads((folder / "result.json").read_text())
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["base"]["val_loss"] == pytest.approx(trained["val_loss_before"], rel=1e-5)
    assert measured["adapted"]["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    assert "With adapter" in done.stdout


def test_a_checkpoint_is_measured_likewise(smoke, command, tmp_path):
    folder, _ = smoke
    checkpoint = folder / "checkpoints" / "last.ckpt"
    done = command(EVAL, "experiment=smoke", f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["adapted"]["val_loss"] == pytest.approx(
        json.loads((folder / "result.json").read_text())["val_loss"], rel=1e-5
    )


@pytest.mark.parametrize(("given", "part"), [([], "got neither"), (["adapter=a", "ckpt_path=b"], "got both")])
def test_one_of_the_two_has_to_be_named(command, tmp_path, given, part):
    done = command(EVAL, "experiment=smoke", *given, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_adapter_is_a_message(command, tmp_path):
    done = command(EVAL, "experiment=smoke", "adapter=/nowhere", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_becomes_the_folder_that_the_run_wrote(smoke, command, tmp_path):
    folder, _ = smoke
    done = command(ROOT / "scripts" / "to_adapter.py", folder / "checkpoints" / "last.ckpt", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "made")
    made, saved = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "made", folder / "adapter"))
    assert made.keys() == saved.keys()
    assert all(made[key].equal(saved[key]) for key in made)


def test_what_is_no_checkpoint_is_a_message(command, tmp_path):
    done = command(ROOT / "scripts" / "to_adapter.py", tmp_path / "nothing.ckpt")
    assert done.returncode == 1
    assert "nothing.ckpt" in done.stderr
    assert "Traceback" not in done.stderr
