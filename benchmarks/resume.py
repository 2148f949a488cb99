"""Checkpoints that move between strategies: every ordered pair, resumed and compared with the uninterrupted run.

    python benchmarks/resume.py                  # all pairs, some minutes
    python benchmarks/resume.py --only fsdp2 tp  # pairs among some

Each strategy trains six steps and saves after the third; then each goes on from each one's checkpoint, and the largest
difference of its adapter from its own uninterrupted run is told. float32, AdamW with eps=1e-5, no dropout, each rank
taking its share of the same batches.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# A strategy, and after a plus sign the flags of strategy_run.py.
VARIANTS = (
    "single",
    "ddp",
    "ddp_fork",
    "fsdp",
    "fsdp+sharded",
    "fsdp2",
    "fsdp2+early+sharded",
    "tp",
    "tp+early+sharded",
    "fsdp2_tp",
)
if importlib.util.find_spec("deepspeed"):
    VARIANTS += ("deepspeed_1", "deepspeed_2", "deepspeed_3")
STAGES = "fit,validate,test,predict"
SAME, ACROSS = 1e-6, 1e-5  # what a difference may be at most
ROOT = Path(__file__).parent


def run(variant: str, out: Path, *options: str) -> Path:
    """One training in processes of its own; returns its folder."""
    strategy, *flags = variant.split("+")
    out.mkdir(parents=True)
    command = [sys.executable, ROOT / "strategy_run.py", "--strategy", strategy, "--out", out, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [*map(str, command), *(f"--{flag}" for flag in flags)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{variant} {' '.join(options)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return out


def difference(one: Path, other: Path) -> float:
    """The largest difference between two runs' adapters."""
    a, b = (torch.load(folder / "final-0.pt", weights_only=True) for folder in (one, other))
    if a.keys() != b.keys():
        raise RuntimeError(f"{one} and {other} hold other tensors")
    return max((a[name] - b[name]).abs().max().item() for name in a)


def whole_run(variant: str, folder: Path, *options: str) -> Path:
    """The uninterrupted run of a variant in ``folder``, made at most once."""
    out = folder / variant
    return out if out.exists() else run(variant, out, "--stages", STAGES, *options)


def resumed(source: str, target: str, folder: Path, *options: str) -> float:
    """How far ``target``, going on from the checkpoint of ``source``, is from its own uninterrupted run."""
    before, after = (whole_run(name, folder, *options) for name in (source, target))
    ckpt = str(before / "step=3.ckpt")
    return difference(run(target, folder / f"{source}-to-{target}", "--ckpt", ckpt, "--save", "100", *options), after)


def main() -> None:
    """All pairs, as a table; the exit status says whether all of them keep within the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    names = parser.parse_args().only
    table = Table("from \\ to", *names, title="Largest difference from the uninterrupted run after three more steps")
    too_large = 0
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        for source, target in product(names, names):
            found[source, target] = resumed(source, target, Path(temporary))
            print(f"{source} -> {target}: {found[source, target]:.1e}", flush=True)
            too_large += found[source, target] > (SAME if source == target else ACROSS)
        for source in names:
            table.add_row(source, *(f"{found[source, target]:.1e}" for target in names))
    Console(width=30 + 12 * len(names)).print(table)
    sys.exit(bool(too_large))


if __name__ == "__main__":
    main()
