"""The sections of the CPU benchmark: what is run in each, and which rows of the table it fills."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import contenders as c
from benchmarks.jobs import Injections, InjectionsWithoutMemory, Steps, Trained
from benchmarks.measure import MB, interleave, ratios, spread
from benchmarks.shapes import HEADLINES, LLAMA_8B_LAYERS, WHOLE_STORIES

if TYPE_CHECKING:
    from benchmarks.bench import Bench

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, TUNED, OURS, FLOOR = "PEFT as shipped", "PEFT tuned", "ours", "frozen floor"
NO_DROPOUT = ", no dropout"


def step(bench: Bench) -> None:
    """The step, every token supervised, its saved tensors and its profile."""
    task = bench.task()
    specs = {
        SHIPPED: c.PEFT_SHIPPED,
        SHIPPED + NO_DROPOUT: replace(c.PEFT_SHIPPED, dropout=0.0),
        TUNED: c.PEFT_TUNED,
        OURS: c.OURS_ON_CPU,
        OURS + NO_DROPOUT: replace(c.OURS_ON_CPU, dropout=0.0),
        FLOOR: c.FLOOR_ON_CPU,
    }
    with bench.steps(specs, task) as made, bench.workers({"in a Trainer": (Trained, c.OURS_ON_CPU, task)}) as trained:
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
    specs = {
        SHIPPED: c.PEFT_SHIPPED,
        TUNED: c.PEFT_TUNED,
        "random order": replace(c.OURS_ON_CPU, grouped=False),
        OURS: c.OURS_ON_CPU,
    }
    # Two rows a batch: four processes that train on whole stories share the memory of one machine.
    with bench.steps(specs, bench.task(rows=2, chats=WHOLE_STORIES)) as made:
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
    specs = {SHIPPED: c.PEFT_SHIPPED, TUNED: c.PEFT_TUNED, OURS: c.OURS_ON_CPU, FLOOR: c.FLOOR_ON_CPU}
    for name, spec in bench.able(specs).items():
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
    specs = {"ours, DoRA": replace(c.OURS_ON_CPU, dora=True), "PEFT's DoRA": replace(c.PEFT_SHIPPED, dora=True)}
    with bench.steps(specs, bench.task()) as made:
        times = bench.time(made, rounds=max(1, round(0.6 * bench.rounds))) if len(made) == len(specs) else {}
    bench.told["dora"] = _speeds(times)
    bench.compare(times, *specs, "DoRA step against PEFT's DoRA", target=0.4)


def injection(bench: Bench) -> None:
    """Injection into 896 small linear layers, and into those of Llama-8B without memory."""
    layers = 2 if bench.quick else 128
    specs = bench.able({OURS: c.OURS, SHIPPED: c.PEFT_SHIPPED})
    with bench.workers({name: (Injections, spec, layers) for name, spec in specs.items()}) as made:
        times = bench.time(made)
    bench.row(f"injection, {7 * layers} modules", spread(times[OURS]), 0.2, unit="s")
    bench.compare(times, OURS, SHIPPED, f"injection, {7 * layers} modules, against PEFT", target=0.1)
    with bench.workers({"both": (InjectionsWithoutMemory, 1 if bench.quick else None)}) as made:
        turns = {name: (lambda n, spec=spec: made["both"].call("turn", n, spec)) for name, spec in specs.items()}
        times = interleave(turns, bench.rounds)
    what = "injection on the meta device, Llama-8B's 224 modules, process time"
    bench.compare(times, OURS, SHIPPED, f"{what}, against PEFT", target=0.1)


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
    specs = {SHIPPED: c.PEFT_SHIPPED, TUNED: c.PEFT_TUNED, OURS: c.OURS_ON_CPU, FLOOR: c.FLOOR_ON_CPU}
    with bench.steps(specs, bench.task("qwen3-0.6b", rows=2, layers=2)) as made:
        times = bench.time(made)
    bench.told["shapes"] = {"Qwen3-0.6B, two layers, 2×128": _speeds(times)}
    for against in (SHIPPED, TUNED, FLOOR):
        bench.compare(times, OURS, against, f"Qwen3-0.6B shape, two layers, 2×128, against {against}")


def layers(bench: Bench) -> None:
    """Llama-8B's linear layers, each alone with 256 tokens."""
    tasks = [bench.task(rows=1, tokens=256, sides=sides) for sides in LLAMA_8B_LAYERS]
    with bench.steps({SHIPPED: c.PEFT_SHIPPED, OURS: c.OURS_ON_CPU, FLOOR: c.FLOOR_ON_CPU}, *tasks) as made:
        for number, (d_in, d_out) in enumerate(LLAMA_8B_LAYERS):
            times = bench.time(made, number)
            for against in (SHIPPED, FLOOR):
                bench.compare(times, OURS, against, f"a linear layer {d_in}→{d_out} alone against {against}")


# In the order of a run.
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
