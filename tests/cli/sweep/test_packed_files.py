"""What the process of a group is told: its jobs as each would be started by itself, and who came to rungs before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from lora_lightning.cli.group_file import GroupFile
from lora_lightning.cli.sweep import packed
from lora_lightning.cli.sweep.command import place_of
from lora_lightning.cli.sweep.compose import Composed
from lora_lightning.cli.sweep.options import Options
from lora_lightning.sweeps.manifest import Manifest, entries
from lora_lightning.sweeps.runs import Job


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The file of two jobs of a sweep of three."""
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr("sys.argv", [str(script), "-m", "seed=1,2,3"])
    jobs = [Job(number, (f"seed={number + 1}",), tmp_path / "sweep" / str(number)) for number in range(3)]
    sweep = SimpleNamespace(
        folder=tmp_path / "sweep", options=Options(halving=True, metric="val_loss", jobs_per_device=2)
    )
    sweep.folder.mkdir()
    known = entries(jobs, sweep.folder)
    Manifest("s", (), "train.py", "train", (), "val_loss", "min", "", "", 0.0, "0", tuple(known)).write(sweep.folder)
    composed = [Composed(job, job.overrides, OmegaConf.create()) for job in jobs[:2]]
    work = packed._work(sweep, composed, "alike")
    return GroupFile.read(sweep.folder / "packed" / "group-0.json"), jobs, sweep.folder, work


def test_a_job_has_the_number_and_the_sweep_that_it_has_by_itself(written):
    file, jobs, folder, _ = written
    for one, job in zip(file.jobs, jobs, strict=False):
        assert {*job.overrides, *place_of(job, folder)} <= {*one.arguments}


def test_processes_on_one_device_share_its_memory(written):
    assert written[0].shared_by == 2


def test_what_jobs_have_reported_at_rungs_before_counts_for_those_that_go_on_too(written):
    file, _, folder, _ = written
    assert file.earlier == {str(number): str(folder / str(number)) for number in range(3)}
