"""What a trained adapter loses when it is cut to lower ranks: one training at r=64, and its loss at 32, 16, 8 and 4.

    python benchmarks/resize.py                     # the demo: trains once, some minutes on two cores
    python benchmarks/resize.py --experiment smoke  # the same on a tiny model, seconds
    python benchmarks/resize.py --run outputs/…     # of a run that is there
    python benchmarks/resize.py --write             # and puts the table into docs/shipping.md

The loss is that of the run's own validation rows. Beside it stands what training at each rank by itself came to, where
``--train-each`` asks for that: four more trainings, at the same settings but for the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_lightning import resize_adapter
from lora_lightning.adapters.folder import read_peft_config
from lora_lightning.adapters.pairs import of_config
from lora_lightning.cli.run_metrics import run_metrics
from lora_lightning.reports.page.words import bytes_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "shipping.md"
BEGIN, END = "<!-- made by benchmarks/resize.py -->", "<!-- end of it -->"
TRAINED = 64
RANKS = (32, 16, 8, 4)


def train(folder: Path, experiment: str, r: int) -> Path:
    """One run of an experiment at a rank, in a process of its own, as anybody would start it."""
    command = [sys.executable, ROOT / "scripts" / "train.py", f"experiment={experiment}", f"lora.r={r}"]
    command += [f"hydra.run.dir={folder}", "print_config=false"]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


def measured(run: Path, places: dict[int, Path]) -> list[dict]:
    """A row for the trained adapter and for each rank that it is cut to."""
    trained = run / "adapter"
    r = read_peft_config(trained)["r"]
    reports = {rank: resize_adapter(trained, place, rank) for rank, place in places.items() if rank < r}
    losses = run_metrics(run, {"base": None, str(r): trained} | {str(rank): places[rank] for rank in reports})
    size = (trained / "adapter_model.safetensors").stat().st_size
    rows = [{"rank": r, "kept": 1.0, "loss": losses[str(r)]["val_loss"], "bytes": size}]
    for rank, report in reports.items():
        size = (places[rank] / "adapter_model.safetensors").stat().st_size
        rows.append({"rank": rank, "kept": report.kept, "loss": losses[str(rank)]["val_loss"], "bytes": size})
    return [*rows, {"rank": 0, "kept": 0.0, "loss": losses["base"]["val_loss"], "bytes": 0}]


def table(rows: list[dict], alone: dict[int, float]) -> str:
    """The rows in Markdown; ``alone`` is the loss of a training at a rank by itself."""
    more = " trained at that rank |" if alone else ""
    lines = [f"| rank | file | of ‖ΔW‖² kept | validation loss |{more}", f"|---|---|---|---|{'---|' if alone else ''}"]
    for row in rows:
        own = f" {alone[row['rank']]:.4f} |" if row["rank"] in alone else " |" if alone else ""
        name = str(row["rank"]) if row["rank"] else "the base alone"
        size = bytes_of(row["bytes"]) if row["rank"] else ""
        kept = f"{row['kept']:.1%}" if row["rank"] else ""
        lines.append(f"| {name} | {size} | {kept} | {row['loss']:.4f} |{own}")
    return "\n".join(lines)


def put(text: str) -> None:
    """Put the table between its marks on the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} lacks the marks {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Train, cut, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="bbc_headlines")
    parser.add_argument("--run", type=Path, help="a run that is there, at any rank")
    parser.add_argument("--train-each", action="store_true", help="train at each of the lower ranks too")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = chosen.run or train(folder / "run", chosen.experiment, TRAINED)
        rows = measured(run, {rank: folder / f"r{rank}" for rank in RANKS})
        alone = {}
        for rank in RANKS if chosen.train_each else ():
            result = train(folder / f"trained-{rank}", chosen.experiment, rank) / "result.json"
            alone[rank] = json.loads(result.read_text(encoding="utf-8"))["val_loss"]
        scale = of_config(read_peft_config(run / "adapter")).scaling()
    what = chosen.run.name if chosen.run else f"experiment={chosen.experiment}"
    text = f"`{what}`, trained once at r={rows[0]['rank']} (scale {scale:g}), one run:\n\n{table(rows, alone)}"
    print(f"\n{text}")
    if chosen.write:
        put(text)


if __name__ == "__main__":
    main()
