"""Cut an adapter to a lower rank: python scripts/resize.py adapter folder r=8."""

from lora_lightning.cli.resize import main

if __name__ == "__main__":
    main()
