"""Whether a job can be trained on a base that it shares with others: what its settings say of it, before anything runs.

A job keeps its own Trainer, optimizer, schedule and callbacks; only forward and backward are shared. So what stands in
the way is what reaches into those: layers other than plain low-rank ones, a base that changes, several processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lightning.config import TASK_HEADS
from lora_lightning.config_starts import DATA_DRIVEN, changes_base
from lora_lightning.sweeps.runs import Job

PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")
"""Those in which a loss is differentiated as it is; float16 would have to be scaled before, by each job for itself."""
_TASKS = ("lora_lightning.tasks.CausalLM", "lora_lightning.tasks.causal_lm.CausalLM")
_CLASSIFIERS = ("SequenceClassification",)
_CALLBACKS = ("lora_lightning.LoraCallback", "lora_lightning.callback.LoraCallback")
_TRAINERS = ("lightning.pytorch.Trainer", "lightning.Trainer", "lightning.pytorch.trainer.trainer.Trainer")
# Those of our optimizers that are handed parameters, and do not move them around validations.
_OF_PARAMETERS = ("adamw_8bit",)
# Layers that models of transformers do not have in their blocks: embeddings, and heads.
_NOT_IN_BLOCKS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "lm_head", "embed_out", "output_layer")
# Dropouts of parts that a language model does not have.
_OF_OTHER_HEADS = ("classif", "summary", "qa_")


@dataclass(frozen=True)
class PackableJob:
    """A job and all that it is set to.

    Attributes:
        job: The job.
        config: Its whole configuration as plain values, every interpolation resolved.
        base: The base model's own config (``config.json``), where it is at hand.
    """

    job: Job
    config: Mapping[str, Any]
    base: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def number(self) -> int:
        """Hydra's number of the job."""
        return self.job.number


def why_alone(one: PackableJob) -> str | None:
    """Everything that keeps a job from sharing a base, in words; None where nothing does."""
    config = one.config
    reasons = [
        *_of_task(config.get("task") or {}),
        *_of_adapter(config.get("callbacks") or {}),
        *_of_optimizer(config.get("optimizer") or {}),
        *_of_trainer(config.get("trainer") or {}, one.job),
        *_of_model(config.get("model") or {}, one.base),
    ]
    if (config.get("data") or {}).get("packing"):
        reasons.append("data.packing puts several examples into a row")
    return ", and ".join(reasons) or None


def _of_task(task: Mapping[str, Any]) -> Iterator[str]:
    target = str(task.get("_target_"))
    if target.rpartition(".")[2] in _CLASSIFIERS:
        yield "a classifier's head is new and trained in full"
    elif target not in _TASKS:
        yield f"its task is a class of its own ({target}), and only causal_lm is known well enough to be shared"


def _of_adapter(callbacks: Mapping[str, Any]) -> Iterator[str]:
    nodes = [node for node in callbacks.values() if node]
    if any(str(node.get("_target_")).endswith(".BatchSizeFinder") for node in nodes):
        yield "BatchSizeFinder changes its batch size"
    adapters = [node for node in nodes if node.get("_target_") in _CALLBACKS]
    if len(adapters) != 1:
        yield f"it has {len(adapters)} LoraCallbacks, not one" if adapters else "it trains without a LoraCallback"
        return
    if adapters[0].get("base_adapter"):
        yield "base_adapter changes its base"
    yield from _of_lora(adapters[0].get("config") or {})


def _of_lora(lora: Mapping[str, Any]) -> Iterator[str]:
    if lora.get("use_dora"):
        yield "lora.use_dora: lengths of weights are not low-rank"
    for name in ("target_parameters", "trainable_token_indices", "ensure_weight_tying", "layer_replication"):
        if lora.get(name):
            yield f"lora.{name}: it changes more than single layers"
    if lora.get("alora_invocation_tokens"):
        yield "lora.alora_invocation_tokens: each job's rows would be in force from other positions on"
    start = lora.get("init_lora_weights", True)
    if changes_base(start):
        yield f"lora.init_lora_weights={start} changes its base"
    elif start in DATA_DRIVEN:
        yield f"lora.init_lora_weights={start} looks at data before it trains"
    elif start == "mica":
        yield "lora.init_lora_weights=mica trains A alone"
    if lora.get("modules_to_save"):
        yield f"lora.modules_to_save trains {', '.join(lora['modules_to_save'])} in full"
    if lora.get("bias", "none") != "none":
        yield f"lora.bias={lora['bias']} trains biases of the base"
    if lora.get("task_type") in TASK_HEADS:
        yield f"lora.task_type={lora['task_type']} trains a head in full"
    if names := _outside_blocks(lora):
        yield f"lora.target_modules adapts {' and '.join(names)}, an embedding or the head"


