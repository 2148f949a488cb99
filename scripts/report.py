"""The page of a run or a sweep, made again from its folder: python scripts/report.py outputs/…/ [--open]."""

from lora_lightning.cli.report import main

if __name__ == "__main__":
    main()
