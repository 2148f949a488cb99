"""What the task types of adapters are to transformers and to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.errors import AdapterError, did_you_mean


class TaskType(NamedTuple):
    """What belongs to a task type.

    Attributes:
        auto_class: The class of transformers that the base model is loaded by.
        pipeline: What the Hub calls the task.
    """

    auto_class: str
    pipeline: str


_KNOWN = {
    "CAUSAL_LM": TaskType("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": TaskType("AutoModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": TaskType("AutoModelForSeq2SeqLM", "text2text-generation"),
    "TOKEN_CLS": TaskType("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": TaskType("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": TaskType("AutoModel", "feature-extraction"),
}
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")


def of_task_type(name: str) -> TaskType:
    """What belongs to a task type that an adapter names.

    Args:
        name: One of ``lora_lightning.config.TASK_TYPES``.

    Raises:
        AdapterError: It is none of those.
    """
    if name not in _KNOWN:
        raise AdapterError(f"There is no task_type {name!r}{did_you_mean(name, _KNOWN)}. There are {', '.join(_KNOWN)}")
    return _KNOWN[name]


def labels_in(adapter: Path) -> int | None:
    """How many classes the trained head in an adapter folder tells apart, where there is one."""
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        heads = [key for key in file.keys() if key.endswith(_HEADS)]  # noqa: SIM118  # not a dict
        return file.get_slice(heads[0]).get_shape()[0] if heads else None
