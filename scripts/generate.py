"""Talk to a model with an adapter and without it: python scripts/generate.py outputs/…/<run>."""

from lora_lightning.cli.generate import main

if __name__ == "__main__":
    main()
