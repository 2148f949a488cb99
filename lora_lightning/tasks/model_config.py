"""Which base model is trained and how it is loaded: one dataclass of plain values, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_lightning.errors import LoraConfigError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTISATIONS = ("nf4", "fp4", "int8")
_BULLET = "\n  - "


@dataclass
class ModelConfig:
    """The base model of a run.

    Args:
        name: A name on the Hugging Face Hub, a local folder, or one of the ``demo:`` models.
        revision: Branch, tag or commit on the Hub; None is its main branch.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the type the checkpoint was saved in where the
            machine computes it natively, float32 where it would be emulated.
        quantisation: Keep weights of linear layers in few bits (QLoRA): ``nf4`` or ``fp4`` (4 bits), ``int8``; needs
            bitsandbytes. None leaves them as they are stored. ``dtype`` is then what products are computed in.
        double_quantisation: Quantise the scales of 4-bit weights as well: 0.37 bits less for each weight.
        attn_implementation: Passed on to transformers (``sdpa``, ``eager``, ``flash_attention_2`` …); None lets
            transformers choose.
        gradient_checkpointing: Trade time for memory: recompute activations in the backward pass.
        compile: Compile the model's repeated blocks, in place, so that no name changes. The first batches take longer;
            how much is told. Worth it on a GPU, where small models wait for kernels to be launched.
        in_parts: Read the weights when the trainer's strategy is known, each process the part that it keeps, so that
            a model need not fit into one process's memory; from safetensors only.
        trust_remote_code: Allow code from the model's repository to run on this machine.
        chat_template: Another chat template: Jinja text, or the path of a file that holds it.

    Raises:
        LoraConfigError: With everything that is wrong, at once.

    >>> ModelConfig.of("demo:tiny-llama").dtype
    'auto'
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    quantisation: str | None = None
    double_quantisation: bool = True
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    in_parts: bool = False
    trust_remote_code: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if problems := self._problems():
            raise LoraConfigError(_listed(problems))

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | ModelConfig) -> ModelConfig:
        """Understand a name, a mapping (a dict, a Hydra group) or a config that is one already.

        Args:
            value: A model's name, or a mapping with at least ``name`` in it.

        Raises:
            LoraConfigError: With every unknown key, its nearest field, and every wrong value.
        """
        if isinstance(value, ModelConfig):
            return value
        if isinstance(value, str):
            return cls(name=value)
        if not isinstance(value, Mapping):
            raise LoraConfigError(_listed([f"expected a model's name or a mapping with 'name' in it, got {value!r}"]))
        known = [entry.name for entry in fields(cls)]
        problems = [f"unknown key {key!r}{did_you_mean(str(key), known)}" for key in value if key not in known]
        try:
            config = cls(**{"name": None, **{key: value[key] for key in value if key in known}})
        except LoraConfigError as error:
            problems += str(error).split(_BULLET)[1:]
        if problems:
            raise LoraConfigError(_listed(problems))
        return config

    def _problems(self) -> list[str]:
        problems = []
        if not isinstance(self.name, str) or not self.name.strip():
            problems.append(f"name must be a Hub name, a local folder or a demo: model, got {self.name!r}")
        if self.dtype not in DTYPES:
            problems.append(
                f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}{did_you_mean(str(self.dtype), DTYPES)}"
            )
        if self.quantisation is not None and self.quantisation not in QUANTISATIONS:
            problems.append(
                f"quantisation must be one of {', '.join(QUANTISATIONS)} or null, got {self.quantisation!r}"
                f"{did_you_mean(str(self.quantisation), QUANTISATIONS)}"
            )
        if self.quantisation is not None and self.in_parts is True:
            problems.append("in_parts reads plain weights only: quantisation must be null beside it, or in_parts false")
        for key in ("revision", "attn_implementation", "chat_template"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                problems.append(f"{key} must be text or null, got {value!r}")
        for key in ("double_quantisation", "gradient_checkpointing", "compile", "in_parts", "trust_remote_code"):
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key} must be true or false, got {getattr(self, key)!r}")
        return problems


def _listed(problems: list[str]) -> str:
    return _BULLET.join(["This model config cannot be used:", *problems])
