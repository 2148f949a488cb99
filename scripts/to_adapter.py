"""Make an adapter folder from a checkpoint: python scripts/to_adapter.py run.ckpt [folder]."""

from lora_lightning.cli.to_adapter import main

if __name__ == "__main__":
    main()
