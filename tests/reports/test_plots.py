import math
import random

import pytest
from lightning.pytorch.loggers import CSVLogger

from lora_lightning.reports import loss_picture
from lora_lightning.reports.plots import _series, _smoothed


def write_metrics(path, steps=80):
    noise = random.Random(0)
    lines = ["epoch,lr-AdamW,step,train_loss,val_loss"]
    for step in range(steps):
        loss = 2.4 + 2.1 * math.exp(-step / 12)
        lines.append(f"0,0.001,{step},{loss + noise.gauss(0, 0.15):.4f},")
        if step % 20 == 19:
            lines.append(f"0,,{step},,{loss + 0.05:.4f}")
    path.write_text("\n".join(lines) + "\n")


def test_picture(tmp_path):
    write_metrics(tmp_path / "metrics.csv")
    path = loss_picture(tmp_path / "metrics.csv", tmp_path / "out" / "loss.png", val_loss_before=4.51)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_steps_of_a_real_run(module, data, make_trainer, tmp_path):
    """What was measured after n optimizer steps stands at n."""
    make_trainer(logger=CSVLogger(tmp_path / "run", name="", version="")).fit(module, datamodule=data)
    trained, validated = _series(tmp_path / "run" / "metrics.csv")
    assert [step for step, _ in trained] == list(range(1, 9))
    assert [step for step, _ in validated] == [4, 8]


def test_smoothing_keeps_ends_and_levels():
    assert _smoothed([3.0] * 50) == [3.0] * 50
    assert _smoothed([1.0]) == [1.0]
    smooth = _smoothed([0.0, 2.0] * 30)
    assert all(0.6 < value < 1.4 for value in smooth[1:-1])


def test_a_run_does_not_fail_for_its_picture(tmp_path):
    with pytest.warns(UserWarning, match="could not be drawn"):
        assert loss_picture(tmp_path / "no.csv", tmp_path / "loss.png") is None
    (tmp_path / "odd.csv").write_text("step,train_loss\n0,not a number\n")
    with pytest.warns(UserWarning, match="not a number"):
        assert loss_picture(tmp_path / "odd.csv", tmp_path / "loss.png") is None
    (tmp_path / "empty.csv").write_text("")
    assert loss_picture(tmp_path / "empty.csv", tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()
