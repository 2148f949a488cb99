"""Jobs of the training command are read as a whole before one of them starts."""

from __future__ import annotations

import pytest

from tests.cli.conftest import ROOT

TRAIN = ROOT / "scripts" / "train.py"


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("data=tiny_text,jsonl", "job 1 (data=jsonl): data.path has no value yet: add data.path=…"),
        ("name=a,'${nobody.has_this}'", "Interpolation key 'nobody.has_this' not found"),
    ],
)
def test_what_only_a_later_job_lacks_is_told_before_any_starts(command, tmp_path, swept, message):
    done = command(TRAIN, "-m", swept, "hydra.sweep.dir=out", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 jobs cannot be run; nothing was started" in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
