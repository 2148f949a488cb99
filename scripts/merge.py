"""Write a whole model from an adapter and its base: python scripts/merge.py adapter folder [--base NAME]."""

from lora_lightning.cli.merge import main

if __name__ == "__main__":
    main()
