"""Whether the advice on the rank is right: trainings that ask for it, and the same ones with what it says.

    python benchmarks/advice.py                            # the demo: five trainings
    python benchmarks/advice.py experiment=smoke           # the same on a tiny model, a minute
    python benchmarks/advice.py --write                    # and puts the table into docs/insight.md

A run with r=1 is starved: following the advice is to lower its loss. One with r=64 has more than it needs: following
the advice is to leave the loss as it is, within what another seed makes of it. What is followed is the override that
the run itself has printed, whatever it is.
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

PAGE = ROOT / "docs" / "insight.md"
COLUMNS = ("run", "validation loss", "what it advised on the rank", "loss with that", "difference")
CASES = {"rank saturated": "lora.r=1", "rank unused": "lora.r=64"}


def train(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run, as anybody would start it; its ``result.json``."""
    command = [sys.executable, ROOT / "scripts" / "train.py", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def followed(folder: Path, rule: str, overrides: list[str]) -> tuple[list[str], float]:
    """A row: a run, what it advised, and the run that follows; and the loss of the first."""
    first = train(folder / "first", overrides)
    said = next((each["override"] for each in first["advice"] if each["rule"] == rule), None)
    loss = first["val_loss"]
    if said is None:
        return [f"`{_shown(overrides)}`", f"{loss:.4f}", "nothing", "", ""], loss
    second = train(folder / "second", [*overrides, *shlex.split(said)])["val_loss"]
    return [f"`{_shown(overrides)}`", f"{loss:.4f}", f"`{said}`", f"{second:.4f}", f"{second - loss:+.4f}"], loss


def main() -> None:
    """Train, follow, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("overrides", nargs="*", help="of all trainings")
    chosen = parser.parse_args()
    common = ["callbacks.samples=null", *chosen.overrides]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for rule, rank in CASES.items():
            row, loss = followed(Path(place) / rule.replace(" ", "_"), rule, [*common, rank])
            rows.append(row)
        again = train(Path(place) / "noise", [*common, CASES["rank unused"], "seed=1"])["val_loss"]
    rows.append([f"`{_shown([*common, CASES['rank unused']])}`", f"{loss:.4f}", "another seed", f"{again:.4f}",
                 f"{again - loss:+.4f}"])  # fmt: skip
    text = markdown(COLUMNS, rows)
    print(f"\n{text}")
    if chosen.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "advice", text), encoding="utf-8")


def _shown(overrides: list[str]) -> str:
    return " ".join(each for each in overrides if each != "callbacks.samples=null")


if __name__ == "__main__":
    main()
