"""Train an adapter: python scripts/train.py lora.r=64 lora.use_rslora=true."""

from lora_lightning.cli.train import main

if __name__ == "__main__":
    main()
