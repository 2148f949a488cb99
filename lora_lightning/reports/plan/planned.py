"""A training planned before it runs: what is adapted, what it weighs, whether it fits and how long it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.facts import adapter_state
from lora_lightning.adapters.joined import joined
from lora_lightning.adapters.peft_names import peft_names
from lora_lightning.adapters.tensor_file import file_bytes
from lora_lightning.adapters.tied_files import tied_names, tied_values
from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import DATA_DRIVEN, changes_base
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import LoraReport
from lora_lightning.injection.initialise import prepare
from lora_lightning.injection.inject import inject_unfilled
from lora_lightning.injection.names import canonical_modules, join
from lora_lightning.injection.state import lora_layers, the_root, trained_in_full
from lora_lightning.layers import LoraLayer, is_linear, kind_of
from lora_lightning.optim.groups import pairs
from lora_lightning.reports.plan import memory as budget
from lora_lightning.reports.plan.ghost import Ghost, narrowed, own_config
from lora_lightning.reports.plan.memory import Memory
from lora_lightning.reports.plan.pace import calibrate
from lora_lightning.reports.plan.setting import TASKS, Setting
from lora_lightning.reports.plan.spread import SHARDS_BASE, dequantised, held, kept_before
from lora_lightning.reports.plan.step import StepCost, step_cost
from lora_lightning.strategies.chosen import balanced
from lora_lightning.tasks.head import root_of
from lora_lightning.tasks.model_config import ModelConfig

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Kind:
    """Layers of one name and shape."""

    name: str
    kind: str
    shape: tuple[int, ...]
    count: int
    r: int
    scaling: float
    parameters: int
    """Of the adapter where the layers are adapted (or trained in full), else of the layers."""


def _nothing(rows: int) -> Memory:
    raise LoraConfigError("this plan does not know its batch")


@dataclass(frozen=True)
class Plan:
    """What a training would be. Prints as a table, in notebooks too.

    Attributes:
        setting: What was planned.
        report: What is adapted, a `LoraReport`.
        adapted: The same by kind of layer.
        left_out: Layers that could be adapted and are not.
        file_bytes: Size of the adapter's file of weights.
        dtype: Of the frozen base, as ``float32``; what is quantised apart.
        memory: Bytes of one device, by what they are for.
        available: Bytes that a device has for training; None where nobody knows.
        largest_batch: The most rows of a batch that fit; None where that is not known.
        flops_per_token: Forward and backward; None where it is not known.
        seconds_per_1000_steps: On this machine; None where it was not measured.
        notes: What else is to be known.
        with_rows: The memory of the same training with so many rows in a batch.
    """

    setting: Setting
    report: LoraReport
    adapted: list[Kind]
    left_out: list[Kind]
    file_bytes: int
    dtype: str
    memory: Memory
    available: int | None = None
    largest_batch: int | None = None
    flops_per_token: float | None = None
    seconds_per_1000_steps: float | None = None
    notes: list[str] = field(default_factory=list)
    with_rows: Callable[[int], Memory] = field(default=_nothing, repr=False, compare=False)

    @property
    def fits(self) -> bool | None:
        """Whether it fits into a device's memory, with a tenth left free; None where that is not known."""
        if self.available is None or self.memory.activations is None:
            return None
        return self.memory.total <= budget.usable(self.available, self.setting)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, texts and lists, fit for JSON."""
        return {
            "setting": _plain(asdict(self.setting)),
            "trainable_parameters": self.report.trainable_parameters,
            "total_parameters": self.report.total_parameters,
            "trainable_share": self.report.trainable_share,
            "adapted": [_plain(asdict(kind)) for kind in self.adapted],
            "left_out": [_plain(asdict(kind)) for kind in self.left_out],
            "file_bytes": self.file_bytes,
            "dtype": self.dtype,
            "memory": self.memory.to_dict(),
            "available": self.available,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "flops_per_token": self.flops_per_token,
            "seconds_per_1000_steps": self.seconds_per_1000_steps,
            "notes": list(self.notes),
        }

    def __rich__(self) -> Any:
        from lora_lightning.reports.plan.table import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(width=110, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def plan(
    model: str | Mapping[str, Any] | ModelConfig,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    *,
    calibration: bool = True,
    **settings: Any,
) -> Plan:
    """Plan a training: no weight is read, and nothing of the model's size is kept in memory.

    Args:
        model: A Hub name, a local folder (its ``config.json`` is enough), a ``demo:`` model, a ``shape:`` such as
            ``shape:llama-8b``; or the fields of a `ModelConfig`.
        lora: The adapter; None is the balanced pattern.
        calibration: Spend a few seconds on how fast this machine is; without, no time is told.
        **settings: The other fields of `Setting`: ``rows``, ``tokens``, ``precision``, ``strategy``, ``memory`` …

    Raises:
        LoraConfigError: A setting is wrong, a name in the config matches nothing, or the model cannot be built without
            its weights.
    """
    config = ModelConfig.of(model)
    adapter = balanced() if lora is None else lora if isinstance(lora, LoraConfig) else LoraConfig.from_dict(lora)
    return plan_of(Setting(config, adapter, **settings), calibration=calibration)


def plan_of(setting: Setting, *, calibration: bool = True) -> Plan:
    """As `plan`, of settings that stand together already.

    Args:
        setting: What is planned.
        calibration: Measure for a second or two how fast this machine is; else no time is told.
    """
    config = own_config(setting)
    ghost, report = adapted(setting, config)
    root = root_of(ghost.model)
    there = budget.available(setting)
    notes = _notes(setting, ghost.model)
    kept = held(ghost.model, setting)
    moment = dequantised(ghost.model, setting, ghost.dtype)
    cost = _cost(setting, config, ghost, there, notes)
    with_rows = partial(budget.memory, kept, cost, dequantised=moment, device=setting.device)
    largest = seconds = flops = None
    if cost is not None:
        step = cost.of(setting.rows)
        flops = step.flops / (setting.rows * setting.tokens)
        if there is not None:
            largest = budget.largest_batch(with_rows, budget.usable(there, setting))
        if calibration and (setting.device == "cpu" or torch.cuda.is_available()):
            dtype = _MIXED.get(setting.precision, ghost.dtype)
            if sides := _sides(root):
                tokens, others = setting.rows * setting.tokens, setting.neighbours
                pace = calibrate(sides, tokens, dtype, setting.device, processes=others)
                seconds = 1000 * setting.accumulate * pace.seconds(step)
    return Plan(
        setting=setting,
        report=report,
        adapted=_by_kind(report),
        left_out=_left_out(root),
        file_bytes=_file_bytes(ghost),
        dtype=str(ghost.dtype).removeprefix("torch."),
        memory=with_rows(setting.rows),
        available=there,
        largest_batch=largest,
        flops_per_token=flops,
        seconds_per_1000_steps=seconds,
        notes=notes,
        with_rows=with_rows,
    )


def adapted(setting: Setting, config: Any) -> tuple[Ghost, LoraReport]:
    """A model without numbers, of a config of its own, with its adapter; and what was adapted."""
    ghost = Ghost(setting, config)
    lora = setting.lora if setting.lora.task_type else replace(setting.lora, task_type=TASKS[setting.task])
    with ghost.active():
        report = inject_unfilled(ghost.model, plain := _started(lora))
        for _, layer in lora_layers(ghost.model) if plain is not lora else ():
            prepare(layer, lora)
    if setting.frozen_a:
        for pair in pairs(ghost.model).values():
            pair.a.requires_grad_(pair.is_embedding)
    ghost.cast(setting.precision)
    return ghost, report


def _started(lora: LoraConfig) -> LoraConfig:
    """The same adapter begun plainly: numbers to begin with are what a plan lacks."""
    if lora.init_lora_weights in DATA_DRIVEN or changes_base(lora.init_lora_weights):
        return replace(
            lora, init_lora_weights=True, loftq_config={}, eva_config=None, corda_config=None, lora_ga_config=None
        )
    return lora


def _cost(setting: Setting, config: Any, ghost: Ghost, there: int | None, notes: list[str]) -> StepCost | None:
    """What a step takes; None, with a note, where the model's code wants to see numbers."""
    part = ghost
    if setting.tensor_parallel > 1:
        if (narrow := narrowed(config, setting.tensor_parallel)) is None:
            notes.append("activations are those of the whole layers: how they are divided is not known for this model")
        else:
            part, _ = adapted(setting, narrow)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(part.active())
            return step_cost(part, setting, there or 2**40, whole_logits=setting.tensor_parallel > 1)
    except LoraConfigError:
        raise
    except Exception as error:  # whatever the code of a model raises that asks its tensors for their numbers
        reason = str(error).splitlines()[0] if str(error) else ""
        notes.append(
            "activations, loss and time are not known: this model's code asks for numbers, of which a plan has none "
            f"({type(error).__name__}: {reason})"
        )
        return None


