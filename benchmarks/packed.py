"""What a sweep costs as it is run: jobs one after another, several at a time, and packed into one process.

    python benchmarks/packed.py                        # all of it: about half an hour on two cores
    python benchmarks/packed.py --only serial packed --rows 1x48 --jobs 4
    python benchmarks/packed.py --write                # into benchmarks/results/packed.json and docs/sweeps.md
    python benchmarks/packed.py --tiny                 # does it all run? The figures mean nothing

Whole runs through the command line, processes included: four ranks × two rates on SmolLM2-135M and headlines. Model and
tokenised rows are made before anything is timed. Memory is that of all processes together, sampled: a page that several
of them share counts once (PSS).
"""
# ruff: noqa: E402 - the path comes before the imports

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks import packed_page as page
from benchmarks.measure import machine
from benchmarks.sweep_folder import compared, jobs_of
from benchmarks.tree import TreeMemory

RESULTS = ROOT / "benchmarks" / "results" / "packed.json"
RANKS, RATES = ("4", "8", "16", "32"), ("1e-4", "1e-3")
CASES = {
    "serial": ("hydra/launcher=lora_local", "sweep.jobs_per_device=1"),
    "two": ("hydra/launcher=lora_local", "sweep.jobs_per_device=2"),
    "all": ("hydra/launcher=lora_local", "sweep.jobs_per_device={jobs}"),
    "packed": ("hydra/launcher=lora_packed",),
    "halving": ("hydra/launcher=lora_packed", "sweep.halving=true"),
}
# Rows of a step × tokens of a row, on an average; the words of a story that are so many tokens with its headline.
ROWS = {
    "1x48": ("data.batch_size=1", "data.words=9"),
    "4x96": ("data.batch_size=4", "data.words=44"),
}
COMMON = ("trainer.log_every_n_steps=1", "trainer.num_sanity_val_steps=0", "data.samples=0")
HEADLINES = (
    "experiment=bbc_headlines",
    "data.system_prompt=Headlines.",  # shorter than the model's own
    "data.val_rows=8",
    "trainer.max_steps=20",
    "trainer.val_check_interval=20",
)
TINY = ("experiment=smoke", "data.val_rows=8", "trainer.max_steps=8", "trainer.val_check_interval=8")


def settings(rows: str, ranks: Sequence[str], rates: Sequence[str]) -> list[str]:
    """The overrides of a sweep, without how it is run."""
    own = TINY if rows == "tiny" else (*HEADLINES, *ROWS[rows])
    return [*own, *COMMON, f"lora.r={','.join(ranks)}", f"learning_rate={','.join(rates)}"]


def run(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a sweep from the command line.

    Returns:
        ``seconds`` from its start to its end, ``memory`` (see `TreeMemory`), and its ``jobs`` by number.

    Raises:
        SystemExit: It has failed; its last lines are told.
    """
    command = [sys.executable, "scripts/train.py", "-m", *overrides, f"hydra.sweep.dir={folder}"]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with log.open("w") as screen:
        process = subprocess.Popen(command, cwd=ROOT, stdout=screen, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        with TreeMemory(process.pid) as memory:
            status = process.wait()
    seconds = time.perf_counter() - begin
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        sys.exit(f"{' '.join(command[1:])}\nhas ended with status {status}:\n{tail}")
    return {"seconds": round(seconds, 2), "memory": memory.told(), "jobs": jobs_of(folder)}


def measure(rows: str, cases: Sequence[str], jobs: int, folder: Path) -> dict[str, Any]:
    """Run the sweeps of one size, one after the other, and compare the jobs' losses with those of their solo runs."""
    ranks, rates = RANKS[: max(1, jobs // len(RATES))], RATES[:jobs]
    found: dict[str, Any] = {"jobs": len(ranks) * len(rates), "cases": {}}
    if rows != "tiny":  # model, tokenised rows, and the files of the libraries: there before anything is timed
        run([*settings(rows, ranks[:1], rates[:1]), "trainer.max_steps=1", *CASES["serial"]], folder / "warm")
    for case in cases:
        how = [part.format(jobs=found["jobs"]) for part in CASES[case]]
        told = found["cases"][case] = run([*settings(rows, ranks, rates), *how], folder / case)
        told |= compared(told["jobs"], found["cases"].get("serial", {}).get("jobs"))
        print(f"{rows} {case}: {told['seconds']:.1f} s, {told['memory']['pss'] / 2**20:.0f} MB", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows × tokens of a step")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--jobs", type=int, default=len(RANKS) * len(RATES), help="the first so many of the grid")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two ranks: does it all run?")
    parser.add_argument("--keep", type=Path, help="keep the sweeps' folders here")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.name} and {page.DOCUMENT.name}")
    args = parser.parse_args(arguments)
    if args.write and (args.tiny or args.jobs != len(RANKS) * len(RATES)):
        parser.error("--write needs figures of the whole grid, and --tiny and --jobs have none")
    cases = [case for case in CASES if case in args.only]  # one after another first: the others are compared with it
    sizes = ["tiny"] if args.tiny else [rows for rows in ROWS if rows in args.rows]
    jobs = min(args.jobs, 4) if args.tiny else args.jobs
    with _folder(args.keep) as folder:
        found = {rows: measure(rows, cases, jobs, folder / rows) for rows in sizes}
    about = machine() | {"threads": len(os.sched_getaffinity(0))}
    print(page.table({"machine": about, "rows": found}))
    if args.write:
        results = merged(found, about)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write()
    return 0


def merged(found: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """What was found, beside earlier results of the same machine and versions where other parts were measured."""
    results: dict[str, Any] = {"machine": about, "rows": {}}
    if RESULTS.is_file():
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
        if {**earlier["machine"], "date": None} == {**about, "date": None}:
            results["rows"] = earlier["rows"]
    for rows, told in found.items():
        kept = results["rows"].get(rows)
        if kept is not None and kept["jobs"] == told["jobs"]:
            cases = kept["cases"] | told["cases"]
            serial = cases.get("serial", {}).get("jobs")
            told = told | {"cases": {name: case | compared(case["jobs"], serial) for name, case in cases.items()}}
        results["rows"][rows] = told
    return results


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder to keep, or a temporary one."""
    if keep is not None:
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


if __name__ == "__main__":
    sys.exit(main())
