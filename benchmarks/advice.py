"""Whether the advice on the rank is right: trainings that may ask for it, and the same ones with what it says.

    python benchmarks/advice.py                            # the demo: six trainings
    python benchmarks/advice.py experiment=smoke           # the same on a tiny model, a minute or two
    python benchmarks/advice.py --write                    # and puts the table into docs/insight.md
    python benchmarks/advice.py --runs outputs/advice      # keeps the runs, and does not repeat those that are there

A run with r=2 has the least rank that can be judged: where it is told to be short, following the advice has to lower
the loss by more than another seed does, and where it is not, r=16 must not. One with r=64 has more than most: where
that is told, its adapter cut to the rank that is told has to leave the loss as it is, within what another seed makes
of it, and where it is not, one cut to r=16 has to cost more; what training at that rank comes to stands beside it.
What is followed is the override that the run itself has printed; of a run that has printed none, r=16. Another seed
begins and drops otherwise, on the same rows in the same order: which rows are held out changes a loss by more.
"""
# ruff: noqa: E402 - the path comes before the imports

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from benchmarks.page import fill, markdown
from lora_lightning import resize_adapter
from lora_lightning.cli.run_metrics import run_metrics

PAGE = ROOT / "docs" / "insight.md"
COLUMNS = ("run", "validation loss", "what it advised on the rank", "trained so", "cut so", "another seed", "so")
CASES = {"rank saturated": "lora.r=2", "rank unused": "lora.r=64"}
ELSE = "lora.r=16"


def train(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run, as anybody would start it, unless it is there; its ``result.json``."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    command = [sys.executable, ROOT / "scripts" / "train.py", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(result.read_text(encoding="utf-8"))


def cut(run: Path, rank: int) -> float:
    """The validation loss of a run's adapter cut to a lower rank."""
    with tempfile.TemporaryDirectory() as place:
        resize_adapter(run / "adapter", folder := Path(place) / "cut", rank)
        return run_metrics(run, {"cut": folder})["cut"]["val_loss"]


def followed(folder: Path, rule: str, overrides: list[str]) -> list[str]:
    """A row: a run, what it advised, the run that follows, and the first one with another seed."""
    first = train(folder / "first", overrides)
    said = next((each["override"] for each in first["advice"] if each["rule"] == rule), None)
    settings = shlex.split(said or ELSE)
    then = train(folder / "second", [*overrides, *settings])["val_loss"]
    again = train(folder / "again", [*overrides, "seed=1", "data.seed=0"])["val_loss"]
    loss = first["val_loss"]
    lowers = rule == "rank unused"
    cut_to = cut(folder / "first", int(settings[0].removeprefix("lora.r="))) if lowers else None
    change = (cut_to if lowers else then) - loss
    return [
        f"`{_shown(overrides)}`",
        f"{loss:.4f}",
        f"{rule}: `{said}`" if said else f"nothing (`{ELSE}` was done)",
        f"{then:.4f} ({then - loss:+.4f})",
        "" if cut_to is None else f"{cut_to:.4f} ({change:+.4f})",
        f"{again:.4f} ({again - loss:+.4f})",
        "right" if _is_right(rule, said is not None, change, abs(again - loss)) else "**wrong**",
    ]


def _is_right(rule: str, spoken: bool, change: float, noise: float) -> bool:
    """Whether the other rank has done to the loss what the run has said of it, or has not by being silent."""
    return spoken == (change < -noise if rule == "rank saturated" else change <= noise)


def main() -> None:
    """Train, follow, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--runs", type=Path, help="where the runs are kept; else they are thrown away")
    parser.add_argument("overrides", nargs="*", help="of all trainings")
    chosen = parser.parse_args()
    common = ["callbacks.samples=null", *chosen.overrides]
    with tempfile.TemporaryDirectory() as place:
        runs = chosen.runs or Path(place)
        rows = [followed(runs / rule.replace(" ", "_"), rule, [*common, rank]) for rule, rank in CASES.items()]
    text = markdown(COLUMNS, rows)
    print(f"\n{text}")
    if chosen.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "advice", text), encoding="utf-8")


def _shown(overrides: list[str]) -> str:
    return " ".join(each for each in overrides if each != "callbacks.samples=null")


if __name__ == "__main__":
    main()
