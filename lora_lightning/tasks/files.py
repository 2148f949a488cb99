"""The files of a base model, had without loading them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks.demo import is_demo, prepare_demo
from lora_lightning.tasks.hub_errors import check_local_folder, explained
from lora_lightning.tasks.model_config import ModelConfig

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.vocab"]
# Weights a second time: in other formats, or as their makers use them.
_OTHERS = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*/*.safetensors", "*/*.bin"]


def fetch_model(config: ModelConfig) -> Path:
    """Have a model's files on this machine: converted, downloaded, or where they are already.

    Safe to call from several processes at once. Of a Hub model come the files that transformers reads: its weights as
    safetensors, or where there are none as ``.bin``.

    Args:
        config: Which model.

    Returns:
        The folder that they lie in.

    Raises:
        LoraConfigError: They cannot be had, or there are no weights among them.
    """
    if is_demo(config.name):
        return prepare_demo(config.name)
    check_local_folder(config)
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    with explained(config):
        for weights in ("*.safetensors", "*.bin"):
            wanted = [*_SMALL, weights]
            place = snapshot_download(
                config.name, revision=config.revision, allow_patterns=wanted, ignore_patterns=_OTHERS
            )
            if any(Path(place).glob(weights)):
                return Path(place)
    raise LoraConfigError(
        f"The model {config.name!r} has no weights that can be read: there are neither .safetensors nor .bin files in "
        f"{place}. A model of GGUF files has another repository with its original weights."
    )
