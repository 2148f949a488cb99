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
# Not the folder of this file: the cuda.py in it would take the place of NVIDIA's package.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import contenders as c
from benchmarks import page
from benchmarks.jobs import Checks, Injections, Steps, Task, Trained
from benchmarks.measure import MB, interleave, machine, ratios, spread
from benchmarks.shapes import HEADLINES, LLAMA_8B_LAYERS, SHAPES, WHOLE_STORIES, Chats, is_real
from benchmarks.workers import Local, Worker

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
DEFAULT = "smollm2-135m"
LIMIT = 1e-3  # how far from float64 a float32 gradient may be, relative to its norm
SHIPPED, TUNED, OURS, FLOOR = "PEFT as shipped", "PEFT tuned", "ours", "frozen floor"
NO_DROPOUT = ", no dropout"


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
        small = {"rows": 2, "tokens": 16, "layers": None}
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

    @contextmanager
    def steps(self, specs: Mapping[str, c.Spec], *tasks: Task) -> Iterator[dict[str, Any]]:
        """A worker for each contender that can be run here and has right gradients; the others are told."""
        able = {}
        for name, spec in specs.items():
            if reason := c.why_not(spec):
                self.told.setdefault("not_run", {})[name] = reason
                print(f"  not run: {name}: {reason}", flush=True)
            else:
                able[name] = (Steps, spec, *tasks)
                for task in tasks:
                    self.check(name, spec, task)
        with self.workers(able) as made:
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


# ---- sections, in the order of a run


def step(bench: Bench) -> None:
    """The step, every token supervised, its saved tensors and its profile."""
    task = bench.task()
    specs = {
        SHIPPED: c.PEFT_SHIPPED,
        SHIPPED + NO_DROPOUT: replace(c.PEFT_SHIPPED, dropout=0.0),
        TUNED: c.PEFT_TUNED,
        OURS: c.OURS,
        OURS + NO_DROPOUT: replace(c.OURS, dropout=0.0),
        FLOOR: c.FLOOR,
    }
    with bench.steps(specs, task) as made, bench.workers({"in a Trainer": (Trained, c.OURS, task)}) as trained:
        times = bench.time(made | trained)
        bench.told["step"] = _speeds(times)
        every = "every token supervised, 4×128"
        bench.compare(times, OURS, SHIPPED, f"step against PEFT as shipped, {every}", target=0.68)
        bench.compare(times, OURS + NO_DROPOUT, FLOOR, "step against the frozen floor, dropout 0", target=1.09)
        bench.compare(times, OURS, FLOOR, "step against the frozen floor, dropout 0.05", target=1.15)
        bench.compare(times, OURS, TUNED, "step against PEFT tuned", target=0.75)
        bench.compare(
            times, "in a Trainer", OURS, "Lightning's loop with the callback against a bare loop", target=1.03
        )
        none = OURS + NO_DROPOUT, SHIPPED + NO_DROPOUT
        bench.compare(times, *none, "step against PEFT as shipped, dropout 0 in both")
        bench.compare(times, SHIPPED, FLOOR, "PEFT as shipped against the frozen floor")
        bench.compare(times, TUNED, FLOOR, "PEFT tuned against the frozen floor")
        saved = {name: worker.call("saved") for name, worker in made.items()}
        bench.told["saved_bytes"] = saved
        if OURS in saved and SHIPPED in saved:
            bench.row(
                "saved-tensor bytes of the step against PEFT as shipped",
                saved[OURS] / saved[SHIPPED],
                0.5,
                note=f"{saved[OURS] / MB:.0f} of {saved[SHIPPED] / MB:.0f} MB",
            )
        bench.told["profiles"] = {
            name: made[name].call("profile") for name in (SHIPPED, TUNED, OURS, FLOOR) if name in made
        }


