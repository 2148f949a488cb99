"""`lora-lightning doctor`: lines for people, JSON for programs, a status for scripts."""

from __future__ import annotations

import json

import pytest

from lora_lightning.cli import doctor


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        doctor.main(arguments)
    return left.value.code, *capsys.readouterr()


def test_a_line_a_check(capsys):
    status, out, _ = run(capsys, "--only", "python", "--only", "hydra")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [["✓", "python"], ["✓", "hydra"]]
    assert "LoraPresets" in lines[1]


def test_a_failure_is_told_to_programs(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / "lightning-2.6.2.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.2\n")
    status, out, _ = run(capsys, "--json", "--only", "packages", "--only", "python")
    assert status == 1
    findings = {each["check"]: each for each in json.loads(out)}
    assert findings["packages"]["status"] == "failure"
    assert findings["packages"]["remedy"]
    assert findings["python"]["status"] == "ok"
    status, out, _ = run(capsys, "--only", "packages")
    assert status == 1
    assert out.startswith("✗ packages")
    assert "→ these releases were compromised" in out


def test_an_unknown_check_is_told(capsys):
    status, _, err = run(capsys, "--only", "trainig")
    assert status == 1
    assert "did you mean training" in err
