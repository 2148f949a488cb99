"""The Hydra configs of ``lora-lightning train`` and ``lora-lightning eval``; the ``lora`` group lies in ``presets``."""

CONFIGS = "pkg://lora_lightning.conf"
"""Where Hydra finds these configurations."""
