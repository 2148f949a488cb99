"""A model that has layers and shapes and no numbers: what can be known of it without its weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.plan.setting import Setting
from lora_lightning.reports.plan.shapes import config_of, is_shape
from lora_lightning.reports.plan.unbuilt import told_of_files
from lora_lightning.tasks.dtype import pick_dtype
from lora_lightning.tasks.hub_errors import explained
from lora_lightning.tasks.model import AUTO_CLASSES, source_of

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class Ghost:
    """A model made of fake tensors, which pass through its own code as real ones would, in no memory and no time.

    Attributes:
        model: In training mode.
        config: The model's own.
        dtype: Of its weights.
    """

    def __init__(self, setting: Setting, own_config: PretrainedConfig) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.config = own_config
        self.dtype = dtype_of(setting, own_config)
        settings: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": setting.model.trust_remote_code}
        if (attention := setting.model.attn_implementation) is not None:
            # Flash attention keeps what torch's own does, and need not be installed here.
            settings["attn_implementation"] = "sdpa" if "flash" in attention else attention
        with explained(setting.model), self.active():
            try:
                self.model: PreTrainedModel = AUTO_CLASSES[setting.task].from_config(own_config, **settings).train()
            except (LoraConfigError, OSError):
                raise
            except Exception as error:  # whatever code a model brings
                raise LoraConfigError(_unbuilt(setting, error)) from error
            if setting.model.gradient_checkpointing:
                self._checkpointing("enable", {"use_reentrant": False})

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """In here tensors that are made are fake ones."""
        with self._mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    @contextlib.contextmanager
    def keeping_all(self) -> Iterator[None]:
        """In here fake tensors pass and nothing is computed again, in a model that does otherwise."""
        self._checkpointing("disable")
        try:
            with self.active():
                yield
        finally:
            self._checkpointing("enable", {"use_reentrant": False})

    def _checkpointing(self, verb: str, *settings: Any) -> None:
        newer, older = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
        getattr(self.model, newer if hasattr(self.model, newer) else older)(*settings)

    def cast(self, precision: str) -> None:
        """As a Trainer casts for a ``-true`` precision."""
        if precision in ("bf16-true", "16-true"):
            self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
            with self.active():
                self.model.to(self.dtype)  # type: ignore[arg-type]


def own_config(setting: Setting) -> PretrainedConfig:
    """The model's own config: of the Hub, of a folder (only its ``config.json`` is read), of a shape.

    Raises:
        LoraConfigError: It cannot be had.
    """
    settings: dict[str, Any] = {"num_labels": setting.num_labels} if setting.task == "sequence_classification" else {}
    if is_shape(setting.model.name):
        config = config_of(setting.model.name)
        for name, value in settings.items():
            setattr(config, name, value)
    else:
        with explained(setting.model):
            config = AutoConfig.from_pretrained(**source_of(setting.model), **settings)
    if setting.task == "sequence_classification" and config.pad_token_id is None:
        config.pad_token_id = 0
    return config


def narrowed(config: PretrainedConfig, parts: int) -> PretrainedConfig | None:
    """The config of one of so many parts of each layer, as tensor parallel gives a process; None where that is unknown.

    Raises:
        LoraConfigError: Heads cannot be divided so.
    """
    if parts == 1:
        return config
    text = config.get_text_config()
    if any(not isinstance(getattr(text, name, None), int) for name in ("num_attention_heads", "intermediate_size")):
        return None
    if odd := [f"{n}={v}" for n in _DIVIDED[:2] if isinstance(v := getattr(text, n, None), int) and v % parts]:
        raise LoraConfigError(f"{', '.join(odd)} cannot be divided by {parts}, the size of the tensor-parallel mesh")
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in _DIVIDED:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, -(-value // parts))
    return narrow


def dtype_of(setting: Setting, config: PretrainedConfig) -> torch.dtype:
    """The dtype that the weights would be loaded in, on the device that is planned for."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if setting.device == "cuda" and not torch.cuda.is_available():  # another machine's, which has what it needs
        return (stored or torch.float32) if setting.model.dtype == "auto" else getattr(torch, setting.model.dtype)
    return pick_dtype(setting.model.dtype, stored, torch.device(setting.device))[0]


def _unbuilt(setting: Setting, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else ""
    return (
        f"The model {setting.model.name!r} cannot be built without its weights, and so not be planned for "
        f"({type(error).__name__}: {reason}): {told_of_files(setting)}."
    )
