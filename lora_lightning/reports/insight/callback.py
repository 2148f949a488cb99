"""The callback that looks at the adapters at each validation, and tells what it sees."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lora_lightning.adapters.written import first_process_writes
from lora_lightning.reports.insight.measure import (
    Layers,
    base_norms,
    gathered,
    gradient_norms,
    is_spread,
    left_out,
    measured,
    names_below,
    watched_layers,
)
from lora_lightning.reports.insight.rows import InsightRow, append_rows, go_on

_DRAWING = 0.005  # of the time at most

Summary = Callable[[Sequence[float]], float]
_LOGGED: dict[str, dict[str, Summary]] = {
    "effective_rank": {"mean": fmean, "min": min, "max": max},
    "stable_rank": {"mean": fmean},
    "rank_used": {"mean": fmean, "max": max},
    "relative_norm": {"mean": fmean, "min": min, "max": max},
    "grad_norm_A": {"mean": fmean, "max": max},
    "grad_norm_B": {"mean": fmean, "max": max},
}


class InsightCallback(Callback):
    """At each validation and at the end, look at every adapted layer: how much of its rank it uses, how far it went.

    A row for each layer goes to ``insight.csv`` in the run's folder (see :class:`InsightRow`), means and extremes to
    the loggers as ``insight/…``, and a picture of all layers to ``insight.png``, W&B and TensorBoard. Layers that could
    have an adapter and have none have a row too, with ``r`` 0. A resumed run goes on with its file. Nothing happens in
    other steps than the last before a validation, whose gradients' norms are kept; where it is not known beforehand
    which that is (early stopping), the row says nothing of gradients.

    The picture is drawn at the end, and at a validation where drawing takes less than half a percent of the time that
    has gone by since it was drawn last.

    The first process writes; what goes wrong there is a warning, and the run goes on. Adapters that FSDP2 or tensor
    parallelism has spread are gathered, which all processes do together. Where an engine has flattened the base (FSDP)
    or split the adapters (ZeRO-3), what would need them is left out. Nothing happens in a ``fast_dev_run``.

    Args:
        picture: Whether to draw ``insight.png``.
        filename: The name of the file in the run's folder, less ``.csv`` and ``.png``.
    """

    def __init__(self, picture: bool = True, filename: str = "insight") -> None:
        self.picture = picture
        self.filename = filename
        self._forget()

    def _forget(self) -> None:
        self._layers: Layers | None = None
        self._norms: dict[str, float | None] | None = None
        self._left_out: list[tuple[str, int]] = []
        self._gradients: tuple[int, list[str], torch.Tensor] | None = None
        self._seen = -1  # the step at which was looked last
        self._rows: list[InsightRow] = []  # that are not drawn yet
        self._warned = False
        self._drawn_at, self._drawing = time.monotonic(), 0.5  # when, and how many seconds it took (or may take)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with an earlier part of this run, or leave its file be."""
        self._forget()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._file(trainer.log_dir, ".csv")
            first_process_writes(path, lambda: go_on(path, trainer.global_step))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the norms of the gradients, in the last step before a validation."""
        if trainer.fast_dev_run or not validates_next(trainer):  # type: ignore[attr-defined]
            return
        if (found := gradient_norms(self._watched(pl_module))) is not None:
            self._gradients = (trainer.global_step + 1, *found)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the layers."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what came out, unless the last validation has seen it, and draw it."""
        self._look(trainer, pl_module)
        if self._rows:
            self._draw(trainer)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if trainer.fast_dev_run or step in (0, self._seen):  # type: ignore[attr-defined]
            return
        self._seen = step
        layers, folder = self._watched(pl_module), trainer.log_dir
        if self._norms is None:
            self._norms = base_norms(layers)
        if not layers or not (trainer.is_global_zero or is_spread(layers)):
            return
        names, norms = (
            self._gradients[1:] if self._gradients is not None and self._gradients[0] == step else ([], torch.empty(0))
        )
        gradients = dict(zip(names, norms.tolist(), strict=True))
        factors = gathered(layers)  # with all processes, so not below the next line
        if trainer.is_global_zero:
            with self._sparing_the_run(f"What was seen at step {step} could not be told"):
                rows = measured(layers, factors, step, self._norms, gradients)
                self._tell(trainer, pl_module, rows, self._file(folder, ".csv"))

    def _tell(self, trainer: Trainer, pl_module: LightningModule, rows: list[InsightRow], path: Path) -> None:
        shown = names_below(pl_module, [row.layer for row in rows] + [name for name, _ in self._left_out])
        step = trainer.global_step
        rows = [InsightRow(**(vars(row) | {"layer": shown[row.layer]})) for row in rows]
        rows += [InsightRow(step, shown[name], r=0, parameters=size) for name, size in self._left_out]
        append_rows(path, rows)
        for logger in trainer.loggers:
            logger.log_metrics(scalars(rows), step=step - 1)  # Lightning's number of the step that was the last
        if self.picture:
            self._rows, self._png = rows, path.with_name(f"{self.filename}.png")
            if self._drawing < _DRAWING * (time.monotonic() - self._drawn_at):
                self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        from lora_lightning.reports.insight.picture import insight_picture, pixels

        began, png = time.monotonic(), self._png
        with self._sparing_the_run(f"The picture {png} could not be drawn"):
            insight_picture(self._rows, png)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("insight", [str(png)])
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image("insight", pixels(png), trainer.global_step, dataformats="HWC")
        self._rows, self._drawn_at = [], time.monotonic()
        self._drawing = self._drawn_at - began

    @contextlib.contextmanager
    def _sparing_the_run(self, trouble: str) -> Iterator[None]:
        """Say once what has gone wrong, and let the run go on: it does not fail for what is seen of it."""
        try:
            yield
        except Exception as error:  # of files, loggers, algebra, matplotlib
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"{trouble}: {error}. Insight warns of this once; the run goes on")

    def _watched(self, pl_module: LightningModule) -> Layers:
        if self._layers is None:
            self._layers = watched_layers(pl_module)
            self._left_out = list(left_out(pl_module))
            if not self._layers:
                rank_zero_info("InsightCallback has nothing to look at: no layer of this model has an adapter")
        return self._layers

    def _file(self, folder: str | None, suffix: str) -> Path:
        return Path(folder or ".") / f"{self.filename}{suffix}"


def validates_next(trainer: Trainer) -> bool:
    """Whether a validation, or the end, comes before another optimizer step; yes where only time will tell."""
    if trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps:
        return True
    every = trainer.val_check_batch  # in batches; None where it is a time
    if every is None or every == float("inf"):
        return every is None
    loop = trainer.fit_loop.epoch_loop
    done = (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx) + 1
    return -done % every < trainer.accumulate_grad_batches


def scalars(rows: Sequence[InsightRow]) -> dict[str, float]:
    """Means and extremes over the layers, by the names under which they are logged."""
    found: dict[str, float] = {}
    for column, ways in _LOGGED.items():
        values = [value for row in rows if (value := getattr(row, column)) is not None]
        if values:
            found |= {f"insight/{column}_{name}": way(values) for name, way in ways.items()}
    return found
