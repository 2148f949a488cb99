"""The ``lora`` config group, which every Hydra app on the machine finds: ``+lora=high_capacity``."""
