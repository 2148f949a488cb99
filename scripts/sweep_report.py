"""Report on a sweep: python scripts/sweep_report.py outputs/<name>/sweep_<date and time>."""

from lora_lightning.cli.sweep_report import main

if __name__ == "__main__":
    main()
