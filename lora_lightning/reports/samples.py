"""Texts that the model writes to the same few prompts, before, while and after it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_lightning.reports.texts import printable
from lora_lightning.tasks.generate import evaluating


class _Prompt(Protocol):
    """What is needed of the items of a data module's ``sample_prompts()``."""

    prompt: str
    shown: str
    reference: str | None


class SampleWriter(Callback):
    """Have fixed prompts continued before training, at each validation and after training.

    Works with any module that has ``generate_text(list of prompts) -> list of texts`` and any data module that has
    ``sample_prompts()``; does nothing without them, nor where the model is spread over devices. Writes to the console,
    to two files in the run's folder that are only ever added to, and to TensorBoard and W&B. A resumed run goes on with
    its next validation. The random states and the modes of the modules are left as they were.

    Args:
        every_validation: Whether to write at each validation too.
        filename: The file for people in the run's folder. Beside it lies one for programs, ``.jsonl``: a line each
            time, with ``title``, ``step`` and for each prompt its ``prompt``, ``written`` and ``reference`` (or null).
    """

    def __init__(self, every_validation: bool = True, filename: str = "samples.md") -> None:
        self.every_validation = every_validation
        self.filename = filename
        self._first: list[str] | None = None
        self._latest: tuple[int, list[str]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the untrained model says, unless this run goes on with an earlier one."""
        self._first = self._latest = None
        if trainer.global_step == 0:
            self._write(trainer, pl_module, "Before training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the model says by now."""
        if self.every_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module, f"After {trainer.global_step} steps")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the trained model says."""
        self._write(trainer, pl_module, "After training")

    def _write(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        prompts = _prompts(trainer, pl_module)
        folder = trainer.log_dir  # asks all processes, so not below the next line
        if not prompts or not trainer.is_global_zero:
            return
        step = trainer.global_step
        if self._latest is None or self._latest[0] != step:
            writer: Any = pl_module
            with isolate_rng(), evaluating(pl_module):
                self._latest = (step, writer.generate_text([prompt.prompt for prompt in prompts]))
        texts = self._latest[1]
        file = Path(folder or ".") / self.filename
        _append(file, title, step, prompts, texts)
        _append_record(file.with_suffix(".jsonl"), title, step, prompts, texts)
        _to_loggers(trainer, step, prompts, texts)
        before = self._first if title == "After training" else None
        # The progress bar's own console, if there is one: another would write across the bar.
        console = getattr(trainer.progress_bar_callback, "_console", None) or Console()
        console.print(_table(title, prompts, texts, before))
        self._first = self._first or texts


def _prompts(trainer: Trainer, pl_module: LightningModule) -> Sequence[_Prompt]:
    """The prompts, where there are any and one process alone can run the model."""
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    source: Any = getattr(trainer, "datamodule", None)
    if not whole or not hasattr(pl_module, "generate_text") or not hasattr(source, "sample_prompts"):
        return []
    with isolate_rng():
        return list(source.sample_prompts())


def _append(path: Path, title: str, step: int, prompts: Sequence[_Prompt], texts: list[str]) -> None:
    parts = [f"## {title} (step {step})"]
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        parts += [f"### {number}", _quoted(prompt.shown), f"**Written:** {text or '(nothing)'}"]
        if prompt.reference is not None:
            parts.append(f"**Reference:** {prompt.reference}")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(("# Samples\n\n" if new else "") + "\n\n".join(parts) + "\n\n")


def _append_record(path: Path, title: str, step: int, prompts: Sequence[_Prompt], texts: list[str]) -> None:
    samples = [
        {"prompt": prompt.shown, "written": text, "reference": prompt.reference}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"title": title, "step": step, "samples": samples}) + "\n")


def _to_loggers(trainer: Trainer, step: int, prompts: Sequence[_Prompt], texts: list[str]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            rows = [[step, item.shown, text, item.reference] for item, text in zip(prompts, texts, strict=True)]
            logger.log_table("samples", columns=["step", "prompt", "written", "reference"], data=rows)
        elif isinstance(logger, TensorBoardLogger):
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
                markdown = f"{_quoted(prompt.shown)}\n\n{text}\n\n*Reference:* {prompt.reference}"
                logger.experiment.add_text(f"samples/{number}", markdown, step)


def _table(title: str, prompts: Sequence[_Prompt], texts: list[str], before: list[str] | None) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True, expand=True)
    columns = [("Prompt", [_shortened(prompt.shown) for prompt in prompts], "dim")]
    if before is not None:
        columns.append(("Before", before, ""))
    columns.append(("Written" if before is None else "After", texts, "bold"))
    columns.append(("Reference", [prompt.reference or "" for prompt in prompts], "italic"))
    for heading, _, style in columns:
        table.add_column(heading, style=style, ratio=1)
    for cells in zip(*(cells for _, cells, _ in columns), strict=True):
        table.add_row(*(Text(printable(cell)) for cell in cells))  # Text: square brackets in a text are no markup
    return table


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())
