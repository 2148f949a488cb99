"""`scripts/sweep_report.py`: what it prints; what it writes is tested with the report."""

import pytest

from lora_lightning.cli import sweep_report
from tests.cli.conftest import ROOT
from tests.sweeps.report.folders import believable, write_sweep


@pytest.fixture
def folder(tmp_path):
    return write_sweep(tmp_path / "sweep", [believable([f"lora.r={rank}"], val_f1=rank / 10) for rank in (4, 8)])


def test_the_table_is_printed(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    sweep_report.main([str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["Jobs"]
    assert said[1].split()[:3] == ["job", "r", "val_loss"]
    assert said[2].split()[:3] == ["best", "1", "8"]
    assert said[3].split()[:2] == ["0", "4"]
    assert said[-2:] == [f"Report: {folder / 'sweep.md'}", f"One page of it: {folder / 'report.html'}"]


def test_another_metric_and_mode(folder, capsys):
    sweep_report.main([str(folder), "--metric", "val_f1", "--mode", "max"])
    assert "Best by val_f1 (higher is better): job 1" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_is_told_without_a_traceback(folder, capsys):
    with pytest.raises(SystemExit) as left:
        sweep_report.main([str(folder), "--metric", "val_f2"])
    assert left.value.code == 1
    assert "did you mean val_f1" in capsys.readouterr().err


def test_as_a_program(folder, command):
    done = command(ROOT / "scripts" / "sweep_report.py", folder)
    assert done.returncode == 0, done.stderr
    assert "Best by val_loss (lower is better): job 1" in done.stdout
    assert done.stderr == ""
