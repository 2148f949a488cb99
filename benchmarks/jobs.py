"""What runs inside a worker of the CPU benchmark: a contender on its tasks, a Trainer's loop, injections, checks."""

from __future__ import annotations

import ctypes
import gc
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.check import difference, reference_gradients
from benchmarks.contenders import ADAPT, LEARNING_RATE, Contender, Spec, adapters_in, same_adapters
from benchmarks.measure import peak_of, profile, saved_bytes, tensors_of, timed
from benchmarks.shapes import SHAPES, Batch, Chats, Layers, build_model, chat_batches, full_batch, tokens_in

COUNT = 8  # so many batches a contender goes round in


@dataclass(frozen=True)
class Task:
    """What a contender trains on.

    Attributes:
        shape: Name in `SHAPES`; unused for ``sides``.
        rows: Rows of a batch.
        tokens: Of each row.
        layers: So many layers of the shape; None is all.
        chats: Rows of unlike length, instead of ``tokens``.
        sides: ``(in, out)`` of one linear layer alone, instead of a model.
    """

    shape: str = "smollm2-135m"
    rows: int = 4
    tokens: int = 128
    layers: int | None = None
    chats: Chats | None = None
    sides: tuple[int, int] | None = None

    def model(self) -> torch.nn.Module:
        """Its base model, frozen."""
        if self.sides:
            torch.manual_seed(0)
            return Layers([self.sides]).requires_grad_(False)
        return build_model(SHAPES[self.shape].cut(self.layers))

    def batches(self, vocabulary: int, *, grouped: bool) -> list[Any]:
        """Its batches, the same for every contender that has them grouped or not."""
        if self.sides:
            generator = torch.Generator().manual_seed(0)
            return [[torch.randn(self.rows * self.tokens, self.sides[0], generator=generator)]]
        if self.chats:
            return chat_batches(vocabulary, self.rows, COUNT, self.chats, grouped=grouped)
        return [full_batch(vocabulary, self.rows, self.tokens, seed=seed) for seed in range(COUNT)]


def settle(threads: int) -> None:
    """Fix the threads, and keep other libraries' words out of the tables."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")


class Steps:
    """A contender on one or more tasks.

    Args:
        threads: Of torch.
        spec: The contender.
        tasks: What it trains on.
    """

    def __init__(self, threads: int, spec: Spec, *tasks: Task) -> None:
        settle(threads)
        self.contenders: list[Contender] = []
        self.batches: list[list[Any]] = []
        for task in tasks:
            base: Any = task.model()
            vocabulary = 0 if task.sides else base.config.vocab_size
            spec = replace(spec, loss="sum") if task.sides else spec
            self.contenders.append(Contender(spec, base))
            self.batches.append(task.batches(vocabulary, grouped=spec.grouped))

    def turn(self, number: int, task: int = 0) -> float:
        """Seconds of a step; for rows of unlike length, of a step's share for one token that is not padding."""
        batch = self.batches[task][number % len(self.batches[task])]
        torch.manual_seed(number)
        seconds = timed(lambda: self.contenders[task].step(batch))
        return seconds / tokens_in(batch) if isinstance(batch, dict) else seconds

    def saved(self) -> int:
        """Bytes that autograd keeps in a step."""
        one, batch = self.contenders[0], self.batches[0][0]
        return saved_bytes(lambda: one.step(batch), tensors_of(one.model))

    def peak(self, steps: int) -> dict[str, int]:
        """Memory of this process before and, at its most, during the first steps."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading has left is no part of training
        return peak_of(lambda: [self.turn(number) for number in range(steps)])

    def profile(self) -> dict[str, Any]:
        """Where a step's time goes."""
        return profile(lambda: self.contenders[0].step(self.batches[0][0]))

    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.contenders[0].trained)


class Trained:
    """A contender that Lightning's Trainer drives, with our callback; a turn is one pass of its loop.

    The Trainer asks its data set for a batch when a pass is over, and gets it when the next turn begins: what lies
    between is all that the loop does for a step. It runs in the worker's main thread, as a user's does: glibc serves
    large pieces to other threads in another way.
    """

    def __init__(self, threads: int, spec: Spec, task: Task) -> None:
        settle(threads)
        self._task, self._spec = task, spec

    def serve(self, pipe: Any) -> None:
        """Train, a step for every call of ``turn`` that comes through a worker's pipe."""
        import logging
        import tempfile

        import lightning.pytorch as pl
        from torch.utils.data import DataLoader

        from lora_lightning import LoraCallback, LoraConfig
        from lora_lightning.tasks.loss import causal_lm_loss

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        spec, model = self._spec, self._task.model()
        turns = _Turns(pipe, self._task.batches(model.config.vocab_size, grouped=True))

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def on_train_start(self) -> None:
                same_adapters(dict(adapters_in(self.model)))

            def training_step(self, batch: Batch) -> torch.Tensor:
                told = causal_lm_loss(self.model, batch)
                return told.total / told.terms

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), LEARNING_RATE, fused=True)

        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                devices=1,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[LoraCallback(LoraConfig(r=spec.r, lora_alpha=2 * spec.r, lora_dropout=spec.dropout))],
            )
            trainer.fit(Module(), DataLoader(turns, batch_size=None))


class _Turns(Dataset):
    """Batches that wait for their turn; asking for one tells how long the last took, a token of it."""

    def __init__(self, pipe: Any, batches: list[Batch]) -> None:
        self._pipe, self._batches = pipe, batches
        self._begin: float | None = None

    def __len__(self) -> int:
        return 10_000  # a length, so that Lightning does not ask for batches in advance

    def __getitem__(self, row: int) -> Batch:
        took = None if self._begin is None else (time.perf_counter() - self._begin) / self._tokens
        self._pipe.send((True, took))
        _, (number,) = self._pipe.recv()
        torch.manual_seed(number)
        batch = self._batches[number % len(self._batches)]
        self._tokens = tokens_in(batch)
        self._begin = time.perf_counter()
        return batch


class Injections:
    """Giving a model of 896 linear layers its adapters, again and again, each time to a new model."""

    def __init__(self, threads: int, spec: Spec, layers: int) -> None:
        settle(threads)
        self._spec, self._shape = spec, SHAPES["tiny"].cut(layers)

    def turn(self, number: int) -> float:
        """Seconds of one injection."""
        base = build_model(self._shape)
        gc.collect()
        return timed(lambda: ADAPT[self._spec.layer](base, self._spec))


class InjectionsWithoutMemory:
    """Giving Llama-8B's 224 linear layers their adapters where nothing has memory: all contenders in one process.

    With one thread: others that wait would count as time of the process.
    """

    def __init__(self, threads: int, layers: int | None) -> None:
        settle(1)
        self._shape = SHAPES["llama-8b"].cut(layers)

    def turn(self, number: int, spec: Spec) -> float:
        """Seconds of this process's own time for one injection, into a new model."""
        base = build_model(self._shape, device="meta")
        gc.collect()
        begin = time.process_time()
        ADAPT[spec.layer](base, spec)
        return time.process_time() - begin


class Checks:
    """Gradients against float64, of any contender on any task."""

    def __init__(self, threads: int) -> None:
        settle(threads)

    def error(self, spec: Spec, task: Task) -> float:
        """The largest relative distance of a gradient from float64's."""
        spec = replace(spec, loss="sum") if task.sides else spec
        base = task.model()
        one = Contender(spec, task.model())
        batch = task.batches(0 if task.sides else base.config.vocab_size, grouped=spec.grouped)[0]
        return difference(one.gradients(batch), reference_gradients(base, one.adapters(), batch))
