"""What a LoRA adapter is to be: one dataclass with PEFT's names, meanings and defaults, checked as a whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lora_lightning.config_checks import (
    check_choice,
    check_names,
    check_number,
    check_numbers,
    check_patterns,
    check_rank,
    check_spans,
    check_switch,
    check_tokens,
    listed,
    plain,
    unknown_key,
)
from lora_lightning.config_starts import DEFAULTS, PISSA_NITER, check_settings, check_start, idle_settings
from lora_lightning.errors import LoraConfigError

ALL_LINEAR = "all-linear"
BIAS_KINDS = ("none", "all", "lora_only")
INITIALISATIONS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga", "mica")
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# The heads that a task type trains in full although nobody named them; those a model lacks are passed over.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class LoraConfig:
    r"""The decision that LoRA is: which layers, what rank, what scale, how trained.

    An adapted layer computes :math:`y = W x + s\,B A\,x` with ``A`` of shape ``(r, in_features)``, ``B`` of shape
    ``(out_features, r)`` and the scale ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).
    Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
    Field names, meanings and defaults are PEFT's; only ``target_modules`` has a default of its own.

    Args:
        r: Rank of the update, at least 1.
        lora_alpha: Numerator of the scale.
        lora_dropout: Probability, in [0, 1), of dropping an input of ``A`` in training; not used on embeddings
            and in ``nn.MultiheadAttention``.
        target_modules: ``"all-linear"`` (every linear layer but the output head), a regular expression that must match
            a whole module name, or a list of names, each matching that module or any whose name ends in ``.name``.
            Convolutions and ``nn.MultiheadAttention`` are adapted where they are named.
        exclude_modules: Modules to leave out, written like ``target_modules`` (regular expression or list).
        modules_to_save: Names of modules that are trained in full and saved with the adapter.
        bias: Which biases train: ``"none"``, ``"all"`` of the model, or those of adapted layers (``"lora_only"``).
        use_rslora: Scale by ``lora_alpha / sqrt(r)``, which stays stable at large ranks.
        use_dora: Learn the length of each output's weights apart from their direction: :math:`y = m/\|W + s\,B A\|
            (W + s\,B A)\,x` with one more parameter ``m`` an output (DoRA). A step takes longer; merged it costs
            nothing. Dropout is on the way to ``A`` alone.
        task_type: ``CAUSAL_LM``, ``SEQ_CLS``, …; ``SEQ_CLS``, ``TOKEN_CLS`` and ``QUESTION_ANS`` train their head too.
        fan_in_fan_out: True where weights are stored ``(in, out)``; taken from the layer where its kind says so.
        layers_to_transform: Only these layer numbers; needs ``target_modules`` as a list.
        layers_pattern: Name of the list of layers that the numbers count in, where it is not found by itself.
        rank_pattern: Other ranks for some layers: name or regular expression to rank; the first that matches counts.
        alpha_pattern: Other alphas for some layers, written like ``rank_pattern``.
        init_lora_weights: True (``A`` Kaiming-uniform, ``B`` zero), False (both random), ``"gaussian"``,
            ``"orthogonal"``, ``"pissa"`` (``"pissa_niter_16"`` by a faster decomposition), ``"olora"``, ``"loftq"``,
            ``"mica"``, or from what the data shows: ``"eva"``, ``"corda"``, ``"lora_ga"``. Of these ``"pissa"``,
            ``"olora"``, ``"loftq"``, ``"corda"`` and ``"lora_ga"`` change the base's weights, which
            :func:`unload_lora` puts back: they take their size once more in the machine's memory.
        lora_bias: Give ``B`` a bias that trains, in linear layers and convolutions. It can be merged where the base has
            a bias.
        target_parameters: Names of parameters, 2-D or 3-D, that are adapted where no layer of their own holds them: the
            experts of a mixture. Written as a list of ``target_modules``.
        trainable_token_indices: Rows of the input embedding that train: their numbers, or a mapping from the name of an
            embedding to such a list. A tied head follows.
        ensure_weight_tying: Where an embedding is adapted or trained in full, give a head that is tied to it the same.
        layer_replication: Build another stack of decoder layers from the model's own before injection: spans of layer
            numbers, as in ``[[0, 4], [2, 5]]``; copies share the base weights and have adapters of their own.
        alora_invocation_tokens: Tokens from whose last appearance on the adapter is in force (activated LoRA, arXiv
            2504.12397); before it, and in texts without them, outputs are the base's. For decoders called with
            ``input_ids``; it cannot be merged.
        loftq_config: Settings of ``"loftq"``.
        eva_config: Settings of ``"eva"``.
        corda_config: Settings of ``"corda"``.
        lora_ga_config: Settings of ``"lora_ga"``.

    Raises:
        LoraConfigError: With everything that is wrong, at once.

    >>> LoraConfig(r=16, lora_alpha=32).scaling()
    2.0
    >>> LoraConfig(r=64, lora_alpha=128, use_rslora=True).scaling()
    16.0
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    task_type: str | None = None
    fan_in_fan_out: bool = False
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layer_replication: list[list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Bring containers of other libraries (tuples, OmegaConf) to plain ones and check every field."""
        for entry in fields(self):
            setattr(self, entry.name, plain(getattr(self, entry.name)))
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self.loftq_config = self.loftq_config or {}
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        if isinstance(self.task_type, str):
            self.task_type = self.task_type.upper()
        if problems := self._problems():
            raise LoraConfigError(listed("This LoRA config cannot be used", problems))
        if idle := idle_settings(self):
            warnings.warn(f"{idle} has no effect with init_lora_weights={self.init_lora_weights!r}", stacklevel=3)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Build a config from a mapping (a dict, a Hydra group), refusing keys that are not fields.

        Args:
            values: Fields and their values; what is left out has its default.

        Returns:
            The config.

        Raises:
            LoraConfigError: With every unknown key, its nearest field, and every wrong value.
        """
        known = [entry.name for entry in fields(cls)]
        problems = [unknown_key(str(key), known) for key in values if key not in known]
        try:
            config = cls(**{key: values[key] for key in values if key in known})
        except LoraConfigError as error:
            if not problems:
                raise
            problems += str(error).split("\n  - ")[1:] or [str(error)]
        if problems:
            raise LoraConfigError(listed("This LoRA config cannot be used", problems))
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, fit for JSON and for a checkpoint."""
        return asdict(self)

    def scaling(self, r: int | None = None, lora_alpha: float | None = None) -> float:
        """The scale ``s`` of the update.

        Args:
            r: A rank; None is this config's.
            lora_alpha: An alpha; None is this config's.
        """
        r = self.r if r is None else r
        lora_alpha = self.lora_alpha if lora_alpha is None else lora_alpha
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    @property
    def variant(self) -> str:
        """The name under which ``lora_lightning.layers.KINDS`` has this config's layers."""
        if self.alora_invocation_tokens:
            return "alora_bias" if self.lora_bias else "alora"
        return "dora" if self.use_dora else "lora_bias" if self.lora_bias else "lora"

    @property
    def _adapts_else(self) -> bool:
        """Whether something is adapted that ``target_modules`` does not name."""
        return bool(self.target_parameters or self.trainable_token_indices)

    def difference(self, other: LoraConfig) -> list[str]:
        """The fields in which two configs differ, as ``'r: 8 here, 16 there'``.

        Args:
            other: The config that is there.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{key}: {mine[key]!r} here, {theirs[key]!r} there" for key in mine if mine[key] != theirs[key]]

    def _problems(self) -> list[str]:
        problems = [
            *check_rank("r", self.r),
            *check_number("lora_alpha", self.lora_alpha),
            *check_names("target_modules", self.target_modules, pattern_allowed=True, may_be_empty=self._adapts_else),
            *check_names("modules_to_save", self.modules_to_save, pattern_allowed=False),
            *check_names("target_parameters", self.target_parameters, pattern_allowed=False),
            *check_tokens("trainable_token_indices", self.trainable_token_indices),
            *check_spans("layer_replication", self.layer_replication),
            *check_numbers("alora_invocation_tokens", self.alora_invocation_tokens),
            *check_patterns(self.rank_pattern, self.alpha_pattern),
        ]
        if self.layers_pattern is not None:
            problems += check_names("layers_pattern", self.layers_pattern, pattern_allowed=True, may_be_empty=True)
        if self.exclude_modules is not None:
            problems += check_names("exclude_modules", self.exclude_modules, pattern_allowed=True, may_be_empty=True)
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            problems.append(f"lora_dropout must be a probability in [0, 1), got {dropout!r}")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"):
            problems += check_switch(name, getattr(self, name))
        for start in DEFAULTS:
            problems += check_settings(start, getattr(self, f"{start}_config"))
        problems += check_choice("bias", self.bias, BIAS_KINDS)
        if self.task_type is not None:
            problems += check_choice("task_type", self.task_type, TASK_TYPES)
        if not isinstance(self.init_lora_weights, bool) and not PISSA_NITER.fullmatch(str(self.init_lora_weights)):
            problems += check_choice("init_lora_weights", self.init_lora_weights, INITIALISATIONS, also="true, false")
        if self.init_lora_weights == "orthogonal":
            ranks = [self.r, *self.rank_pattern.values()]
            odd = [rank for rank in ranks if isinstance(rank, int) and rank % 2]
            if odd:
                problems.append(f"init_lora_weights='orthogonal' needs even ranks, got r={odd[0]}")
        problems += check_start(self)
        if self.alora_invocation_tokens and (self.use_dora or self.target_parameters):
            other = "use_dora" if self.use_dora else "target_parameters"
            problems.append(f"alora_invocation_tokens does not go with {other} (nor in PEFT)")
        if self.lora_bias and self.use_dora:
            problems.append("lora_bias does not go with use_dora, which has no place for a bias of B (nor in PEFT)")
        return problems + self._layer_problems()

    def _layer_problems(self) -> list[str]:
        chosen = self.layers_to_transform
        if chosen is None:
            return ["layers_pattern needs layers_to_transform beside it"] if self.layers_pattern else []
        problems = []
        numbers = [chosen] if isinstance(chosen, int) else chosen
        if not isinstance(numbers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            problems.append(f"layers_to_transform must be a layer number or a list of them, got {chosen!r}")
        if isinstance(self.target_modules, str):
            problems.append(
                "layers_to_transform needs target_modules as a list of names "
                f"(a regular expression can choose layers by itself), got {self.target_modules!r}"
            )
        return problems
