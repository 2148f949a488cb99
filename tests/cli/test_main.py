"""The console command's own words; what its sub-commands do is tested where they are."""

from __future__ import annotations

import sys

import pytest

import lora_lightning
from lora_lightning.cli import main as console


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lora-lightning", *arguments])
    console.main()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    for name in ("train", "eval", "to-adapter"):
        assert f"\n  {name} " in shown


def test_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == f"lora-lightning {lora_lightning.__version__}"


def test_an_unknown_command_is_told(monkeypatch, capsys):
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, "trian")
    assert raised.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_other_processes_can_be_started_from_argv(monkeypatch):
    """Lightning runs sys.argv again: it must be a file that takes the rest as its arguments."""
    from lora_lightning.cli import train

    seen = []
    monkeypatch.setattr(train, "main", lambda command: seen.append((list(sys.argv), command)))
    run(monkeypatch, "train", "lora.r=8")
    assert seen == [([train.__file__, "lora.r=8"], "lora-lightning train")]
