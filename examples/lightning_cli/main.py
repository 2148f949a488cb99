"""A LightningCLI project: module, data and the LoRA callback come from one YAML.

- ``cd examples/lightning_cli``
- ``python main.py fit --config config.yaml``
- ``python main.py fit --config config.yaml --trainer.callbacks.init_args.config.r=32``
"""

from lightning.pytorch.cli import LightningCLI

from lora_lightning.data import TinyText
from lora_lightning.tasks import CausalLM


def main() -> None:
    """Do what the command line says; your own LightningModule and data module go in the places of these two."""
    LightningCLI(CausalLM, TinyText)


if __name__ == "__main__":
    main()
