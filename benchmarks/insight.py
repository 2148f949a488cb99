"""What it costs to look at the adapters at each validation: stretches of one training, with and without, in turns.

    python benchmarks/insight.py                       # the demo: 8 stretches of 30 steps and a validation each
    python benchmarks/insight.py --steps 3 --stretches 4 experiment=smoke    # to see that it works
    python benchmarks/insight.py --write               # and puts the figures into docs/insight.md

Stretches go one after another in one process: the callback looks in every other one. Told are the ratio of a stretch
with it to the one before without it, and the time inside the callback itself, as a share of a stretch. The second is
the sharper figure: what a stretch takes varies by more than the callback does.
"""
# ruff: noqa: E402 - the path comes before the imports

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import LightningModule, Trainer, seed_everything

from benchmarks.page import fill
from lora_lightning.cli.build import make_callbacks, make_loggers, make_parts, make_trainer, prepare
from lora_lightning.reports import InsightCallback

PAGE = ROOT / "docs" / "insight.md"
TARGET = 1.01


class Turns(InsightCallback):
    """Looks in every other stretch, and knows what each took.

    Attributes:
        stretches: Seconds from the end of one validation to the end of the next.
        inside: Seconds of that in the callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stretches: list[float] = []
        self.inside: list[float] = []
        self._began: float | None = None

    @property
    def looks(self) -> bool:
        """In this stretch."""
        return len(self.stretches) % 2 == 1

    def on_before_optimizer_step(self, *args: Any) -> None:
        """As it is, in every other stretch."""
        self._timed(super().on_before_optimizer_step, *args)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A stretch is over."""
        if trainer.sanity_checking:
            return
        self._timed(super().on_validation_end, trainer, pl_module)
        now = time.perf_counter()
        if self._began is not None:
            self.stretches.append(now - self._began)
            self.inside.append(self._spent)
        self._began, self._spent = now, 0.0

    def on_train_end(self, *args: Any) -> None:
        """Nothing: the last stretch has ended with a validation."""

    _spent = 0.0

    def _timed(self, hook: Any, *args: Any) -> None:
        if not self.looks:
            return
        before = time.perf_counter()
        hook(*args)
        self._spent += time.perf_counter() - before


def measured(overrides: list[str], steps: int, stretches: int) -> Turns:
    """Train in turns. The first stretch, in which memory is laid out, is not counted, and one is without for each."""
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder, initialize_config_module("lora_lightning.conf", version_base="1.3"):
        cfg = compose(
            "train",
            overrides=[
                *overrides,
                "callbacks=minimal",
                "callbacks.checkpoint=null",
                f"paths.output_dir={folder}",
                f"trainer.max_steps={steps * (stretches + 1)}",
                f"trainer.val_check_interval={steps}",
                "trainer.num_sanity_val_steps=0",
            ],
        )
        prepare(cfg)
        seed_everything(cfg.seed, verbose=False)
        task, data = make_parts(cfg)
        trainer = make_trainer(cfg, [*make_callbacks(cfg), turns], make_loggers(cfg))
        trainer.fit(task, datamodule=data)
    return turns


def table(turns: Turns, overrides: list[str], steps: int) -> str:
    """The figures in Markdown."""
    without, with_it = turns.stretches[::2], turns.stretches[1::2]
    inside = turns.inside[1::2]
    pairs = [after / before for before, after in zip(without, with_it, strict=True)]
    share = median(spent / (whole - spent) for spent, whole in zip(inside, with_it, strict=True))
    lines = [
        f"`{' '.join(overrides) or 'experiment=bbc_headlines'}`, {len(pairs)} stretches of {steps} steps and a "
        f"validation each way, {torch.get_num_threads()} threads:",
        "",
        "| | |",
        "|---|---|",
        f"| a stretch without | {median(without):.2f} s |",
        f"| a stretch with | {median(with_it):.2f} s |",
        f"| ratio, stretch by stretch | {median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f}) |",
        f"| time inside the callback, each time | {median(inside):.3f} s (the first: {inside[0]:.3f} s) |",
        f"| ratio by that | {1 + share:.4f} (target ≤ {TARGET:g}) |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of a stretch")
    parser.add_argument("--stretches", type=int, default=8, help="in all, an even number")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {PAGE.relative_to(ROOT)}")
    parser.add_argument("overrides", nargs="*", help="of the training")
    chosen = parser.parse_args()
    if chosen.stretches % 2 or chosen.stretches < 2:
        parser.error(f"--stretches must be an even number, got {chosen.stretches}")
    text = table(measured(chosen.overrides, chosen.steps, chosen.stretches), chosen.overrides, chosen.steps)
    print(f"\n{text}")
    if chosen.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(fill(page, "cost", text), encoding="utf-8")


if __name__ == "__main__":
    main()
