"""LoRA steps on one GPU, in half precision: ours, PEFT as shipped and tuned, Liger, Unsloth, the frozen floor.

    python benchmarks/cuda.py --minutes 6 --out cuda.json        # needs torch and transformers; peft for PEFT's rows
    python benchmarks/cuda.py --device cpu --quick               # tries the script itself, in seconds

The important rows come first; each is printed and written as soon as it is there, so that a run that is cut off leaves
what it has. Copied to ``benchmarks/results/cuda.json``, the file fills docs/performance.md.
Contenders take turns in one process over one copy of the base weights; memory is what torch's allocator holds at most
for a contender by itself, the base included. Libraries that change transformers for the whole process (Liger, Unsloth)
run in one of their own, after the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import contenders as c
from benchmarks.check import difference, reference_gradients
from benchmarks.measure import MB, interleave, machine, profile, ratios, spread, timed
from benchmarks.shapes import SHAPES, Batch, build_model, full_batch, to_device, twin

SCRIPT = Path(__file__).with_name("cuda.py")
SHIPPED, TUNED, OURS, OURS_PLAIN, FLOOR = "PEFT as shipped", "PEFT tuned", "ours", "ours, no dropout", "floor"
# (numerator, denominator): the ratio that is told. Targets stand beside those of the main row only.
PAIRS = [(OURS, SHIPPED), (OURS, TUNED), (OURS_PLAIN, FLOOR), (OURS, FLOOR), (OURS, "Liger + PEFT")]
PAIRS += [(OURS_PLAIN, "Unsloth"), ("ours, DoRA", "PEFT's DoRA")]
TIME_TARGETS = {
    (OURS, SHIPPED): 0.75,
    (OURS, TUNED): 0.85,
    (OURS_PLAIN, FLOOR): 1.06,
    ("ours, DoRA", "PEFT's DoRA"): 0.5,
}
MEMORY_TARGETS = {(OURS, SHIPPED): 0.6}
FP32_LIMIT, HALF_LIMIT = 1e-3, 5e-2  # how far from float64 a gradient may be


@dataclass(frozen=True)
class Row:
    """One line of the table: who is compared on what."""

    title: str
    shape: str
    rows: int
    tokens: int
    contenders: dict[str, c.Spec]
    supervised: float = 1.0
    layers: int | None = None
    targets: bool = False
    profiled: bool = False
    """Where the time goes, instead of how long it takes."""


def _with(**changes: Any) -> dict[str, c.Spec]:
    """The usual contenders with some settings changed in all of them."""
    usual = {
        OURS: c.OURS,
        SHIPPED: c.PEFT_SHIPPED,
        TUNED: c.PEFT_TUNED,
        OURS_PLAIN: replace(c.OURS, dropout=0.0),
        FLOOR: c.FLOOR,
    }
    return {name: replace(spec, **changes) for name, spec in usual.items()}


FULL = _with() | {"Liger + PEFT": c.LIGER, "Unsloth": c.UNSLOTH}
DORA = {"ours, DoRA": replace(c.OURS, dora=True), "PEFT's DoRA": replace(c.PEFT_SHIPPED, dora=True)}
FEW = {name: FULL[name] for name in (OURS, SHIPPED, FLOOR)}
ROWS = [
    Row("1B, 4×2048, r=16", "llama-1b", 4, 2048, FULL, targets=True),
    Row("1B, 4×2048, r=16, DoRA", "llama-1b", 4, 2048, DORA, targets=True),
    Row("1B, 4×2048, a tenth supervised", "llama-1b", 4, 2048, _with(), supervised=0.1),
    Row("1B, 4×2048, profiles", "llama-1b", 4, 2048, FEW | {TUNED: c.PEFT_TUNED}, profiled=True),
    Row("8B, 1×2048, r=16", "llama-8b", 1, 2048, _with()),
    Row("0.6B, 8×512, r=16", "qwen3-0.6b", 8, 512, _with()),
    Row("1B, 1×8192, r=16", "llama-1b", 1, 8192, FEW),
    Row("1B, 1×512, r=16", "llama-1b", 1, 512, FEW),
    Row("1B, 4×2048, r=256", "llama-1b", 4, 2048, {name: _with(r=256)[name] for name in FEW}),
    Row("1B, 4×2048, r=8", "llama-1b", 4, 2048, {name: _with(r=8)[name] for name in FEW}),
    Row("1B, 4×2048, checkpointing", "llama-1b", 4, 2048, {name: _with(checkpointing=True)[name] for name in FEW}),
    Row("8B, 1×8192, r=64, checkpointing", "llama-8b", 1, 8192, _with(r=64, checkpointing=True)),
    Row("0.6B, 1×8192, r=16", "qwen3-0.6b", 1, 8192, FEW),
    Row("1B, 4×2048, r=64", "llama-1b", 4, 2048, {name: _with(r=64)[name] for name in FEW}),
]


@dataclass
class Bench:
    """A run: its settings, the base model in memory, and what it has found."""

    device: str
    quick: bool
    rounds: int
    deadline: float
    layers_8b: int | None
    out: Path | None
    alone: str | None = None
    """The only contender, in a process that it has for itself."""
    told: dict[str, Any] = field(default_factory=dict)
    base: nn.Module | None = None
    base_of: Any = None

    def write(self) -> None:
        """Put what there is so far into the file; a cut-off run leaves the file whole."""
        if self.out is not None:
            aside = self.out.with_name(self.out.name + ".part")
            aside.write_text(json.dumps(self.told, indent=1) + "\n", encoding="utf-8")
            aside.replace(self.out)

    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def model(self, row: Row) -> nn.Module:
        """The row's base; one at a time is kept."""
        layers = self.layers_8b if row.shape == "llama-8b" else row.layers
        if self.base_of != (row.shape, layers):
            self.base = None
            self.clear()
            shape = SHAPES["tiny"] if self.quick else SHAPES[row.shape].cut(layers)
            self.base = build_model(shape, device=self.device, dtype=torch.bfloat16)
            self.base_of = (row.shape, layers)
        assert self.base is not None
        return self.base

    def batch(self, row: Row, model: nn.Module) -> Batch:
        """The row's batch, on the device."""
        rows, tokens = (2, 16) if self.quick else (row.rows, row.tokens)
        vocabulary = model.config.vocab_size
        return to_device(full_batch(vocabulary, rows, tokens, supervised=row.supervised), self.device)

    def clear(self) -> None:
        """Let go of what is no longer used."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    # ---- one row

    def run(self, row: Row) -> dict[str, Any]:
        """Measure one row; a contender that cannot be run says why, and the others go on."""
        base = self.model(row)
        batch = self.batch(row, base)
        built: dict[str, c.Contender] = {}
        told: dict[str, dict[str, Any]] = {}
        for name, spec in row.contenders.items():
            if not self.alone and c.changes_all(spec):
                continue  # later, in a process of its own
            told[name] = self._try(lambda spec=spec, name=name: self._build(spec, name, base, batch, built))
        result = {"title": row.title, "shape": row.shape, "tokens": batch["input_ids"].numel(), "contenders": told}
        try:
            if row.profiled:
                for name, one in built.items():
                    told[name]["profile"] = profile(lambda one=one: one.step(batch), self.device)
            else:
                self._time(row, built, batch, result)
        finally:
            built.clear()
            self.clear()
        if not self.alone:
            for name, spec in row.contenders.items():
                if c.changes_all(spec):
                    told[name] = {"not_run": c.why_not(spec)} if c.why_not(spec) else self._apart(row, name)
            self._compare_apart(row, told, result)
        return result

    def _apart(self, row: Row, name: str) -> dict[str, Any]:
        """A contender that changes the libraries of its process, measured in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "alone.json"
            command = [sys.executable, str(SCRIPT), "--alone", name, "--only", row.title, "--out", str(out)]
            command += ["--rounds", str(self.rounds), "--device", self.device, *(["--quick"] if self.quick else [])]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if not out.exists():
                return {"not_run": ended.stderr.strip().splitlines()[-1][:200] if ended.stderr.strip() else "it ended"}
            told = json.loads(out.read_text(encoding="utf-8"))["rows"][0]["contenders"]
            return next(iter(told.values()))

    def _compare_apart(self, row: Row, told: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
        for of, against in PAIRS:
            if against in told and "seconds" in told.get(of, {}) and "seconds" in told[against]:
                if not c.changes_all(row.contenders[against]):
                    continue
                ratio = told[of]["seconds"]["median"] / told[against]["seconds"]["median"]
                time_ratio = {"median": ratio, "low": ratio, "high": ratio, "n": told[of]["seconds"]["n"]}
                result.setdefault("ratios", []).append(
                    {
                        "of": of,
                        "against": against,
                        "time": time_ratio,
                        "time_target": None,
                        "memory": _memory_ratio(told, of, against),
                        "memory_target": None,
                    }
                )

    def tried(self, row: Row) -> dict[str, Any]:
        """Measure one row; what breaks it is told in its place, and the base is made anew for the next."""
        told = self._try(lambda: self.run(row))
        if "not_run" in told:
            self.base, self.base_of = None, None
            self.clear()
            return {"title": row.title, "contenders": {"all": told}}
        return told

    def _try(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return run()
        except torch.OutOfMemoryError:
            self.clear()
            return {"not_run": "out of memory"}
        except Exception as error:  # another library's failure is a figure too: it must not end the run
            self.clear()
            return {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}

    def _build(
        self, spec: c.Spec, name: str, base: nn.Module, batch: Batch, built: dict[str, c.Contender]
    ) -> dict[str, Any]:
        if reason := c.why_not(spec):
            return {"not_run": reason}
        before = torch.cuda.memory_allocated() if self.device != "cpu" else 0
        one = c.Contender(spec, twin(base))
        one.step(batch)  # optimizer states and kernels are made at the first step
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in one.trained})
        told: dict[str, Any] = {"trained": sum(p.numel() for p in one.trained), "trained_dtypes": dtypes}
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            one.step(batch)
            torch.cuda.synchronize()
            weights = sum(p.numel() * p.element_size() for p in base.parameters())
            told["memory"] = weights + torch.cuda.max_memory_allocated() - before
        built[name] = one
        return told

    def _time(self, row: Row, built: dict[str, c.Contender], batch: Batch, result: dict[str, Any]) -> None:
        told = result["contenders"]
        slice_end = time.monotonic() + min(45.0, max(5.0, self.left()))
        turns = {
            name: (lambda number, one=one: timed(lambda: one.step(batch), self.device)) for name, one in built.items()
        }
        times = interleave(turns, self.rounds, warmup=2, go_on=lambda: time.monotonic() < slice_end)
        for name, seconds in times.items():
            told[name]["seconds"] = spread(seconds)
            told[name]["tokens_per_second"] = round(result["tokens"] / told[name]["seconds"]["median"])
        result["ratios"] = [
            {
                "of": of,
                "against": against,
                "time": ratios(times, of, against),
                "time_target": TIME_TARGETS.get((of, against)) if row.targets else None,
                "memory": _memory_ratio(told, of, against),
                "memory_target": MEMORY_TARGETS.get((of, against)) if row.targets else None,
            }
            for of, against in PAIRS
            if of in times and against in times
        ]

    # ---- before anything is timed

    def check(self) -> bool:
        """Gradients of all that will be timed against float64, on two layers of the 1B shape; True where right."""
        shape = SHAPES["tiny"] if self.quick else SHAPES["llama-1b"].cut(2)
        specs = FULL | DORA
        found, right = [], True
        for dtype, limit in ((torch.float32, FP32_LIMIT), (torch.bfloat16, HALF_LIMIT)):
            base = build_model(shape, device=self.device, dtype=dtype)
            batch = to_device(full_batch(base.config.vocab_size, 2, 48, supervised=0.5), self.device)
            for name, spec in specs.items():
                if spec.layer == "none" or c.changes_all(spec) or c.why_not(spec):
                    continue
                kind = {"contender": name, "dtype": str(dtype).removeprefix("torch.")}
                told = self._try(lambda spec=spec, base=base, batch=batch: self._error_of(spec, base, batch))
                found.append(kind | told)
                # A rival's error is told, ours ends the run with a failure.
                right &= told.get("error", math.inf) <= limit or spec.layer != "ours"
                text = f"{told['error']:.1e} from float64" if "error" in told else f"not run: {told['not_run']}"
                print(f"check: {name}, {kind['dtype']}: {text} (limit {limit:g})", flush=True)
        self.told["check"] = {"found": found, "right": right, "limits": {"float32": FP32_LIMIT, "bfloat16": HALF_LIMIT}}
        self.clear()
        return right

    def _error_of(self, spec: c.Spec, base: nn.Module, batch: Batch) -> dict[str, Any]:
        one = c.Contender(spec, twin(base))
        wanted = reference_gradients(base, one.adapters(), batch)
        return {"error": difference(one.gradients(batch), wanted)}


