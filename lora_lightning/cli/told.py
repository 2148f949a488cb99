"""How an error that a person can put right is told: the message on one screen, without a traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from lora_lightning.cli.quiet import quieten_imports
from lora_lightning.errors import AdapterError, LoraConfigError


class CommandError(LoraConfigError):
    """What was typed cannot be carried out.

    Args:
        message: Everything that is wrong with it.
        command: The whole command as it should have been, where that is known.
    """

    def __init__(self, message: str, command: str | None = None) -> None:
        super().__init__(message if command is None else f"{message}\n\nThe corrected command:\n{command}")
        self.message = message
        self.command = command


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Print this package's own errors and leave with status 1; ``HYDRA_FULL_ERROR=1`` lets them through instead.

    What comes of imports in it says nothing to the person who is told, and is not shown.
    """
    quieten_imports()
    try:
        yield
    except (LoraConfigError, AdapterError) as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        show_error(error)
        raise SystemExit(1) from None


def show_error(error: Exception) -> None:
    """Print a message to stderr, its lines unbroken, so that paths and the corrected command can be copied."""
    console = Console(stderr=True)
    message = error.message if isinstance(error, CommandError) else str(error)
    console.rule("Adapter" if isinstance(error, AdapterError) else "Configuration", align="left", style="red")
    console.print(Text(message), soft_wrap=True)
    if isinstance(error, CommandError) and error.command is not None:
        console.print("\nThe corrected command:", style="bold")
        console.print(Text(error.command), soft_wrap=True)
    console.rule(style="red")
