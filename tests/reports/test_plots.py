import math
import random

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lora_lightning.reports import loss_picture
from lora_lightning.reports.curves import joined, parts_of, series, smoothed

LOSSES = ("train_loss", "val_loss")


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
    trained, validated = series(tmp_path / "run" / "metrics.csv", *LOSSES)
    assert [step for step, _ in trained] == list(range(1, 9))
    assert [step for step, _ in validated] == [4, 8]


class SaveAt4(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{trainer.log_dir}/at4.ckpt")


def test_a_resumed_run_is_one_curve(module, data, make_trainer, tmp_path):
    """The first part went on beyond the step that the second began with."""
    folders = [tmp_path / name for name in ("first", "second")]
    first, second = (CSVLogger(folder, name="", version="") for folder in folders)
    make_trainer(SaveAt4(), logger=first, max_epochs=2).fit(module, datamodule=data)
    make_trainer(logger=second, max_epochs=3).fit(module, datamodule=data, ckpt_path=folders[0] / "at4.ckpt")
    trained, validated = joined([folder / "metrics.csv" for folder in folders], *LOSSES)
    assert [step for step, _ in trained] == list(range(1, 13))
    assert [step for step, _ in validated] == [4, 8, 12]
    assert trained[4:] == series(folders[1] / "metrics.csv", *LOSSES)[0]


def test_rows_that_a_later_part_has_measured_anew_are_dropped(tmp_path):
    parts = {
        "metrics-1.csv": "step,train_loss,val_loss\n0,9,\n2,8,\n3,,8.5\n4,7,\n6,6,\n7,,6.5\n",
        "metrics-2.csv": "step,lr,train_loss,val_loss\n3,0.1,,\n4,,5,\n5,,,5.5\n",  # a row without a loss says nothing
        "metrics-3.csv": "step\n0\n",  # broken off before it measured anything
        "metrics.csv": "step,train_loss\n6,4\n8,3\n",
    }
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    assert parts_of(tmp_path / "metrics.csv") == [tmp_path / name for name in parts]
    trained, validated = joined([tmp_path / name for name in parts], *LOSSES)
    assert trained == [(1, 9.0), (3, 8.0), (5, 5.0), (7, 4.0), (9, 3.0)]
    assert validated == [(4, 8.5), (6, 5.5)]


def test_a_run_begun_anew_in_a_folder_has_nothing_of_the_one_before(tmp_path):
    (tmp_path / "old.csv").write_text("step,train_loss\n0,9\n50,8\n")
    (tmp_path / "new.csv").write_text("step,train_loss\n0,3\n")
    assert joined([tmp_path / "old.csv", tmp_path / "new.csv"], *LOSSES) == [[(1, 3.0)], []]


def test_smoothing_keeps_ends_and_levels():
    assert smoothed([3.0] * 50) == [3.0] * 50
    assert smoothed([1.0]) == [1.0]
    smooth = smoothed([0.0, 2.0] * 30)
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
