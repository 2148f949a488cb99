"""Files: adapters in PEFT's folder format, checkpoints, a base's weights; and merging into the base."""

from lora_lightning.adapters.base_weights import load_base
from lora_lightning.adapters.checkpoint import adapter_from_checkpoint
from lora_lightning.adapters.folder import load_adapter, read_config, read_record, save_adapter
from lora_lightning.adapters.gguf_file import GgufReport, write_gguf
from lora_lightning.adapters.hub import adapter_folder
from lora_lightning.adapters.merge import merge_lora
from lora_lightning.adapters.merge_report import MergeReport
from lora_lightning.adapters.push import push_adapter
from lora_lightning.adapters.resize import ResizeReport, resize_adapter
from lora_lightning.adapters.several import Adapters

__all__ = [
    "Adapters",
    "GgufReport",
    "MergeReport",
    "ResizeReport",
    "adapter_folder",
    "adapter_from_checkpoint",
    "load_adapter",
    "load_base",
    "merge_lora",
    "push_adapter",
    "read_config",
    "read_record",
    "resize_adapter",
    "save_adapter",
    "write_gguf",
]
