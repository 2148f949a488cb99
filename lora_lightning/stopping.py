"""A run that is told to end saves first: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, answered between two steps."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.utilities.exceptions import SIGTERMException

_SIGNALS = [
    number
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    if (number := getattr(signal, name, None)) is not None  # Windows has the first two
]
_ONE_INTERRUPT = 1.0  # seconds within which Ctrl-C may arrive twice, by way of a launcher
_PATIENCE = 20.0  # seconds that processes started by this one have to end by themselves


class SaveOnSignal(pl.Callback):
    """Lets a fit that gets a signal finish its optimizer step, save ``stopped.ckpt`` and end.

    A handler only notes the signal. At the end of the optimizer step (of the validation, if one is due) all processes
    agree on whether any of them has got one, save, and then the handlers that were there before are called, submitit's
    and the user's, so that a requeue finds the checkpoint. Whoever had a signal keeps it:

    - Lightning's own handler (under SLURM with ``auto_requeue``) saves and requeues by itself: it is called then and
      training goes on until SLURM ends it.
    - submitit's handler requeues and ends the process, or ignores the signal, and then training goes on.
    - Any other handler is called, and the run ends. Without one Ctrl-C becomes ``KeyboardInterrupt``, and the others
      end the program with status 128 + the signal's number (143 for SIGTERM). Nothing is requeued.
    - A signal that is ignored (as under ``nohup``) stays ignored.

    A second Ctrl-C ends at once, without saving; one within a second of the first is the same one, which a terminal
    gives to every process and torchrun passes on to its own besides.

    Args:
        how_to_resume: Told when a run was stopped. None tells to pass the checkpoint to ``trainer.fit``.
    """

    def __init__(self, how_to_resume: str | None = None) -> None:
        super().__init__()
        self.how_to_resume = how_to_resume
        self._noted = 0
        self._interrupted: float | None = None
        self._loud = True
        self._before: dict[int, Any] = {}
        self._owners: dict[int, Any] = {}
        self._group: Any = None

    # ---- when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go behind all other callbacks: what they do at the end of a step belongs into the checkpoint."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen from here on."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen from here on, and make ready to agree."""
        self._listen(trainer)
        if self._group is None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            # A group of its own on the CPU: nothing waits for a GPU, and nothing mixes with gradients.
            limit = getattr(trainer.strategy, "_timeout", None)
            self._group = dist.new_group(backend="gloo", **({} if limit is None else {"timeout": limit}))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the end of an optimizer step, unless a validation follows."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        if not loop._should_accumulate() and fetcher is not None and not loop._should_check_val_fx(fetcher):
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop behind a validation within the fit."""
        if (
            trainer.state.fn == "fit"
            and not trainer.sanity_checking
            and not trainer.fit_loop.epoch_loop._should_accumulate()
        ):
            self._stop_if_asked(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back; one that came too late to be saved for ends the program all the same."""
        noted = self._noted
        self._leave()
        if noted:
            _tell(trainer, f"{_name(noted)} came when training was over: the program ends here.")
            self._end(trainer, noted)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._leave()

    # ---- signals

    def _listen(self, trainer: pl.Trainer) -> None:
        if self._before or getattr(trainer, "fast_dev_run", False):
            return
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread alone
        self._noted, self._interrupted, self._loud = 0, None, trainer.is_global_zero
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is None:  # not set from Python
                continue
            owner: Any = handler
            if number == signal.SIGTERM and isinstance(handler, _HandlersCompose):
                # Lightning's own talks to the other processes from within the signal, when they may be at something
                # else, and makes the run end without saving. What it is for is done here; whoever was before it counts.
                owner = trainer._signal_connector._original_handlers.get(number) or signal.SIG_DFL
            if owner == signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN)  # until Lightning puts back what there was, which is the same
                continue
            self._before[number], self._owners[number] = handler, owner
            signal.signal(number, self._note)

    def note(self, number: int) -> None:
        """Take note of a signal that somebody else has got: in a thread of its own, a fit gets none.

        Args:
            number: Of the signal, as in ``signal.SIGTERM``.
        """
        self._noted = self._noted or number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted = now if self._interrupted is None else self._interrupted
            if now - self._interrupted > _ONE_INTERRUPT:
                before = self._before[number]
                self._leave()
                (before if callable(before) else signal.default_int_handler)(number, frame)
                return
        first, self._noted = not self._noted, self._noted or number
        if first and self._loud:  # not by print, whose buffer the signal may have interrupted
            more = "; once more ends at once, without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{_name(number)}: the run saves and ends after this step{more}\n".encode())

    def _leave(self) -> None:
        """Put the handlers back, as far as nobody else has set one since."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before, self._noted = {}, 0
        if self._group is not None:
            with contextlib.suppress(Exception):  # it may be gone with the whole process group
                dist.destroy_process_group(self._group)
            self._group = None

    # ---- stopping

    def _agreed(self) -> int:
        """The signal that any process has got, or 0."""
        if self._group is None:
            return self._noted
        number = torch.tensor([self._noted])
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        number = self._agreed()
        if not number or trainer.should_stop or _is_over(trainer):
            return  # a fit that is at its end goes through with it
        owner = self._owners.get(number, signal.SIG_DFL)
        if isinstance(owner, _HandlersCompose):
            self._noted, self._interrupted = 0, None
            owner(number, inspect.currentframe())  # type: ignore[arg-type]  # it looks at no frame
            return
        path = self._save(trainer)
        step = trainer.global_step
        if _is_bypass(owner):
            self._noted, self._interrupted = 0, None
            _tell(trainer, f"{_name(number)}: step {step} is saved in {path}.")
            owner(number, inspect.currentframe())
            return
        how = self.how_to_resume or f"trainer.fit(…, ckpt_path={path!r})"
        _tell(trainer, f"Stopped by {_name(number)} after step {step}, which is saved in {path}. To go on: {how}")
        self._leave()
        self._end(trainer, number)

    def _save(self, trainer: pl.Trainer) -> str:
        callback = trainer.checkpoint_callback
        folder = getattr(callback, "dirpath", None) or os.path.join(trainer.default_root_dir, "checkpoints")
        path = trainer.strategy.broadcast(os.path.join(folder, "stopped.ckpt"))
        trainer.save_checkpoint(path, weights_only=False)
        trainer.strategy.checkpoint_io.teardown()  # an asynchronous one has finished after this
        return path

    def _end(self, trainer: pl.Trainer, number: int) -> None:
        first = trainer.is_global_zero
        _wait_for_started(trainer)
        owner = self._owners.get(number, signal.SIG_DFL)
        if callable(owner) and (first or owner is not signal.default_int_handler):
            owner(number, inspect.currentframe())
        # Whoever started the other processes takes their status for a crash, unless it is 0.
        raise SIGTERMException(128 + number if first else 0)


def _is_over(trainer: pl.Trainer) -> bool:
    """Whether this was the last step."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return ends and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1


def _is_bypass(handler: Any) -> bool:
    """Whether it is submitit's handler of signals that it takes no notice of."""
    owner = type(getattr(handler, "__self__", None)).__module__
    return owner.partition(".")[0] == "submitit" and getattr(handler, "__name__", "") == "bypass"


def _wait_for_started(trainer: pl.Trainer) -> None:
    """Let the processes that this one has started end first: Lightning kills this one if they have to be killed."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        with contextlib.suppress(subprocess.TimeoutExpired, AttributeError):
            process.wait(_PATIENCE)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _tell(trainer: pl.Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(f"\n{message}", file=sys.stderr, flush=True)
