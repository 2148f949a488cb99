"""Putting adapters into a model and taking them out again; a model is a tree of modules here, nothing more."""

from lora_lightning.injection.inject import check_config, freeze_base, freeze_rest, inject_lora, report_of
from lora_lightning.injection.materialise import meta_parameters
from lora_lightning.injection.report import LoraReport, LoraRow
from lora_lightning.injection.starts.data import initialise_from_data
from lora_lightning.injection.state import lora_parameters, lora_state_dict
from lora_lightning.injection.unload import lora_disabled, unload_lora

__all__ = [
    "LoraReport",
    "LoraRow",
    "check_config",
    "freeze_base",
    "freeze_rest",
    "initialise_from_data",
    "inject_lora",
    "lora_disabled",
    "lora_parameters",
    "lora_state_dict",
    "meta_parameters",
    "report_of",
    "unload_lora",
]
