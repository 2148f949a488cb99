"""What a training would adapt, weigh and take, before it runs. See lora_lightning/cli/plan.py."""

from lora_lightning.cli.plan import main

if __name__ == "__main__":
    main()
