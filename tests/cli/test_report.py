"""`scripts/report.py`: which page it makes of which folder; what stands on it is tested with the page."""

import sys

import pytest

from lora_lightning.cli import report
from tests.cli.conftest import ROOT
from tests.reports.page.folders import Page, write_run
from tests.sweeps.report.folders import believable, write_sweep


def test_a_run_leaves_its_page(smoke):
    """The run of `scripts/train.py experiment=smoke lora.r=64 lora.use_rslora=true`."""
    folder, screen = smoke
    page = Page(folder / "report.html")
    assert f"One page of it: {folder / 'report.html'}" in screen
    assert {"figures", "curves", "samples", "layers", "settings", "environment"} <= set(page.sections)
    for text in ("finished", "demo:tiny-llama", "lora.use_rslora=true", "python", "before training", "q_proj"):
        assert text in page.text, text
    assert len(page.source) < 500_000


def test_it_is_made_again_from_the_folder_alone(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    report.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()


def test_a_sweep(tmp_path, capsys):
    folder = write_sweep(tmp_path / "sweep", [believable([f"lora.r={rank}"]) for rank in (4, 8)])
    report.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "jobs" in Page(folder / "report.html").sections


def test_a_sweep_of_which_nothing_has_finished(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [{"overrides": ["lora.r=4"]}, {"overrides": ["lora.r=8"], "log": "begun"}])
    report.main([str(folder)])
    page = Page(folder / "report.html")
    assert "0 of 2 done" in page.text
    assert "2 are missing here: the sweep is still running or was ended" in page.text


def told(capsys, folder):
    with pytest.raises(SystemExit) as left:
        report.main([str(folder)])
    assert left.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_a_page_of_somebody_elses_is_left_alone(tmp_path, capsys):
    for folder in (write_run(tmp_path / "run"), write_sweep(tmp_path / "sweep", [believable(["lora.r=4"])])):
        (folder / "report.html").write_text("mine")
        assert "was not written by lora_lightning and is left alone" in told(capsys, folder)
        assert (folder / "report.html").read_text() == "mine"


def test_other_folders_are_refused_with_what_is_there(tmp_path, capsys):
    write_run(tmp_path / "outputs" / "one")
    assert f"Runs there: {tmp_path / 'outputs' / 'one'}" in told(capsys, tmp_path / "outputs")
    assert "is the folder of neither a run nor a sweep" in told(capsys, tmp_path / "outputs")
    assert f"The run that it belongs to: {tmp_path / 'outputs' / 'one'}" in told(
        capsys, tmp_path / "outputs" / "one" / "adapter"
    )
    assert "There is no folder" in told(capsys, tmp_path / "outputs" / "tow")
    assert "is a file" in told(capsys, tmp_path / "outputs" / "one" / "config.yaml")
    (tmp_path / "empty").mkdir()
    assert "It is empty" in told(capsys, tmp_path / "empty")


def test_the_browser_is_opened(tmp_path, command):
    folder = write_run(tmp_path / "run")
    (tmp_path / "browser.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n")
    browser = f"{sys.executable} {tmp_path / 'browser.py'} {tmp_path / 'opened'} %s"
    done = command(ROOT / "scripts" / "report.py", folder, "--open", BROWSER=browser)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "opened").read_text() == (folder / "report.html").as_uri()
