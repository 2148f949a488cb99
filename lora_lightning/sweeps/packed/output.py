"""What is printed by several jobs of one process, each to its own file.

Light on purpose: the streams have to be in place before Lightning is imported, whose log messages go to the stream that
it finds then.
"""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO


class Routed(io.TextIOBase):
    """A stream in place of stdout or stderr that passes everything on to the screen of whoever has the baton.

    Args:
        own: The process's own stream, for what nobody's job is.
    """

    def __init__(self, own: TextIO) -> None:
        self.own = own

    @property
    def _target(self) -> Any:
        return self.own if OUTPUT.screen is None else OUTPUT.screen

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the screen."""
        return self._target.encoding or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How the screen deals with what it cannot encode."""
        return self._target.errors

    def write(self, text: str) -> int:
        """Write to the screen."""
        return self._target.write(text)

    def flush(self) -> None:
        """Flush the screen."""
        self._target.flush()

    def isatty(self) -> bool:
        """Never: nobody looks at several jobs on one screen."""
        return False

    def fileno(self) -> int:
        """The process's own, for programs that it starts."""
        return self.own.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True


class Output:
    """Where the job that has the baton prints to; None: to the process's own streams."""

    def __init__(self) -> None:
        self.screen: Any = None

    def get(self) -> Any:
        """The screen now."""
        return self.screen

    def set(self, screen: Any) -> None:
        """Print to another screen from now on."""
        self.screen = screen


OUTPUT = Output()


def route() -> None:
    """Put the streams in the place of this process's own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Routed):
            setattr(sys, name, Routed(stream))
