"""What makes a job what it is, and that those of the training command are read as a whole before one of them starts."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lora_lightning.cli.sweep.compose import own_overrides
from tests.cli.conftest import ROOT

TRAIN = ROOT / "scripts" / "train.py"


def test_only_settings_of_hydra_and_of_the_sweep_are_not_the_jobs_own():
    ours = OmegaConf.load(ROOT / "lora_lightning" / "conf" / "train.yaml").sweep
    others = [
        "hydra.verbose=true",
        "hydra/launcher=basic",
        *(f"++sweep.{key}=1" for key in ours),
        "+sweep.halving.eta=2",
    ]
    own = ["sweep.width=3", "+sweeper=a", "~hydrant", "lora.r=8"]  # somebody's app may have a group of this name
    assert own_overrides([*others, *own]) == tuple(own)


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
