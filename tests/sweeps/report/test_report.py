"""The whole report of a folder."""

import os
import subprocess
import sys

import pytest

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.report import write_report
from tests.sweeps.report.folders import believable, write_sweep


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_again_it_is_the_same_bytes(tmp_path):
    jobs = [believable([f"lora.r={r}", f"learning_rate={lr}"]) for r in (4, 8) for lr in ("1e-3", "3e-4")]
    jobs += [{"overrides": ["lora.r=64", "learning_rate=1"], "result": {"status": "failed"}, "log": "ValueError: x"}]
    folder = write_sweep(tmp_path / "sweep", jobs)
    assert write_report(folder) == folder / "sweep.md"
    first = files(folder)
    assert {"sweep.csv", "sweep.md", "best/best.json", "plots/parallel.png", "plots/val_loss_by_r.png"} <= first.keys()
    write_report(folder)
    assert files(folder) == first


def test_pictures_of_the_report_exist(tmp_path):
    report = write_report(write_sweep(tmp_path, [believable([f"lora.r={r}"]) for r in (4, 8)]))
    links = [line.rpartition("(")[2][:-1] for line in report.read_text().splitlines() if line.startswith("![")]
    assert links == ["plots/val_loss_by_r.png", "plots/val_loss_curves.png"]
    assert all((tmp_path / link).is_file() for link in links)


def test_a_metric_that_nobody_reports_leaves_the_csv(tmp_path):
    folder = write_sweep(tmp_path, [believable([f"lora.r={r}"]) for r in (4, 8)])
    with pytest.raises(LoraConfigError, match="reports 'bleu'"):
        write_report(folder, metric="bleu")
    assert (folder / "sweep.csv").is_file()
    assert not (folder / "sweep.md").exists()


def test_a_sweep_that_has_hardly_begun(tmp_path):
    folder = write_sweep(tmp_path, [{"overrides": [f"lora.r={r}"]} for r in (4, 8)])
    assert "2 jobs: 2 not started. 2 are missing here" in write_report(folder).read_text()


def test_reporting_needs_neither_torch_nor_lightning(tmp_path):
    folder = write_sweep(tmp_path, [believable([f"lora.r={r}"]) for r in (4, 8)])
    code = (
        "import sys; from pathlib import Path; from lora_lightning.sweeps.report import write_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_report(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'lightning', 'transformers', 'hydra', 'matplotlib.pyplot', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
