"""An adapter beside its base model, from the command line: ``python scripts/eval.py``, ``lora-lightning eval``.

Light on purpose: a mistake is told, and ``--help`` and ``--cfg job`` answer, before torch is imported.
"""

from __future__ import annotations

from omegaconf import DictConfig

from lora_lightning.cli.launch import launch


def main(command: str | None = None) -> None:
    """Evaluate with the settings on the command line; ``command`` is how this program was called, if not by a file."""
    launch("eval", _evaluate, command=command)


def _evaluate(cfg: DictConfig) -> float | None:
    from lora_lightning.cli.evaluation import evaluate

    return evaluate(cfg)


if __name__ == "__main__":
    main()
