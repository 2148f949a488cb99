"""The pool of devices: who gets what, that nothing is given twice, and what one is told when there is too little."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import devices
from lora_lightning.sweeps.devices import Pool, Slot, listed_gpus, meant, visible_gpus
from lora_lightning.sweeps.runs import Job, Work


def _job(number=0, count=1, accelerator="gpu"):
    return Job(number, (), Path("/nowhere"), count, accelerator)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("2,5", ("2", "5")),
        (" 1 , 0 ", ("1", "0")),
        ("GPU-8f1c,MIG-99", ("GPU-8f1c", "MIG-99")),
        ("", ()),
        ("-1", ()),
        ("3,-1,4", ("3",)),
        ("NoDevFiles", ()),
        ("0,0", ("0",)),
    ],
)
def test_the_inherited_devices_stay_as_they_are(given, names):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == names


def test_without_the_variable_the_driver_is_asked(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'; echo 'GPU 1: A (UUID: GPU-b)'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    devices._gpus_of_machine.cache_clear()
    try:
        assert visible_gpus({}) == ("0", "1")
    finally:
        devices._gpus_of_machine.cache_clear()


def test_a_split_gpu_is_its_instances():
    text = (
        "GPU 0: NVIDIA A100 (UUID: GPU-a)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-1)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-2)\n"
        "GPU 1: NVIDIA A100 (UUID: GPU-b)\n"
    )
    assert listed_gpus(text) == ("MIG-1", "MIG-2", "1")
    assert listed_gpus("No devices found.") == ()


def test_gpus_are_shared_evenly_and_given_back():
    pool = Pool(2, gpus=("4", "6"), cores=8)
    slots = [pool.take(_job()) for _ in range(4)]
    assert [slot.gpus for slot in slots] == [("4",), ("6",), ("4",), ("6",)]
    assert pool.take(_job()) is None
    pool.give_back(slots[1])
    assert pool.take(_job(count=2)) is None
    pool.give_back(slots[0])
    assert pool.take(_job(count=2)) == Slot(("4", "6"), 2)
    assert pool.places(_job(count=2)) == 2
    assert pool.places(_job(accelerator="cpu")) == 2


def test_the_cpu_is_one_device_shared_by_threads():
    pool = Pool(3, gpus=("0",), cores=13)
    slot = pool.take(_job(accelerator="cpu"))
    assert slot.environment({}) == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    assert pool.take(_job(count=2, accelerator="cpu")).threads == 2
    assert pool.take(_job(count=99, accelerator="cpu")).threads == 1
    assert pool.take(_job(accelerator="cpu")) is None
    assert pool.take(_job()).gpus == ("0",)


def test_fewer_threads_that_the_user_has_asked_for_stay():
    slot = Slot((), 4)
    inherited = {"OMP_NUM_THREADS": "2,1", "MKL_NUM_THREADS": "16", "CUDA_VISIBLE_DEVICES": "7"}
    assert slot.environment(inherited) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}
    assert slot.environment({"OMP_NUM_THREADS": "many"})["OMP_NUM_THREADS"] == "4"


def test_too_many_devices_are_told_for_all_jobs_at_once(monkeypatch):
    pool = Pool(gpus=("0", "1"), cores=4)
    works = [_job(0, 2), _job(1, 3), Work((_job(2, 4), _job(3)), (), Path("/log")), _job(4, 9, "cpu")]
    with pytest.raises(LoraConfigError) as error:
        pool.check(works)
    text = str(error.value)
    assert "2 GPUs (0, 1) and 4 CPU cores" in text
    assert "job 1 needs 3 GPUs" in text
    assert "job 2 needs 4 GPUs" in text
    assert "job 0" not in text
    assert "job 4" not in text
    pool.check(works[:1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(LoraConfigError, match=r"no GPU .CUDA_VISIBLE_DEVICES hides"):
        Pool().check([_job()])


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_jobs_per_device_is_a_number(count):
    with pytest.raises(LoraConfigError, match="jobs_per_device"):
        Pool(count)


@pytest.mark.parametrize(
    ("value", "accelerator", "gpus", "wanted"),
    [
        (1, "auto", 4, ("gpu", 1)),
        ("auto", "gpu", 4, ("gpu", 4)),
        ("-1", "cuda", 4, ("gpu", 4)),
        (-1, "cpu", 4, ("cpu", 1)),
        (None, None, 0, ("cpu", 1)),
        ("0,2", "gpu", 4, ("gpu", 2)),
        ("[3]", "gpu", 4, ("gpu", 1)),
        ("3", "cpu", 0, ("cpu", 3)),
        ((1, 2, 3), "gpu", 4, ("gpu", 3)),
        ("auto", "gpu", 0, ("gpu", 1)),
        (1, "mps", 0, ("cpu", 1)),
    ],
)
def test_what_a_trainer_means(value, accelerator, gpus, wanted):
    assert meant(value, accelerator, gpus=gpus) == wanted


@pytest.mark.parametrize("value", [0, -2, "many", True, [], ""])
def test_devices_that_mean_nothing_are_told(value):
    with pytest.raises(LoraConfigError, match=r"trainer\.devices"):
        meant(value, "cpu", gpus=0)


@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["cpu", "gpu"]), st.integers(1, 3), st.booleans()), max_size=30),
)
def test_no_device_ever_has_more_jobs_than_it_may(shared, gpus, asked):
    pool, held = Pool(shared, gpus=map(str, range(gpus)), cores=4), []
    for accelerator, count, back in asked:
        if back and held:
            pool.give_back(held.pop(0))
        if (slot := pool.take(_job(0, count, accelerator))) is not None:
            held.append(slot)
            assert len(set(slot.gpus)) == (count if accelerator == "gpu" else 0)
        use = [gpu for slot in held for gpu in slot.gpus]
        assert all(use.count(gpu) <= shared for gpu in use)
        assert sum(not slot.gpus for slot in held) <= shared
    for slot in held:
        pool.give_back(slot)
    assert pool.take(_job(accelerator="cpu")) is not None
    assert (pool.take(_job(count=gpus)) is not None) == (gpus > 0) or gpus == 0
