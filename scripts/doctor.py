"""Look whether this machine can train: python scripts/doctor.py [--json]."""

from lora_lightning.cli.doctor import main

if __name__ == "__main__":
    main()
