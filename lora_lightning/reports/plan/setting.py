"""What is to be planned: the settings of a training, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.tasks.model_config import ModelConfig

TaskKind = Literal["causal_lm", "sequence_classification"]
TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}
STRATEGIES = ("single", "ddp", "fsdp", "fsdp2", "tp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
DEVICES = ("cpu", "cuda")
ADAMW = 8.0
"""Bytes that AdamW keeps for each number that it trains: two moments in float32."""


@dataclass(frozen=True)
class Setting:
    """One training, as far as memory and time depend on it.

    Attributes:
        model: The base model.
        lora: The adapter.
        task: What is trained: ``causal_lm`` or ``sequence_classification``.
        num_labels: Classes of a classification.
        rows: Rows of a batch, on each device.
        tokens: Tokens of a row.
        scored: Share of the tokens that have a label, between 0 and 1.
        padded: Whether rows differ in length, so that attention gets a mask.
        accumulate: Batches in one optimizer step.
        precision: A Trainer's.
        strategy: One of `STRATEGIES`.
        devices: Processes in all, each with a device of its own.
        nodes: Machines that they are spread over.
        tensor_parallel: So many of them share the work of each layer.
        device: ``cpu`` or ``cuda``.
        optimizer_bytes: What the optimizer keeps for each number that it trains.
        frozen_a: Whether the optimizer trains ``B`` alone (`lora_fa`), so that layers keep less of their inputs.
        memory: Bytes of one device; None: those of this machine.
        notes: What of the training is not counted, or was assumed: told beside the plan.

    Raises:
        LoraConfigError: With everything that is wrong, at once.
    """

    model: ModelConfig
    lora: LoraConfig
    task: TaskKind = "causal_lm"
    num_labels: int = 2
    rows: int = 4
    tokens: int = 512
    scored: float = 1.0
    padded: bool = True
    accumulate: int = 1
    precision: str = "32-true"
    strategy: str = "single"
    devices: int = 1
    nodes: int = 1
    tensor_parallel: int = 1
    device: str = "cpu"
    optimizer_bytes: float = ADAMW
    frozen_a: bool = False
    memory: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        if problems := list(self._problems()):
            raise LoraConfigError("\n  - ".join(["This cannot be planned:", *problems]))

    @property
    def groups(self) -> int:
        """Devices that the rows of a step, and a sharded base, are spread over."""
        return self.devices // self.tensor_parallel

    @property
    def neighbours(self) -> int:
        """Processes that share one machine."""
        return -(-self.devices // self.nodes)

    def _problems(self) -> Any:
        choices = (
            ("task", self.task, tuple(TASKS)),
            ("strategy", self.strategy, STRATEGIES),
            ("precision", self.precision, PRECISIONS),
            ("device", self.device, DEVICES),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                yield f"{name} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(str(value), allowed)}"
        for name in ("rows", "tokens", "accumulate", "devices", "nodes", "tensor_parallel", "num_labels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name} must be a whole number of at least 1, got {value!r}"
                return
        if not (isinstance(self.scored, (int, float)) and 0 < self.scored <= 1):
            yield f"scored must be a share between 0 and 1, got {self.scored!r}"
        if self.devices % self.tensor_parallel:
            yield f"devices={self.devices} cannot be divided by tensor_parallel={self.tensor_parallel}"
        if self.strategy == "single" and self.devices > 1:
            yield f"strategy='single' is one device, and devices={self.devices}: choose ddp, fsdp, fsdp2, tp …"


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str | float | None) -> int | None:
    """A size as people write it; a number without a unit is of GB.

    Raises:
        LoraConfigError: It is none.

    >>> bytes_of("24GB"), bytes_of("1.5 GiB"), bytes_of(80)
    (24000000000, 1610612736, 80000000000)
    """
    if text is None:
        return None
    written = str(text).strip().upper().replace(" ", "")
    digits = written.rstrip("BIKMGT")
    try:
        size = float(digits) * _UNITS[written[len(digits) :] or "GB"]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise LoraConfigError(f"memory must be a size as in 24GB or 80GiB, got {text!r}")
    return int(size)
