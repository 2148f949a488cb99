"""Training from the command line: ``python scripts/train.py``, ``lora-lightning train``, ``lora-train``.

Light on purpose: a mistake is told, and ``--help`` and ``--cfg job`` answer, before torch is imported.
"""

from __future__ import annotations

from omegaconf import DictConfig

from lora_lightning.cli.launch import launch


def main(command: str | None = None) -> None:
    """Train with the settings on the command line; ``command`` is how this program was called, if not by a file."""
    launch("train", _train, command=command)


def _train(cfg: DictConfig) -> float | None:
    from lora_lightning.cli.training import train

    return train(cfg)


if __name__ == "__main__":
    main()