def _of_optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    package, _, name = str(optimizer.get("_target_")).rpartition(".")
    if package.startswith("lora_lightning.optim") and name not in _OF_PARAMETERS:
        yield f"optimizer={name} works on the layers of a model of its own"


def _outside_blocks(lora: Mapping[str, Any]) -> list[str]:
    """Embeddings and heads in a list of targets; what a regular expression means is seen when the model is there."""
    targets = lora.get("target_modules")
    if isinstance(targets, str) or targets is None:
        return []
    return [name for name in map(str, targets) if name.rpartition(".")[2] in _NOT_IN_BLOCKS]


def _of_trainer(trainer: Mapping[str, Any], job: Job) -> Iterator[str]:
    if (target := trainer.get("_target_")) not in _TRAINERS:
        yield f"its trainer is a class of its own ({target})"
    if job.devices != 1:
        yield f"it trains on {job.devices} devices"
    elif trainer.get("num_nodes", 1) != 1:
        yield f"it trains on {trainer['num_nodes']} machines"
    elif (strategy := trainer.get("strategy", "auto")) not in ("auto", "single_device"):
        name = strategy.get("_target_", "").rpartition(".")[2] if isinstance(strategy, Mapping) else strategy
        yield f"trainer.strategy={name} starts processes of its own"
    if (accelerator := trainer.get("accelerator", "auto")) not in ("auto", "cpu", "gpu", "cuda"):
        yield f"trainer.accelerator={accelerator} is neither a CPU nor an NVIDIA GPU"
    if (precision := precision_of(trainer)) not in PRECISIONS:
        yield f"trainer.precision={precision} is none of {', '.join(PRECISIONS)}"
    if trainer.get("plugins"):
        yield "trainer.plugins change how it computes"
    if trainer.get("max_time"):
        yield "trainer.max_time would count the time of all jobs"
    if trainer.get("profiler"):
        yield "trainer.profiler would measure all jobs at once"


def precision_of(trainer: Mapping[str, Any]) -> str:
    """A Trainer's precision by its full name.

    >>> precision_of({"precision": 32}), precision_of({"precision": "bf16"}), precision_of({})
    ('32-true', 'bf16-mixed', '32-true')
    """
    short = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    given = str(trainer.get("precision"))
    return short.get(given, given)


def _of_model(model: Mapping[str, Any], base: Mapping[str, Any] | None) -> Iterator[str]:
    if model.get("gradient_checkpointing"):
        yield "model.gradient_checkpointing runs layers twice"
    if model.get("compile"):
        yield "model.compile makes one program of its layers"
    if quantisation := model.get("quantisation"):
        yield f"model.quantisation={quantisation} keeps its base in few bits"
    if model.get("in_parts"):
        yield "model.in_parts reads the base for itself"
    yield from why_base_alone(base or {})


def why_base_alone(base: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a base model from being shared, by its own config (``config.json``, or ``model.config.to_dict()``)."""
    if base.get("quantization_config"):
        yield "its base is quantised"
    drops = {key: value for key, value in _fields(base) if ("drop" in key or "jitter" in key) and _is_share(value)}
    if drops:
        told = ", ".join(f"{key} {value:g}" for key, value in sorted(drops.items()))
        yield f"its base has a dropout of its own ({told})"
    if dict(_fields(base)).get("output_router_logits"):
        yield "the loss of its base's router (output_router_logits) is taken over all rows at once"


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a model's config and of those inside it (``text_config``)."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        elif not any(part in key for part in _OF_OTHER_HEADS):
            yield key, value


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def base_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``config.json`` of a base model, where it lies on this machine; nothing is downloaded.

    Args:
        model: The settings of the model: ``name``, ``revision``.
    """
    name = str(model.get("name"))
    path = Path(name).expanduser() / "config.json"
    if not path.is_file() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=model.get("revision"))
        path = Path(cached) if isinstance(cached, str) else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
