"""The Hydra configs of ``lora-lightning train`` and ``lora-lightning eval``; the ``lora`` group lies in ``presets``."""
