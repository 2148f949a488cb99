"""What stands on the screen while a run goes on: the first table, and a bar that knows when it ends."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from lora_lightning.callback import LoraCallback
from lora_lightning.reports import first_table


class RunProgress(RichProgressBar):
    """Lightning's bar with loss, tokens/s and the time that is left, which counts to ``max_steps`` if that comes first.

    The validation ahead of training is called what it is here: a measurement of the untrained model.
    """

    def __init__(self) -> None:
        super().__init__(leave=True)

    @property
    def sanity_check_description(self) -> str:
        """The bar's label ahead of training."""
        return "Before training"

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, or those that are left to ``max_steps`` if they are fewer."""
        batches = super().total_train_batches
        trainer = self.trainer
        if trainer.max_steps < 0:
            return batches
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # of this epoch, where a run is resumed in it
        left = max(0, trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(batches, begun + left)


class Announcement(Callback):
    """Prints the first table once the adapter is in place, and remembers where the last validation was.

    Args:
        quiet: Print no table.

    Attributes:
        validated_at: The optimizer step after which the last validation of the fit ran, or None.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.validated_at: int | None = None
        self._announced = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce ahead of the validation before training."""
        self._announce(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce where there was no such validation."""
        self._announce(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step."""
        if not trainer.sanity_checking:
            self.validated_at = trainer.global_step

    def _announce(self, trainer: Trainer) -> None:
        if self._announced or self.quiet:
            return
        self._announced = True
        report = next((each.report for each in trainer.callbacks if isinstance(each, LoraCallback)), None)  # type: ignore[attr-defined]
        steps = trainer.estimated_stepping_batches  # may have to load data, on every rank
        if report is None or not trainer.is_global_zero:
            return
        rates = sorted({group["lr"] for each in trainer.optimizers for group in each.param_groups})
        schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
        if schedules:  # the rate in force is that of the first step of the warm-up
            rates = sorted({rate for each in schedules for rate in getattr(each, "base_lrs", rates)})
        table = first_table(
            report,
            batch_size=getattr(getattr(trainer, "datamodule", None), "batch_size", None),
            accumulate=trainer.accumulate_grad_batches,
            devices=trainer.world_size,
            steps=f"{steps:,}" if math.isfinite(steps) and steps > 0 else None,
            learning_rate=", ".join(f"{rate:.3g}" for rate in rates) or None,
            device=f"{trainer.strategy.root_device.type}, {trainer.precision}",
        )
        Console().print(table)
