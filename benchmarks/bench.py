"""What LoRA training costs on a CPU, against PEFT and against the frozen model; made for two cores.

    make bench                          # all of it, in under a quarter of an hour
    make bench ARGS="--only step dora"  # some sections
    make bench ARGS="--write"           # into benchmarks/results/cpu.json and docs/performance.md

Gradients are compared with float64 first, and a wrong one fails the run; a target that is missed does not. Every
contender lives in a process of its own and they take turns, step by step.
"""
# ruff: noqa: E402 - the path comes before the imports

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The repository in the place of this folder, so that the package is found without being installed.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import contenders as c
from benchmarks import page
from benchmarks.jobs import Checks, Steps, Task, Trained
from benchmarks.measure import interleave, machine, ratios
from benchmarks.sections import SECTIONS
from benchmarks.shapes import SHAPES, Chats, is_real
from benchmarks.workers import Local, Worker

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
DEFAULT = "smollm2-135m"
LIMIT = 1e-3  # how far from float64 a float32 gradient may be, relative to its norm


@dataclass
class Bench:
    """A run: its settings and what it has found.

    Attributes:
        rounds: Turns of each contender that count.
        threads: Of each contender.
        quick: Tiny shapes, all in this process: the figures mean nothing.
        layers: Models are cut to so many layers, to try a run; None leaves them whole.
        sections: What each section has found: ``rows`` of the table, and more under names of its own.
        checks: The gradients that were compared with float64.
    """

    rounds: int
    threads: int
    quick: bool
    layers: int | None = None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    _checker: Any = None

    def run(self, name: str) -> None:
        """Measure one section."""
        print(f"{name}: {(SECTIONS[name].__doc__ or '').strip()}", flush=True)
        begin = time.perf_counter()
        self.told = self.sections[name] = {"rows": []}
        SECTIONS[name](self)
        self.told["minutes"] = round((time.perf_counter() - begin) / 60, 2)
        print(f"  {self.told['minutes']} minutes", flush=True)

    def task(self, shape: str = DEFAULT, **more: Any) -> Task:
        """A task, or a tiny one in its place."""
        if not self.quick:
            return Task(shape, **{"layers": self.layers, **more})
        small: dict[str, Any] = {"rows": 2, "tokens": 16, "layers": None}
        if "sides" in more:
            small["sides"] = tuple(side // 128 for side in more["sides"])
        if "chats" in more:
            small["chats"] = replace(more["chats"], prompt=20)
        return Task("tiny", **{**more, **small})

    @contextmanager
    def workers(self, jobs: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
        """A worker for each ``(class, *arguments)``; ended when the block is left."""
        made: dict[str, Any] = {}
        try:
            for name, (make, *arguments) in jobs.items():
                kind = Local if self.quick and make is not Trained else Worker
                made[name] = kind(make, self.threads, *arguments)
            yield made
        finally:
            for worker in made.values():
                worker.close()

    def able(self, specs: Mapping[str, c.Spec]) -> dict[str, c.Spec]:
        """The contenders that can be run here; why the others cannot is told."""
        able = {}
        for name, spec in specs.items():
            if reason := c.why_not(spec):
                self.told.setdefault("not_run", {})[name] = reason
                print(f"  not run: {name}: {reason}", flush=True)
            else:  # a quick run is this process's guest: it sets nothing in it
                able[name] = replace(spec, switches=()) if self.quick else spec
        return able

    @contextmanager
    def steps(self, specs: Mapping[str, c.Spec], *tasks: Task) -> Iterator[dict[str, Any]]:
        """A worker for each contender that can be run, once its gradients have been compared."""
        able = self.able(specs)
        for name, spec in able.items():
            for task in tasks:
                self.check(name, spec, task)
        with self.workers({name: (Steps, spec, *tasks) for name, spec in able.items()}) as made:
            yield made

    def check(self, name: str, spec: c.Spec, task: Task) -> None:
        """Compare a contender's gradients with float64's, on a few rows of its task and four layers."""
        if spec.layer == "none":
            return
        # Neither dropout nor what follows the gradients is looked at.
        plain = replace(spec, dropout=0.0, optimizer="default", grouped=False, switches=())
        few = None if task.sides else min(task.layers or 4, 4)
        chats = task.chats and Chats(40, 0.3, task.chats.answer)
        task = replace(task, rows=2, tokens=32, layers=few, chats=chats)
        key = repr((plain, task))
        if key in self.checks:
            return
        if self._checker is None:
            self._checker = (Local if self.quick else Worker)(Checks, self.threads)
        error = self._checker.call("error", plain, task)
        self.checks[key] = {"contender": name, "section": list(self.sections)[-1], "error": error}
        verdict = "" if error <= LIMIT else f"  WRONG, the limit is {LIMIT:g}"
        print(f"  gradients of {name}: {error:.1e} from float64{verdict}", flush=True)

    @property
    def wrong(self) -> list[str]:
        """Contenders whose gradients are not those of float64."""
        return [told["contender"] for told in self.checks.values() if not told["error"] <= LIMIT]

    def close(self) -> None:
        """End what is left running."""
        if self._checker is not None:
            self._checker.close()
            self._checker = None

    def time(self, workers: Mapping[str, Any], *arguments: Any, rounds: int | None = None) -> dict[str, list[float]]:
        """Turns of all workers, one after the other."""
        turns = {name: (lambda n, w=worker: w.call("turn", n, *arguments)) for name, worker in workers.items()}
        rounds = self.rounds if rounds is None else rounds
        return interleave(turns, rounds)

    def row(self, what: str, figure: Any, target: float | None = None, *, unit: str = "×", note: str = "") -> None:
        """Put a line into the table and print it."""
        figure = figure if isinstance(figure, dict) else {"median": figure, "low": figure, "high": figure, "n": 1}
        row = {"what": what, "figure": figure, "target": target, "unit": unit, "note": note}
        self.told["rows"].append(row)
        print("  " + ", ".join(filter(None, page.cells(row))), flush=True)

    def compare(self, times: Mapping[str, Sequence[float]], of: str, against: str, what: str, **more: Any) -> None:
        """A row with the ratio of two contenders, if both were run."""
        if of in times and against in times:
            self.row(what, ratios(times, of, against), **more)


def table(bench: Bench) -> Table:
    """The figures beside their targets."""
    made = Table(*page.COLUMNS)
    for told in bench.sections.values():
        for row in told["rows"]:
            made.add_row(*page.cells(row))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status, which tells of wrong gradients only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--layers", type=int, help="cut models to so many layers, to try a run")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one turn: does it all run?")
    parser.add_argument(
        "--write", action="store_true", help=f"into {RESULTS.relative_to(ROOT)} and {page.DOCUMENT.name}"
    )
    args = parser.parse_args(arguments)
    if args.write and (args.quick or args.layers):
        parser.error("--write needs figures of whole models, and --quick and --layers have none")
    bench = Bench(1 if args.quick else args.rounds, args.threads, args.quick, args.layers)
    if args.write:
        earlier_results(bench, args.only or SECTIONS)  # refused now rather than when all is measured
    measure(bench, args.only or SECTIONS)
    status = finish(bench)
    if args.write and not status:
        write(bench)
    return status


def measure(bench: Bench, names: Iterable[str]) -> None:
    """Run sections one after the other."""
    try:
        for name in names:
            bench.run(name)
    finally:
        bench.close()


def finish(bench: Bench) -> int:
    """Print the table; returns the exit status."""
    Console(width=None if sys.stdout.isatty() else 160).print(table(bench))
    minutes = sum(told["minutes"] for told in bench.sections.values())
    print(f"{minutes:.1f} minutes, {bench.threads} threads, {bench.rounds} turns of each contender")
    if bench.wrong:
        print(f"Gradients that are not those of float64: {', '.join(bench.wrong)}. No figure counts.", file=sys.stderr)
        return 1
    return 0


def earlier_results(bench: Bench, sections: Iterable[str]) -> dict[str, Any]:
    """What the results hold already, if these sections can be put into it; none of it where all are measured anew."""
    about = machine() | {"threads": bench.threads, "rounds": bench.rounds, "real_weights": is_real(SHAPES[DEFAULT])}
    results: dict[str, Any] = {"machine": about, "sections": {}, "checks": []}
    if RESULTS.is_file():
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
        kinds = [{key: value for key, value in told.items() if key != "date"} for told in (earlier["machine"], about)]
        if kinds[0] == kinds[1]:
            return earlier | {"machine": about}
        if set(sections) != set(SECTIONS):
            differing = [f"{key} {kinds[0].get(key)!r}, here {kinds[1].get(key)!r}" for key in kinds[1]]
            told = [line for line, key in zip(differing, kinds[1], strict=True) if kinds[0].get(key) != kinds[1][key]]
            sys.exit(
                f"{RESULTS.name} is of another machine, other versions or another number of turns ({'; '.join(told)}): "
                "a part of a run cannot be put into it"
            )
    return results


def write(bench: Bench) -> None:
    """Put a run into the results and the page; sections that were not run stay if they come from the same machine."""
    results = earlier_results(bench, bench.sections)
    results["sections"] = {
        name: bench.sections.get(name, results["sections"].get(name))
        for name in SECTIONS
        if name in bench.sections or name in results["sections"]
    }
    kept = [told for told in results["checks"] if told["section"] not in bench.sections]
    results["checks"] = kept + list(bench.checks.values())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write()


if __name__ == "__main__":
    sys.exit(main())