def headlines(bench: Bench) -> None:
    """The headline task as it is trained by default, and the ladder from PEFT to all of ours."""
    plain = {
        SHIPPED + NO_DROPOUT: replace(c.PEFT_SHIPPED, dropout=0.0),
        "+ layer" + NO_DROPOUT: replace(c.LADDER["+ layer"], dropout=0.0),
    }
    with bench.steps(c.LADDER | plain, bench.task(chats=HEADLINES)) as made:
        times = bench.time(made)
    first, last = next(iter(c.LADDER)), list(c.LADDER)[-1]
    bench.compare(
        times, last, first, "headline task (7 % of the tokens supervised) against PEFT as shipped", target=0.5
    )
    bench.told["ladder"] = _ladder(times, plain)


def stories(bench: Bench) -> None:
    """Headlines of whole stories: rows of unlike length, so that batching tells."""
    specs = {SHIPPED: c.PEFT_SHIPPED, TUNED: c.PEFT_TUNED, "random order": replace(c.OURS, grouped=False), OURS: c.OURS}
    with bench.steps(specs, bench.task(chats=WHOLE_STORIES)) as made:
        times = bench.time(made, rounds=max(1, round(0.6 * bench.rounds)))
    bench.told["stories"] = _speeds(times)
    what = "headlines of whole stories (about 490 tokens, 2 % supervised)"
    bench.compare(times, OURS, SHIPPED, f"{what} against PEFT as shipped", target=0.5)
    bench.compare(times, OURS, TUNED, f"{what} against PEFT tuned")
    bench.compare(times, OURS, "random order", "of which batches by length, against ours in random order")


def memory(bench: Bench) -> None:
    """Peak memory of a process at 8×256, one process after the other."""
    task = bench.task(rows=8, tokens=256)
    peaks: dict[str, dict[str, int]] = {}
    for name, spec in {SHIPPED: c.PEFT_SHIPPED, TUNED: c.PEFT_TUNED, OURS: c.OURS, FLOOR: c.FLOOR}.items():
        if c.why_not(spec):
            continue
        with bench.workers({name: (Steps, spec, task)}) as made:
            peaks[name] = made[name].call("peak", 2)
    bench.told["memory"] = peaks
    if OURS in peaks and SHIPPED in peaks:
        mine, theirs = peaks[OURS], peaks[SHIPPED]
        bench.row(
            "peak memory at 8×256 against PEFT as shipped",
            mine["peak"] / theirs["peak"],
            0.5,
            note=f"{mine['peak'] / MB:.0f} of {theirs['peak'] / MB:.0f} MB, the whole process",
        )
        rise, their_rise = mine["peak"] - mine["before"], theirs["peak"] - theirs["before"]
        bench.row(
            "of which training itself (above the loaded model)",
            rise / their_rise,
            note=f"{rise / MB:.0f} of {their_rise / MB:.0f} MB",
        )


def dora(bench: Bench) -> None:
    """DoRA's step."""
    specs = {"ours, DoRA": replace(c.OURS, dora=True), "PEFT's DoRA": replace(c.PEFT_SHIPPED, dora=True)}
    with bench.steps(specs, bench.task()) as made:
        times = bench.time(made, rounds=max(1, round(0.6 * bench.rounds))) if len(made) == len(specs) else {}
    bench.told["dora"] = _speeds(times)
    bench.compare(times, *specs, "DoRA step against PEFT's DoRA", target=0.4)


def injection(bench: Bench) -> None:
    """Injection into 896 small linear layers."""
    layers = 2 if bench.quick else 128
    specs = {name: spec for name, spec in ((OURS, c.OURS), (SHIPPED, c.PEFT_SHIPPED)) if not c.why_not(spec)}
    with bench.workers({name: (Injections, spec, layers) for name, spec in specs.items()}) as made:
        times = bench.time(made)
    bench.row(f"injection, {7 * layers} modules", spread(times[OURS]), 0.2, unit="s")
    bench.compare(times, OURS, SHIPPED, f"injection, {7 * layers} modules, against PEFT", target=0.1)


