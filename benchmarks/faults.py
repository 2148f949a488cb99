"""Kills a run that saves at every step, again and again, and looks at what the next start finds.

    python benchmarks/faults.py --kills 200

A parent that has imported everything forks the processes that train, so that a life costs a fraction of a second. Some
are killed at a random moment, others while they write a checkpoint. Now and then the newest checkpoint is damaged, a
byte flipped or the end cut off. Each time a run is over its weights are compared with those of the run that nobody
disturbed. Folders, the other form of a checkpoint, are written and killed likewise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
from lora_lightning.adapters.files import atomic_folder, damage_of, remove_leftovers
from lora_lightning.adapters.newest import newest_whole
from lora_lightning.data.loaders import ResumableLoader

STEPS = 24


class Small(pl.LightningModule):
    """Two layers and dropout, which a wrong random state would show in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 8))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean squared error."""
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(folder: Path) -> None:
    """Start or resume the run in a folder, as a script of one's own would."""
    generator = torch.Generator().manual_seed(11)
    rows = TensorDataset(torch.randn(40, 32, generator=generator), torch.randn(40, 8, generator=generator))
    pl.seed_everything(3, verbose=False)
    remove_leftovers(folder)
    module, loader = Small(), ResumableLoader(rows, batch_size=4, generator=torch.Generator())
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            LoraCallback(LoraConfig(r=4, lora_dropout=0.1)),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True),
        ],
    )
    trainer.fit(module, loader, ckpt_path=newest_whole(folder))
    torch.save(lora_state_dict(module), folder / "final.pt")


class Life:
    """A forked process, and a pipe that it writes to whenever it begins to write a checkpoint."""

    def __init__(self, work: Callable[[], None], log: Path) -> None:
        self.saves, theirs = os.pipe()
        self.log = log
        self.process = os.fork()
        if not self.process:
            status = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.addaudithook(lambda event, details: _tell(theirs, event, details))
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(theirs)

    def wait_for_save(self) -> None:
        """Until it begins to write, or has ended."""
        select.select([self.saves], [], [], 30)
        with contextlib.suppress(OSError):
            os.read(self.saves, 1)

    def end(self, *, kill: bool) -> int:
        """Its status: 0, 1 after an error, or -9."""
        if kill:
            os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        os.close(self.saves)
        return os.waitstatus_to_exitcode(status)


def _tell(pipe: int, event: str, details: tuple) -> None:
    made = details[0] if event in ("open", "os.mkdir") and details else None
    if isinstance(made, (str, os.PathLike)) and ".tmp-lora-" in os.path.basename(os.fspath(made)):
        os.write(pipe, b".")


def disturb(kills: int, place: Path, chance: random.Random) -> dict[str, int | float | bool]:
    """Kill runs so many times; see the module."""
    count: Counter[str] = Counter()
    began = time.monotonic()
    whole = place / "whole"
    if Life(lambda: train(whole), place / "whole.log").end(kill=False):
        raise SystemExit((place / "whole.log").read_text())
    usual = time.monotonic() - began
    expected = torch.load(whole / "final.pt", weights_only=True)
    run, damaged = place / "run", set[Path]()
    while count["kills"] < kills or run.exists() or not count["runs"]:
        before = _newest(run, damaged, count) if run.exists() else None
        overdue = not count["damaged"] and count["kills"] >= kills // 2  # how often luck strikes hangs on the machine
        if before is not None and (chance.random() < 0.15 or overdue):
            _damage(before, chance)
            damaged.add(before)
            count["damaged"] += 1
            count["damaged_refused"] += _newest(run, damaged, count) != before and damage_of(before) is not None
        life = Life(lambda: train(run), place / "run.log")
        aimed = chance.random() < 0.5
        kill = count["kills"] < kills
        if kill and aimed:
            for _ in range(chance.randint(1, 6)):
                life.wait_for_save()
            time.sleep(chance.uniform(0, 0.008))  # a save takes about half of it
        elif kill:
            time.sleep(chance.uniform(0, usual))
        status = life.end(kill=kill)
        count["lives"] += 1
        if status == -signal.SIGKILL:
            count["kills"] += 1
            count["within_a_save"] += any(run.glob(".*.tmp-lora-*"))
            log = life.log.read_text()
            count["resumed"] += "Restored all states" in log
        elif status:
            count["failed_starts"] += 1
            print(life.log.read_text(), file=sys.stderr)
            shutil.rmtree(run)
        if (run / "final.pt").exists() and status == 0:
            final = torch.load(run / "final.pt", weights_only=True)
            equal = final.keys() == expected.keys() and all(torch.equal(final[key], expected[key]) for key in final)
            count["runs"] += 1
            count["runs_equal"] += equal
            shutil.rmtree(run)
        if not run.exists():
            damaged.clear()
    names = ("kills", "within_a_save", "lives", "resumed", "failed_starts", "unfinished_under_a_name")
    names += ("damaged", "damaged_refused", "runs", "runs_equal")
    return {name: count[name] for name in names}


def _newest(folder: Path, damaged: set[Path], count: Counter[str]) -> Path | None:
    """The newest whole checkpoint; all that a killed process left under a checkpoint's name must be whole."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        newest = newest_whole(folder)
    for warning in told:
        count["unfinished_under_a_name"] += not str(warning.message).startswith(tuple(map(str, damaged)))
    return newest


def _damage(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)


def write_folder(path: Path, number: int) -> None:
    """Write or replace a folder; its files say the same number."""
    with atomic_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(number) * 1000)


def write_folders(path: Path) -> None:
    """Replace a folder without end."""
    number = 0
    while True:
        number += 1
        write_folder(path, number)


def disturb_folders(kills: int, place: Path, chance: random.Random) -> dict[str, int]:
    """Kill a process that writes a folder so many times."""
    count = Counter(kills=kills, whole=0, within_the_exchange=0)
    path = place / "folders" / "one.ckpt"
    write_folder(path, 0)
    for _ in range(kills):
        life = Life(lambda: write_folders(path), place / "folders.log")
        for _ in range(chance.randint(2, 8)):
            life.wait_for_save()
        time.sleep(chance.uniform(0, 0.004))
        life.end(kill=True)
        newest = newest_whole(path.parent)
        count["within_the_exchange"] += not path.exists()
        count["whole"] += newest is not None and (newest / "a").read_text() == (newest / "b").read_text()
    return dict(count)


def main() -> None:
    """Print what was found as JSON; the status is 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        files = disturb(arguments.kills, Path(place), chance)
        folders = disturb_folders(max(1, arguments.kills // 4), Path(place), chance)
    print(json.dumps({"files": files, "folders": folders, "seconds": round(time.monotonic() - began, 1)}, indent=2))
    lost = files["failed_starts"] or files["unfinished_under_a_name"] or files["damaged"] != files["damaged_refused"]
    raise SystemExit(bool(lost or files["runs"] != files["runs_equal"] or folders["kills"] != folders["whole"]))


if __name__ == "__main__":
    main()
