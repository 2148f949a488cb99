"""The table of strategies in docs/strategies.md: each one trained, saved, resumed and asked for predictions.

    python benchmarks/strategies.py                    # CPU rows, on two to four gloo processes
    python benchmarks/strategies.py --accelerator gpu  # CUDA rows, on the GPUs that there are
    python benchmarks/strategies.py --write            # and put the rows into docs/strategies.md

One device is the measure: ``validate``, ``test`` and ``predict`` tell how far a strategy's figures are from its.
``resume`` is the largest difference of the adapter from the strategy's own uninterrupted run, three steps after a
checkpoint in the middle of an epoch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from resume import difference, resumed, run, whole_run

DOCUMENT = Path(__file__).parent.parent / "docs" / "strategies.md"
COLUMNS = (
    *("strategy", "processes", "fit", "validate", "test", "predict"),
    *("save full", "save sharded", "resume", "bytes full", "bytes sharded"),
)
# Name in the table, variant of strategy_run.py, processes on the CPU, whether it has a sharded form.
ROWS = (
    ("one device", "single", 1, False),
    ("ddp", "ddp", 2, False),
    ("ddp_fork", "ddp_fork", 2, False),
    ("FSDP", "fsdp", 2, True),
    ("FSDP2", "fsdp2", 2, True),
    ("FSDP2, adapters sharded", "fsdp2+early", 2, True),
    ("TP", "tp", 2, True),
    ("TP, a plan for some layers", "tp_partial", 2, True),
    ("FSDP2×TP", "fsdp2_tp", 4, True),
    ("DeepSpeed ZeRO 1", "deepspeed_1", 2, False),
    ("DeepSpeed ZeRO 2", "deepspeed_2", 2, False),
    ("DeepSpeed ZeRO 3", "deepspeed_3", 2, False),
)
NOT_RUN = "not run"


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*"))


def figures(folder: Path) -> dict:
    """What the first rank of a run has measured."""
    return json.loads((folder / "figures-0.json").read_text())


def row_of(title: str, variant: str, processes: int, shards: bool, folder: Path, options: list[str]) -> list[str]:
    """One row, from three or four runs."""
    measure, whole = (whole_run(name, folder, *options) for name in ("single", variant))
    ckpt = whole / "step=3.ckpt"
    again = resumed(variant, variant, folder, *options)
    told, wanted = figures(whole), figures(measure)
    cells = [title, str(processes), f"{difference(whole, measure):.0e}"]
    for stage in ("validate", "test"):
        cells.append(f"{max(abs(told[stage][0][k] - v) for k, v in wanted[stage][0].items()):.0e}")
    gap = None if told["logits"] is None else abs(told["logits"] - wanted["logits"]) / abs(wanted["logits"])
    cells.append("returns none" if gap is None else f"{gap:.0e}")
    sharded = "none"
    if shards:
        sharded = f"{size(run(f'{variant}+sharded', folder / f'{variant}-sharded', *options) / 'step=3.ckpt'):,}"
    full = f"{size(ckpt):,}"
    return [*cells, "yes", "yes" if shards else "none", f"{again:.0e}", full, sharded]


def table(accelerator: str, folder: Path, only: list[str] | None = None) -> list[list[str]]:
    """All rows that can be run here; the others say so."""
    rows = []
    gpu = accelerator == "gpu"
    for title, variant, processes, shards in ROWS:
        if only and variant not in only:
            continue
        missing = variant.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None
        if missing or (gpu and torch.cuda.device_count() < processes):
            rows.append([title, str(processes), *[NOT_RUN] * (len(COLUMNS) - 2)])
        else:
            rows.append(row_of(title, variant, processes, shards, folder, ["--accelerator", accelerator]))
        print("  ".join(rows[-1]), flush=True)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table as text."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(accelerator: str, text: str) -> None:
    """Put a table between its marks in the document."""
    begin, end = f"<!-- {accelerator} table -->", f"<!-- end of {accelerator} table -->"
    content = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(content):
        raise RuntimeError(f"{DOCUMENT} has no mark {begin}")
    DOCUMENT.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content), encoding="utf-8")


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="+", help="variants")
    parser.add_argument("--write", action="store_true", help="into docs/strategies.md")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        text = markdown(table(args.accelerator, Path(folder), args.only))
    print(text)
    if args.write:
        write(args.accelerator, text)


if __name__ == "__main__":
    main()