def _memory_ratio(told: dict[str, dict[str, Any]], of: str, against: str) -> float | None:
    mine, theirs = told[of].get("memory"), told[against].get("memory")
    return mine / theirs if mine and theirs else None


def tell(result: dict[str, Any]) -> None:
    """Print one row."""
    print(f"\n{result['title']}", flush=True)
    for name, told in result["contenders"].items():
        if "not_run" in told:
            print(f"  {name:18} not run: {told['not_run']}")
        elif "profile" in told:
            ops = ", ".join(f"{op['op']} {op['share']:.0%}" for op in told["profile"]["ops"][:8])
            print(f"  {name:18} {told['profile']['seconds'] * 1e3:8.1f} ms: {ops}")
        else:
            seconds = told["seconds"]
            memory = f"{told['memory'] / MB:9.0f} MB" if "memory" in told else ""
            print(
                f"  {name:18} {seconds['median'] * 1e3:8.1f} ms ({seconds['low'] * 1e3:.1f} to "
                f"{seconds['high'] * 1e3:.1f}, n={seconds['n']}) {told['tokens_per_second']:8,} tokens/s {memory}"
            )
    for pair in result.get("ratios", []):
        target = f" (target {pair['time_target']})" if pair["time_target"] else ""
        memory = f", memory {pair['memory']:.3f}" if pair["memory"] else ""
        memory += f" (target {pair['memory_target']})" if pair["memory_target"] else ""
        print(f"  {pair['of']} / {pair['against']}: {pair['time']['median']:.3f}{target}{memory}")
    sys.stdout.flush()


