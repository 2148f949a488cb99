"""Have a training's model and rows on this machine: python scripts/prepare.py model=hub model.name=<name>."""

from lora_lightning.cli.prepare import main

if __name__ == "__main__":
    main()
