"""Measure an adapter beside its base model: python scripts/eval.py adapter=outputs/…/adapter."""

from lora_lightning.cli.eval import main

if __name__ == "__main__":
    main()
