"""Checkpoints are whole or not there, and what is damaged is recognised."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

from lora_lightning.adapters import files
from lora_lightning.adapters.files import MANIFEST, atomic_folder, atomic_save, damage_of, remove_leftovers
from lora_lightning.adapters.newest import newest_whole
from lora_lightning.adapters.zero import write_whole
from lora_lightning.errors import AdapterError


def content(step=1):
    values = torch.randn(50, 13, generator=torch.Generator().manual_seed(step))
    return {"global_step": step, "state_dict": {"lora_A": values}, "optimizer_states": []}


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- files


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "run.ckpt"
    for step in (1, 2):
        atomic_save(content(step), path)
        for options in ({}, {"mmap": True}):
            loaded = torch.load(path, weights_only=True, **options)
            assert loaded["global_step"] == step
            assert loaded["state_dict"]["lora_A"].equal(content(step)["state_dict"]["lora_A"])
    assert damage_of(path) is None
    assert left_in(path.parent) == ["run.ckpt"]


def test_every_flipped_bit_is_seen_or_does_no_harm(tmp_path):
    """Compared with what torch itself loads, which passes over most of them."""
    path, expected = tmp_path / "run.ckpt", content()
    atomic_save(expected, path)
    whole, chance, unseen_by_torch = path.read_bytes(), random.Random(1), 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = torch.load(path, weights_only=True)
            equal = loaded["state_dict"]["lora_A"].equal(expected["state_dict"]["lora_A"])
        except Exception:
            loaded, equal = None, False
        unseen_by_torch += loaded is not None and not equal
        assert equal or damage_of(path) is not None
    assert unseen_by_torch > 30


@pytest.mark.parametrize("length", [0, 1, 100, 2000, -1, -30])
def test_what_was_cut_off_is_damaged(tmp_path, length):
    path = tmp_path / "run.ckpt"
    atomic_save(content(), path)
    path.write_bytes(path.read_bytes()[:length])
    assert damage_of(path) is not None


def test_files_that_others_wrote_are_checked_by_their_members(tmp_path):
    path = tmp_path / "run.ckpt"
    torch.save(content(), path)
    assert damage_of(path) is None
    values = content()["state_dict"]["lora_A"].numpy().tobytes()
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(values) + 100] ^= 1
    path.write_bytes(damaged)
    assert "checksum of" in damage_of(path)


# ---- what cannot be written

FULL = """
import resource, sys, torch
from lora_lightning.adapters.files import atomic_save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for numbers in map(int, sys.argv[2:]):
    try:
        atomic_save({"state_dict": {"w": torch.randn(numbers)}}, sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_is_an_error_and_the_file_before_is_whole(tmp_path):
    path = tmp_path / "run.ckpt"
    atomic_save(content(), path)
    before = path.read_bytes()
    numbers = (24_900, 100_000, 10_000_000)  # too many by the last bytes, by some, by far
    said = subprocess.run(
        [sys.executable, "-c", FULL, path, *map(str, numbers)], capture_output=True, text=True, timeout=500
    ).stdout.splitlines()
    assert len(said) == 3
    for line, count in zip(said, numbers, strict=True):
        assert line.startswith(f"AdapterError {path} could not be written: File too large.")
        assert f"About {count * 4:,} bytes were to be written" in line
        assert "saved earlier is whole" in line
    assert path.read_bytes() == before
    assert left_in(tmp_path) == ["run.ckpt"]


def test_no_space_left_is_an_error(monkeypatch, tmp_path):
    """/dev/full takes the place of the temporary file: the system's own answer to a full disk."""
    path = tmp_path / "run.ckpt"
    atomic_save(content(), path)
    real = open
    monkeypatch.setattr(files, "open", lambda name, mode: real("/dev/full", "wb"), raising=False)
    with pytest.raises(AdapterError, match=r"No space left on device.*bytes are free there"):
        atomic_save(content(2), path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("place", ["file/run.ckpt", "file/deeper/run.ckpt"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(AdapterError, match="could not be written"):
        atomic_save(content(), tmp_path / place)
    with pytest.raises(AdapterError, match="could not be written"), atomic_folder(tmp_path / place):
        pass
    assert left_in(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_is_an_error():
    with pytest.raises(AdapterError, match="could not be written"):
        atomic_save(content(), "/proc/run.ckpt")


# ---- folders


def write(path, step):
    with atomic_folder(path) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "values").write_bytes(bytes([step]) * 5000)
        torch.save(content(step), folder / "meta.pt")


def test_a_folder_is_written_and_replaced(tmp_path):
    path = tmp_path / "run.ckpt"
    for step in (1, 2):
        write(path, step)
        assert damage_of(path) is None
        assert (path / "part" / "values").read_bytes()[0] == step
    assert left_in(tmp_path) == ["run.ckpt"]
    assert json.loads((path / MANIFEST).read_text())["part/values"]["size"] == 5000


def test_a_file_and_a_folder_replace_each_other(tmp_path):
    path = tmp_path / "run.ckpt"
    atomic_save(content(), path)
    write(path, 2)
    assert path.is_dir()
    atomic_save(content(), path)
    assert path.is_file()
    assert damage_of(path) is None
    assert left_in(tmp_path) == ["run.ckpt"]


def test_an_exception_within_leaves_the_folder_before(tmp_path):
    path = tmp_path / "run.ckpt"
    write(path, 1)
    with pytest.raises(KeyError), atomic_folder(path):
        raise KeyError("own")
    assert damage_of(path) is None
    assert left_in(tmp_path) == ["run.ckpt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_recognised(tmp_path, damage):
    path = tmp_path / "run.ckpt"
    write(path, 1)
    part = path / "part" / "values"
    if damage == "flip":
        part.write_bytes(b"\x01" * 4999 + b"\x03")
    elif damage == "cut":
        part.write_bytes(b"\x01" * 4999)
    elif damage == "missing":
        part.unlink()
    elif damage == "no manifest":
        (path / MANIFEST).unlink()
    else:
        (path / MANIFEST).write_text('{"part')
    assert damage_of(path) is not None
    with pytest.warns(UserWarning, match="passed over"):
        assert newest_whole(tmp_path) is None


PROCESSES = """
import sys
import torch.distributed as dist
from lora_lightning.adapters.files import atomic_folder
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
for fails in (None, 0, 1):
    try:
        with atomic_folder(f"{place}/{fails}.ckpt") as folder:
            if fails == rank:
                open("/dev/full", "wb", buffering=0).write(b"x")
            (folder / f"rank{rank}").write_text("mine")
    except Exception as error:
        print(fails, type(error).__name__, error)
"""


def test_processes_write_one_folder_and_fail_together(tmp_path, warm_python):
    processes = [
        subprocess.Popen([warm_python, "-c", PROCESSES, str(rank), tmp_path], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in processes:
        said = process.communicate(timeout=500)[0].splitlines()
        assert [line[:14] for line in said] == ["0 AdapterError", "1 AdapterError"]
        assert all("No space left on device" in line for line in said)
    assert left_in(tmp_path / "None.ckpt") == [MANIFEST, "rank0", "rank1"]
    assert damage_of(tmp_path / "None.ckpt") is None
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["None.ckpt"]
    assert not list(tmp_path.glob(".*"))


ANY_KIND = """
import sys
from datetime import timedelta
import torch.distributed as dist
from lora_lightning.adapters.files import atomic_folder
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=300)
)
try:
    with atomic_folder(f"{place}/no\\0path.ckpt"):  # which no system takes, and Python says so by a ValueError
        pass
except Exception as error:
    print(type(error).__name__, error)
dist.barrier()
dist.destroy_process_group()
"""


def test_an_exception_of_any_kind_in_the_first_process_is_one_in_all(tmp_path, warm_python):
    processes = [
        subprocess.Popen([warm_python, "-c", ANY_KIND, str(rank), tmp_path], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0].startswith("ValueError")
    assert said[1].startswith("AdapterError")
    assert all("null byte" in each for each in said)


# ---- killed at each of the moments when the system is asked for something

CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from lora_lightning.adapters.files import atomic_folder, atomic_save, remove_leftovers
from lora_lightning.adapters.newest import newest_whole


def write(kind, step):
    values = {"global_step": step, "state_dict": {"w": torch.full((5000,), float(step))}, "optimizer_states": []}
    if kind == "file":
        atomic_save(values, path)
    else:
        with atomic_folder(path) as folder:
            torch.save(values, folder / "meta.pt")
            (folder / "more").write_text(str(step))


def crash(event, details):
    global left
    if event == "open" or event.startswith(("os.", "shutil.")):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


path = Path(sys.argv[1]) / "run.ckpt"
for kind in ("file", "folder"):
    found, status, left = [], None, 0
    while status != 0:
        shutil.rmtree(path.parent, ignore_errors=True)
        write(kind, 1)
        left = len(found) + 1
        process = os.fork()
        if not process:
            sys.addaudithook(crash)
            write(kind, 2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        newest = newest_whole(path.parent)
        content = torch.load(newest / "meta.pt" if newest.is_dir() else newest)
        found.append(content["global_step"])
        assert content["state_dict"]["w"].eq(found[-1]).all()
        write(kind, 3)  # whatever the killed process has left
        assert torch.load(path / "meta.pt" if path.is_dir() else path)["global_step"] == 3
    print(json.dumps(found))
"""


def test_there_is_a_whole_checkpoint_at_every_moment_of_a_save(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CRASHES, tmp_path / "run"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert len(found) > 6
        assert found == sorted(found)  # the old one up to a moment, from then on the new one
        assert {found[0], found[-1]} == {1, 2}


# ---- the newest


def test_the_highest_step_is_the_newest_whatever_the_time(tmp_path):
    assert newest_whole(tmp_path / "nowhere") is None
    for step in (3, 10, 5):
        atomic_save(content(step), tmp_path / f"{step}.ckpt")
    assert newest_whole(tmp_path) == tmp_path / "10.ckpt"
    atomic_save(content(10), tmp_path / "again.ckpt")
    os.utime(tmp_path / "10.ckpt", (1, 1))
    assert newest_whole(tmp_path) == tmp_path / "again.ckpt"
    write(tmp_path / "11.ckpt", 11)
    assert newest_whole(tmp_path) == tmp_path / "11.ckpt"
    atomic_save(content(12), tmp_path / "elsewhere" / "12.ckpt")
    assert newest_whole(tmp_path, tmp_path / "elsewhere" / "12.ckpt") == tmp_path / "elsewhere" / "12.ckpt"


def test_folders_of_deepspeed_are_read_too(tmp_path):
    for step, weights_only in ((10, False), (3, False), (12, True)):  # written in this order
        with atomic_folder(tmp_path / f"{step}.ckpt") as folder:
            write_whole({"global_step": step, "state_dict": {}} if weights_only else content(step), folder)
    atomic_save(content(4), tmp_path / "4.ckpt")
    with pytest.warns(UserWarning, match=r"12\.ckpt is passed over: it holds weights only"):
        assert newest_whole(tmp_path) == tmp_path / "10.ckpt"


def test_what_cannot_be_resumed_is_passed_over(tmp_path):
    atomic_save(content(1), tmp_path / "1.ckpt")
    atomic_save({"global_step": 2, "state_dict": {}}, tmp_path / "2.ckpt")
    (tmp_path / "3.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "4.ckpt").symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("4")
    (tmp_path / "adapter").mkdir()
    with pytest.warns(UserWarning, match="passed over") as told:
        assert newest_whole(tmp_path) == tmp_path / "1.ckpt"
    messages = " ".join(str(each.message) for each in told)
    assert "2.ckpt is passed over: it holds weights only" in messages
    assert "3.ckpt is passed over: it is cut off" in messages
    assert "4.ckpt is passed over: it is a link to nothing" in messages
    assert len(told) == 3


def test_a_folder_whose_exchange_was_cut_off_is_found_under_its_other_name(tmp_path):
    write(tmp_path / "run.ckpt", 1)
    (tmp_path / "run.ckpt").rename(tmp_path / "run.ckpt.replaced")
    assert newest_whole(tmp_path) == tmp_path / "run.ckpt.replaced"
    write(tmp_path / "run.ckpt", 2)
    assert left_in(tmp_path) == ["run.ckpt"]


def test_only_temporaries_of_earlier_processes_are_removed(tmp_path):
    names = (".run.ckpt.tmp-lora-12_0011aabb", ".run.ckpt.tmp-lora-folder", ".mine.tmp", "run.tmp-lora-1", "last.ckpt")
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("folder") else (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".now.ckpt.tmp-lora-13_0011aabb").write_text("")
    os.utime(tmp_path / ".now.ckpt.tmp-lora-13_0011aabb", (time.time() + 1, time.time() + 1))
    assert sorted(path.name for path in remove_leftovers(tmp_path)) == sorted(names[:2])
    assert left_in(tmp_path) == sorted([*names[2:], ".now.ckpt.tmp-lora-13_0011aabb"])


def test_a_small_file_system_that_fills_up(tmp_path):
    """A real one of 128 KiB, where this process may mount it."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        atomic_save(content(), place / "run.ckpt")
        with pytest.raises(AdapterError, match="No space left on device"):
            atomic_save({"w": torch.randn(100_000)}, place / "run.ckpt")
        assert torch.load(place / "run.ckpt", weights_only=True)["global_step"] == 1
        assert left_in(place) == ["run.ckpt"]
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(AdapterError, match="Read-only file system"):
            atomic_save(content(2), place / "run.ckpt")
    finally:
        subprocess.run(["umount", place], check=True)