def _notes(setting: Setting, model: nn.Module) -> list[str]:
    notes = list(setting.notes)
    if setting.lora.init_lora_weights == "eva":
        notes.append("EVA deals ranks out as the data show: r is their mean")
    if changes_base(setting.lora.init_lora_weights):
        kept = f"{kept_before(model, setting) / 1e9:.3g} GB for weights as they were, which this start changes"
        notes.append(
            f"each process keeps {kept}: in main memory" if setting.device == "cuda" else f"base weights: {kept}"
        )
    spread = setting.strategy in SHARDS_BASE and setting.neighbours > 1
    if spread and not setting.model.in_parts:
        whole = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        notes.append(
            f"before it is spread, each of {setting.neighbours} processes of a machine reads the whole base into main "
            f"memory: {setting.neighbours * whole / 1e9:.3g} GB; trainer=fsdp2 and tp do not with model.in_parts=true"
        )
    return notes


def _by_kind(report: LoraReport) -> list[Kind]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in report.rows:
        key = (row.name.rpartition(".")[2] or "(model)", row.kind, row.shape, row.r, row.scaling)
        groups.setdefault(key, []).append(row.parameters)
    return [
        Kind(name, kind, shape, len(sizes), r, scaling, sum(sizes))
        for (name, kind, shape, r, scaling), sizes in groups.items()
    ]