def main() -> None:
    """Check, then measure row after row until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="no row is begun after that")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender in a row")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each row")
    parser.add_argument("--only", nargs="+", help="rows whose title has one of these in it")
    parser.add_argument("--layers-8b", type=int, help="so many layers of the 8B shape, where all do not fit")
    parser.add_argument("--alone", help="one contender, without checks: how the script calls itself")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model in place of each")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("No GPU is to be seen. `--device cpu --quick` tries the script itself.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.backends.cuda.matmul.allow_tf32 = False  # the check in float32 is to be one; half precision has no TF32
    rounds = 2 if args.quick else args.rounds
    deadline = time.monotonic() + 60 * args.minutes
    bench = Bench(args.device, args.quick, rounds, deadline, args.layers_8b, args.out, args.alone)
    bench.told = {"machine": machine(), "minutes": args.minutes, "rows": []}
    right = args.alone is not None or bench.check()
    bench.write()
    for row in ROWS:
        if args.alone:
            row = replace(
                row, contenders={args.alone: row.contenders[args.alone]} if args.alone in row.contenders else {}
            )
        titled = args.only is None or any(word == row.title if args.alone else word in row.title for word in args.only)
        if not titled:
            continue
        if bench.left() < 5:
            print(f"not begun, the time is up: {row.title}", flush=True)
            bench.told.setdefault("not_begun", []).append(row.title)
            bench.write()
            continue
        result = bench.tried(row)
        tell(result)
        bench.told["rows"].append(result)
        bench.write()
    if not right:
        sys.exit("Gradients are not those of float64: see the checks above.")