def imports(bench: Bench) -> None:
    """What an import costs, in fresh processes."""
    what = {
        "torch": "import torch",
        "lora_lightning": "import lora_lightning",
        "names": "from lora_lightning import LoraConfig, inject_lora",
    }

    def seconds(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        return time.perf_counter() - begin

    turns = {name: (lambda number, code=code: seconds(code)) for name, code in what.items()}
    times = interleave(turns, bench.rounds)
    bench.compare(times, "lora_lightning", "torch", "`import lora_lightning` against `import torch`", target=1.3)
    bench.compare(times, "names", "torch", f"`{what['names']}` against `import torch`", target=1.3)


def shapes(bench: Bench) -> None:
    """Another model's shape: Qwen3-0.6B with two of its layers, where the head is most of the step."""
    specs = {SHIPPED: c.PEFT_SHIPPED, TUNED: c.PEFT_TUNED, OURS: c.OURS, FLOOR: c.FLOOR}
    with bench.steps(specs, bench.task("qwen3-0.6b", rows=2, layers=2)) as made:
        times = bench.time(made)
    bench.told["shapes"] = {"Qwen3-0.6B, two layers, 2×128": _speeds(times)}
    for against in (SHIPPED, TUNED, FLOOR):
        bench.compare(times, OURS, against, f"Qwen3-0.6B shape, two layers, 2×128, against {against}")


def layers(bench: Bench) -> None:
    """Llama-8B's linear layers, each alone with 256 tokens."""
    tasks = [bench.task(rows=1, tokens=256, sides=sides) for sides in LLAMA_8B_LAYERS]
    with bench.steps({SHIPPED: c.PEFT_SHIPPED, OURS: c.OURS, FLOOR: c.FLOOR}, *tasks) as made:
        for number, (d_in, d_out) in enumerate(LLAMA_8B_LAYERS):
            times = bench.time(made, number)
            for against in (SHIPPED, FLOOR):
                bench.compare(times, OURS, against, f"a linear layer {d_in}→{d_out} alone against {against}")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    section.__name__: section
    for section in (step, headlines, stories, memory, dora, injection, imports, shapes, layers)
}


def _speeds(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Seconds a token of each contender, and tokens a second (neither counts padding)."""
    return {
        name: {"seconds_a_token": spread(taken), "tokens_per_second": round(1 / spread(taken)["median"])}
        for name, taken in times.items()
    }


def _ladder(times: Mapping[str, Sequence[float]], plain: Mapping[str, c.Spec]) -> list[dict[str, Any]]:
    """Each level's time against PEFT as shipped and against the level before it; dropout is a level of its own."""
    names = list(c.LADDER)
    bare, layer = plain
    steps = [(names[0], names[0], None), ("+ layer (both without dropout)", layer, bare)]
    steps += [("+ dropout (both with it)", names[1], names[0])]
    steps += [(name, name, before) for before, name in pairwise(names[1:])]
    return [
        {
            "level": label,
            "against_shipped": ratios(times, name, bare if name == layer else names[0]),
            "against_before": None if before is None else ratios(times, name, before),
            "tokens_per_second": round(1 / spread(times[name])["median"]),
        }
        for label, name, before in steps
        if name in times and (before is None or before in times)
    ]


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


def write(bench: Bench) -> None:
    """Put a run into the results and the page; sections that were not run stay if they come from the same machine."""
    about = machine() | {"threads": bench.threads, "rounds": bench.rounds, "real_weights": is_real(SHAPES[DEFAULT])}
    results = {"machine": about, "sections": {}, "checks": []}
    if RESULTS.is_file():
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
        same = {key: value for key, value in earlier["machine"].items() if key != "date"}
        if same == {key: value for key, value in about.items() if key != "date"}:
            results = earlier | {"machine": about}
        elif set(bench.sections) != set(SECTIONS):
            sys.exit(f"{RESULTS.name} is of another machine or other versions: a part of a run cannot be put into it")
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