def _left_out(root: nn.Module) -> list[Kind]:
    """Layers of a kind that can be adapted, without an adapter and not trained in full."""
    full = {id(part) for _, module, _ in trained_in_full(root) for part in module.modules()}
    found: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, module in canonical_modules(root):
        if isinstance(module, LoraLayer) or id(module) in full:
            continue
        if (kind := kind_of(module, "lora")) is not None and isinstance(module._parameters.get("weight"), nn.Parameter):
            key = (name.rpartition(".")[2], kind.lora_kind, tuple(kind.lora_sides(module)))
            found[key] = found.get(key, 0) + 1
    return [
        Kind(name, kind, shape, count, 0, 0.0, count * math.prod(shape)) for (name, kind, shape), count in found.items()
    ]


def _sides(root: nn.Module) -> list[tuple[int, int]]:
    """``(in, out)`` of all linear layers but the output layer, which has rows of its own number."""
    head = getattr(root, "get_output_embeddings", lambda: None)()
    return [kind_of(m).lora_sides(m) for m in root.modules() if is_linear(m) and m is not head]  # type: ignore[union-attr]


def _file_bytes(ghost: Ghost) -> int:
    """Of the adapter's file of weights, as `write_folder` would make it."""
    prefix, root = the_root(ghost.model)
    with ghost.active():
        state = joined(adapter_state(ghost.model))
        tied = {key: [join(prefix, name), flipped] for key, (name, flipped) in tied_names(root).items()}
        named = {key: state[join(prefix, name)] for name, key in peft_names(root).items()}
        return file_bytes(named | tied_values(tied, state))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
