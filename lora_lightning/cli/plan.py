"""A training planned before it runs: ``python scripts/plan.py``, ``lora-lightning plan``.

Any setting of train works. ``--compare lora=conservative,balanced`` plans for each of the values, side by side.

Light on purpose: a mistake is told, and ``--help`` and ``--cfg job`` answer, before torch is imported.
"""

from __future__ import annotations

import sys

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from lora_lightning.cli.launch import launch
from lora_lightning.cli.overrides import check_command
from lora_lightning.cli.told import CommandError, told

_COMPARE = "--compare"


def main(command: str | None = None) -> None:
    """Plan a training with the settings on the command line; ``command`` is how this program was called."""
    with told():
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise CommandError(f"plan takes the settings of one run; {_COMPARE} key=a,b plans several side by side")
        compared = _taken_out(sys.argv)
        if compared is not None:
            check_command([*sys.argv, compared], "plan", command=command)

    def job(cfg: DictConfig) -> None:
        from lora_lightning.cli import planning  # torch and transformers

        planning.show(cfg) if compared is None else planning.show_side_by_side(cfg, compared)

    launch("plan", job, command=command)


def _taken_out(argv: list[str]) -> str | None:
    """What is to be compared, ``key=a,b``, which is taken out of the arguments.

    Raises:
        CommandError: It is not of that form.

    >>> arguments = ["plan.py", "--compare", "lora.r=8,16", "model=tiny_llama"]
    >>> _taken_out(arguments), arguments
    ('lora.r=8,16', ['plan.py', 'model=tiny_llama'])
    """
    found = [place for place, word in enumerate(argv) if word == _COMPARE or word.startswith(f"{_COMPARE}=")]
    if not found:
        return None
    if len(found) > 1:
        raise CommandError(f"{_COMPARE} is given {len(found)} times: one setting is compared at a time")
    place = found[0]
    joined = argv[place] != _COMPARE
    compared = argv[place].partition("=")[2] if joined else "".join(argv[place + 1 : place + 2])
    if not _has_values(compared):
        raise CommandError(
            f"{_COMPARE} takes one setting with several values, as in lora=conservative,balanced or "
            f"'lora.target_modules=[q_proj],[q_proj,v_proj]', got {compared!r}"
        )
    del argv[place : place + (1 if joined else 2)]
    return compared


def _has_values(compared: str) -> bool:
    """Whether this is a setting with values that can be counted.

    >>> [_has_values(text) for text in ("lora.r=8,16", "lora.r=range(8,16,4)", "lora.r=8", "lora.x=[q,v]", "8,16")]
    [True, True, False, False, False]
    """
    try:
        override = OverridesParser.create().parse_overrides([compared])[0]
    except OverrideParseException:
        return False
    return override.is_sweep_override() and override.is_discrete_sweep()


if __name__ == "__main__":
    main()
