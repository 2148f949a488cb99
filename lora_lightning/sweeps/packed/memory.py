"""How many jobs fit into memory at once: counted on one step of one job, on the model itself.

What a step takes depends on the model's code (its attention, what its layers save for backward), so it is not computed
from a formula: one row, and then two, go forward and backward, and the tensors that are alive are counted one by one.
Rows do not see each other, so every further row takes what the second one took. Only the head's chunk of logits is
computed, since it grows up to a limit and not beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import inject_lora
from lora_lightning.injection.names import find_root
from lora_lightning.injection.targets import Target, output_embeddings, resolve
from lora_lightning.layers import kind_of
from lora_lightning.layers.base import adapter_dtype
from lora_lightning.layers.chunks import MOST_BYTES
from lora_lightning.sweeps.packed.counting import step_bytes
from lora_lightning.tasks.loss import IGNORED

GB = 2**30
LEFT_FREE = 0.1
"""This share of the memory at hand is left free: for what allocators lose, and for whoever else needs some."""
OF_A_JOB = 16 * 2**20
"""What a job takes besides its tensors: its Trainer, loggers, tokenised rows."""
HOLES = {"cpu": 1.3, "cuda": 1.1}
"""Memory of the process for each byte of its tensors; measured on the CPU with several shapes: 1.0 to 1.65, by run."""
ASSUMED_TOKENS = 512
"""Length of a row where the data does not know its longest one beforehand."""


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
    holes: float = 1.0
    """Memory taken for each byte counted."""

    def of(self, jobs: int) -> int:
        """Bytes for so many jobs at once; of those there are, the largest."""
        chunks = max(1, -(-jobs * self.logits // self.logits_at_once))
        head = jobs * self.logits // chunks  # chunks are about as large as each other
        step = self.constant + jobs * self.kept + max(jobs * self.passing, head)
        return round(self.holes * (self.of_adapters(jobs) + step)) + jobs * OF_A_JOB

    def of_adapters(self, jobs: int) -> int:
        """Bytes of the largest adapters of so many jobs, with their optimizers."""
        return sum(sorted(self.adapters, reverse=True)[:jobs])


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

    Raises:
        LoraConfigError: No job's adapter fits the model. Where one does, those that do not take nothing: their jobs say
            so themselves when it is their turn.
    """
    root = find_root(shell)[1]
    targets, fitting = _resolved(root, loras, shell)
    base = sum(parameter.numel() * parameter.element_size() for parameter in shell.parameters())
    device = next(shell.parameters()).device
    scored = int((row["labels"] != IGNORED).sum())
    # One label: the head is counted below, and its few rows are not to hide what the layers take.
    labels = torch.full_like(row["labels"], IGNORED)
    labels[..., -1] = row["input_ids"][..., -1]
    batch = {name: value.to(device) for name, value in {**row, "labels": labels}.items()}
    # The widest of them; ranks of single layers count in its stacks.
    inject_lora(shell, max(fitting, key=lambda lora: lora.r), seed=0)
    if precision == "bf16-true":
        shell.to(torch.bfloat16)  # as Lightning does, adapters included
    once, twice = (
        step_bytes(shell, {name: value.repeat(n, 1) for name, value in batch.items()}, precision) for n in (1, 2)
    )
    kept, passing = twice.kept - once.kept, max(0, twice.passing - once.passing)
    logits = scored * _vocabulary(root) * 4
    return Needs(
        base=base,
        adapters=_adapters(targets, moments, 2 if precision == "bf16-true" else None),
        kept=rows * kept,
        passing=rows * passing,
        logits=rows * logits,
        logits_at_once=MOST_BYTES.get(device.type, MOST_BYTES["cpu"]),
        constant=max(0, once.kept - kept),
        holes=HOLES.get(device.type, 1.0),
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
    jobs, whole, adapters = len(needs.adapters), needs.of(places), needs.of_adapters(places)
    waits = "all at once" if places == jobs else f"{jobs - places} of {jobs} wait for a place"
    return (
        f"Memory: the base {_gb(needs.base)}; {places} job{'s' * (places > 1)} about {_gb(whole)} more (adapters and "
        f"their optimizers {_gb(adapters)}, a step {_gb(whole - adapters)}) of {_gb(free)} free: {waits}."
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def longest_row(data: Any, max_length: int | None = None) -> dict[str, Tensor]:
    """The longest training row of a data module as a batch of one; a made-up one where it does not know its rows.

    Args:
        data: After its ``setup``.
        max_length: Rows are cut to so many tokens; None: nobody says.
    """
    rows: Any = getattr(getattr(data, "loaded", None), "train", None)
    if hasattr(rows, "lengths") and len(rows):
        lengths = rows.lengths()
        row = rows[max(range(len(lengths)), key=lengths.__getitem__)]
        tokens, labels = (torch.as_tensor(row[key], dtype=torch.long)[None] for key in ("input_ids", "labels"))
    else:
        tokens = labels = torch.ones(1, max_length or ASSUMED_TOKENS, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def _resolved(
    root: nn.Module, loras: Sequence[LoraConfig], shell: nn.Module
) -> tuple[list[Sequence[Target]], list[LoraConfig]]:
    """The layers of each job's adapter, none where it does not fit the model; and the adapters that do."""
    targets: list[Sequence[Target]] = []
    fitting: list[LoraConfig] = []
    wrong: LoraConfigError | None = None
    for lora in loras:
        try:
            targets.append(resolve(root, lora, outside=shell).targets)
            fitting.append(lora)
        except LoraConfigError as error:
            targets.append(())
            wrong = error
    if wrong is not None and not fitting:
        raise wrong
    return targets, fitting


def _adapters(targets: Sequence[Sequence[Target]], moments: int, itemsize: int | None) -> tuple[int, ...]:
    """Bytes of each job's adapter with gradients and moments.

    It lies in stacks, which are as wide as the highest rank, and so do the gradients of a step. Its own gradients
    (where steps are accumulated, those so far) and the moments are as wide as its own rank.
    """
    highest: dict[str, int] = {}
    for target in (target for job in targets for target in job):
        highest[target.name] = max(target.r, highest.get(target.name, 0))
    sides = {target.name: _side_bytes(target.layer, itemsize) for job in targets for target in job}
    stack = sum(rank * sides[name] for name, rank in highest.items())
    own = (sum(target.r * sides[target.name] for target in job) for job in targets)
    return tuple(2 * stack + (1 + moments) * each if each else 0 for each in own)


def _side_bytes(layer: Any, itemsize: int | None) -> int:
    """Bytes of a low-rank update of rank one; without an itemsize, in the dtype that adapters of a layer have."""
    kind = kind_of(layer, "lora")
    return 0 if kind is None else sum(kind.lora_sides(layer)) * (itemsize or adapter_dtype(layer.weight).itemsize)


def _vocabulary(root: nn.Module) -> int:
    head: Any = output_embeddings(root)
    return 0 if head is None else len(head.weight)
