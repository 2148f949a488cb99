"""How many jobs fit into memory at once: counted on one step of one job, on the model itself.

What a step takes depends on the model's code (its attention, what its layers save for backward), so it is not computed
from a formula: one row, and then two, go forward and backward, and the tensors that are alive are counted one by one.
Rows do not see each other, so every further row takes what the second one took. Only the head's chunk of logits is
computed, since it grows up to a limit and not beyond.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lightning.config import LoraConfig
from lora_lightning.injection import inject_lora
from lora_lightning.injection.names import find_root
from lora_lightning.injection.targets import Target, resolve
from lora_lightning.layers.base import adapter_dtype
from lora_lightning.layers.chunks import MOST_BYTES
from lora_lightning.layers import kind_of
from lora_lightning.tasks.loss import IGNORED, causal_lm_loss

GB = 2**30
LEFT_FREE = 0.1
"""This share of the memory at hand is left free: for what allocators lose, and for whoever else needs some."""
OF_A_JOB = 16 * 2**20
"""What a job takes besides its tensors: its Trainer, loggers, tokenised rows."""


class Needs(NamedTuple):
    """Bytes that training several jobs at once takes, besides what the process has already."""

    base: int
    """The base model; it is there already, and only told."""
    adapters: tuple[int, ...]
    """Of each job: its adapter, gradients, the optimizer's moments."""
    kept: int
    """One job's rows: what forward keeps for backward."""
    passing: int
    """One job's rows: what backward takes besides, for a moment."""
    logits: int
    """One job's rows: logits of all positions that are scored."""
    logits_at_once: int
    """The most logits that are made at once, of all jobs."""
    constant: int
    """What a step takes whatever the number of rows: weights in another dtype, say."""

    def of(self, jobs: int) -> int:
        """Bytes for so many jobs at once; of those there are, the largest."""
        adapters = sum(sorted(self.adapters, reverse=True)[:jobs]) + jobs * OF_A_JOB
        head = min(jobs * self.logits, self.logits_at_once)
        return adapters + self.constant + jobs * self.kept + max(jobs * self.passing, head)


def needs(
    shell: nn.Module,
    loras: Sequence[LoraConfig],
    row: Mapping[str, Tensor],
    *,
    rows: int,
    moments: int = 2,
    precision: str = "32-true",
) -> Needs:
    """Find out what training jobs together takes.

    Args:
        shell: The base model by modules of its own, on its device and in its dtype; it gets an adapter here.
        loras: The adapter of each job.
        row: The longest row there is, as a batch of one: ``input_ids``, ``attention_mask`` and ``labels``, (1, T).
        rows: So many rows has a step of one job.
        moments: Numbers that the optimizer keeps for each number of an adapter: 2 for Adam.
        precision: The Trainer's.
    """
    root = find_root(shell)[1]
    targets = [resolve(root, lora, outside=shell).targets for lora in loras]
    adapters = _adapters(targets, moments)
    base = sum(parameter.numel() * parameter.element_size() for parameter in shell.parameters())
    device = next(shell.parameters()).device
    scored = int((row["labels"] != IGNORED).sum())
    # One label: the head is counted below, and its few rows are not to hide what the layers take.
    labels = torch.full_like(row["labels"], IGNORED)
    labels[..., -1] = row["input_ids"][..., -1]
    batch = {name: value.to(device) for name, value in {**row, "labels": labels}.items()}
    inject_lora(shell, max(loras, key=lambda lora: lora.r), seed=0)
    once, twice = (_step(shell, {name: value.repeat(n, 1) for name, value in batch.items()}, precision) for n in (1, 2))
    kept, passing = twice.kept - once.kept, max(0, twice.passing - once.passing)
    logits = scored * _vocabulary(root) * 4
    return Needs(
        base=base,
        adapters=adapters,
        kept=rows * kept,
        passing=rows * passing,
        logits=rows * logits,
        logits_at_once=MOST_BYTES.get(device.type, MOST_BYTES["cpu"]),
        constant=max(0, once.kept - kept),
    )


def moments_of(optimizer: Mapping[str, Any] | None) -> int:
    """How many numbers an optimizer keeps for each one that it trains, by its settings; None is AdamW.

    >>> moments_of(None), moments_of({"_target_": "torch.optim.SGD", "momentum": 0.9})
    (2, 1)
    """
    if optimizer is None or not str(optimizer.get("_target_")).endswith(".SGD"):
        return 2
    return 1 if optimizer.get("momentum") else 0


def places(needs: Needs, free: int, wanted: int | None = None) -> int:
    """How many jobs are trained at once: as many as fit, at least one; or as many as are wanted.

    Args:
        needs: Of all jobs of the group.
        free: Bytes at hand.
        wanted: ``sweep.jobs_at_once``; None leaves it to the estimate.
    """
    jobs = len(needs.adapters)
    if wanted is not None:
        return max(1, min(wanted, jobs))
    return max([n for n in range(1, jobs + 1) if needs.of(n) <= free * (1 - LEFT_FREE)], default=1)


def told(needs: Needs, places: int, free: int) -> str:
    """The estimate in one line."""
    jobs, all_jobs = places, len(needs.adapters)
    whole = needs.of(jobs)
    waits = "all at once" if jobs == all_jobs else f"{all_jobs - jobs} of {all_jobs} wait for a place"
    return (
        f"Memory: base {_gb(needs.base)}, {jobs} job{'s' * (jobs > 1)} at once {_gb(whole)} more "
        f"(adapters with their optimizers {_gb(sum(sorted(needs.adapters, reverse=True)[:jobs]))}, "
        f"a step {_gb(whole - sum(sorted(needs.adapters, reverse=True)[:jobs]))}), {_gb(free)} free: {waits}."
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


# ---- what is counted


def _adapters(targets: Sequence[Sequence[Target]], moments: int) -> tuple[int, ...]:
    """Bytes of each job's adapter in stacks that are as wide as the highest rank, with gradients and moments.

    Gradients twice: those of the step before are dropped only when the next ones are there.
    """
    highest: dict[str, int] = {}
    for target in (target for job in targets for target in job):
        highest[target.name] = max(target.r, highest.get(target.name, 0))
    sides = {target.name: _side_bytes(target.layer) for job in targets for target in job}
    stack = sum(rank * sides[name] for name, rank in highest.items())
    return tuple(3 * stack + moments * sum(target.r * sides[target.name] for target in job) for job in targets)


def _side_bytes(layer: nn.Module) -> int:
    """Bytes of a low-rank update of rank one."""
    kind = kind_of(layer, "lora")
    return 0 if kind is None else sum(kind.lora_sides(layer)) * adapter_dtype(layer.weight).itemsize


def _vocabulary(root: nn.Module) -> int:
    head = root.get_output_embeddings()
    return 0 if head is None else len(head.weight)


class _Step(NamedTuple):
    kept: int
    passing: int


def _step(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> _Step:
    """Bytes that are alive at the end of forward, and how many more at most in backward."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    counter = _CudaBytes(device) if device.type == "cuda" else _LiveBytes()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), counter:
        with _autocast(device, precision):
            total = causal_lm_loss(model, batch).total
        kept = counter.now
        torch.autograd.grad(total, trained)
    return _Step(kept, max(0, counter.most - kept))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, each storage once, for as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        held = weakref.ref(storage, self._gone)
        if held not in self._sizes:
            self._sizes[held] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _gone(self, held: weakref.ref[Any]) -> None:
        self.now -= self._sizes.pop(held, 0)


class _CudaBytes:
    """The same, told by CUDA's own allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _CudaBytes:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before
