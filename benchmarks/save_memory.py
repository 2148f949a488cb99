"""What saving a checkpoint costs in memory under FSDP2, over a frozen base of about 1 GB, on two CPU processes.

    python benchmarks/save_memory.py

Every process tells its resident memory before the save and the peak during it. The limit is twice what is saved
(adapter and optimizer state) plus 32 MB; the base would be thirty times that.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from strategy_run import LENGTH, VOCABULARY, Sharded
from torch.utils.data import DataLoader, TensorDataset

WIDTH, BLOCKS = 2048, 8
MB = 2**20


def memory(key: str) -> int:
    """Bytes that Linux tells of this process: ``VmRSS`` is what is resident now, ``VmHWM`` its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def worker(out: Path, *, early: bool, sharded: bool) -> None:
    """Two steps, then one save that is watched."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from lora_lightning import LoraCallback, LoraConfig, lora_parameters

    torch.set_num_threads(1)
    module = Sharded(WIDTH, BLOCKS, early)
    module.config = LoraConfig(r=16, lora_alpha=32)
    rows = TensorDataset(torch.randint(VOCABULARY, (16, LENGTH)))
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=sharded),
        use_distributed_sampler=False,
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoraCallback(module.config)],
    )
    measured: dict[str, Any] = {}

    def save() -> None:
        adapter = sum(p.numel() * p.element_size() for p in lora_parameters(module).values())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what training has freed is not to hide what saving takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        trainer.save_checkpoint(out / "x.ckpt")
        path = out / "x.ckpt"
        files = [path] if path.is_file() else list(path.iterdir())
        measured.update(
            base_bytes=sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad),
            saved_bytes=3 * adapter,  # AdamW keeps two numbers beside each of the adapter's
            rise_bytes=memory("VmHWM") - before,
            written_bytes=sum(file.stat().st_size for file in files),
        )

    class Watch(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(out / "first.ckpt")  # what is imported and made on first use is no part of a save
            save()

    trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
    trainer.fit(module, DataLoader(rows, batch_size=8))
    (out / f"memory-{trainer.global_rank}.json").write_text(json.dumps(measured))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch's process groups now and then abort a process at the interpreter's end


def main() -> None:
    """All forms, as a table; the exit status says whether all of them keep within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--early", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, early=args.early, sharded=args.sharded)
        return
    table = Table("injected", "form", "rank", "base MB", "saved MB", "written MB", "rise MB", "limit MB")
    worst = 0.0
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    for early in (False, True):
        for sharded in (False, True):
            with tempfile.TemporaryDirectory() as out:
                flags = ["--early"] * early + ["--sharded"] * sharded
                subprocess.run([sys.executable, __file__, "--worker", out, *flags], env=env, check=True)
                for rank in range(2):
                    told = json.loads((Path(out) / f"memory-{rank}.json").read_text())
                    limit = 2 * told["saved_bytes"] + 32 * MB
                    worst = max(worst, told["rise_bytes"] / limit)
                    keys = ("base_bytes", "saved_bytes", "written_bytes", "rise_bytes")
                    figures = [f"{told[key] / MB:.0f}" for key in keys]
                    where = "before sharding" if early else "after sharding"
                    form = "folder" if sharded else "file"
                    table.add_row(where, form, str(rank), *figures, f"{limit / MB:.0f}")
    Console().print(table)
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
