"""How answers are shown while they are written: in columns on a terminal, as plain text elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_lightning.reports.texts import printable

Tell = Callable[[str], Callable[[str], None]]
"""Of a name, what takes the pieces of that one's answer."""


class Plain:
    """Lines for a file or another program."""

    def question(self, text: str) -> None:
        """Say what is answered."""
        print(f"> {printable(text)}\n", flush=True)

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Tell]:
        """Write each answer below its name, in the order in which they come."""
        begun: list[str] = []

        def write(name: str, piece: str) -> None:
            if name not in begun:
                print(f"[{name}]" if not begun else f"\n\n[{name}]")
                begun.append(name)
            print(printable(piece.expandtabs(4)), end="", flush=True)

        def tell(name: str) -> Callable[[str], None]:
            write(name, "")
            return lambda piece: write(name, piece)

        try:
            yield tell
        finally:
            print("\n", flush=True)


class Columns:
    """A column for each name, all of them growing; when all is said it stands there whole."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()

    def question(self, text: str) -> None:
        """Say what is answered."""
        self._console.print(Text(f"› {printable(text)}", style="bold"))

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Tell]:
        """Show answers while they come; only their ends, where they are higher than the terminal."""
        texts = dict.fromkeys(names, "")
        live = Live(console=self._console, transient=True, auto_refresh=False)

        def tell(name: str) -> Callable[[str], None]:
            def take(piece: str) -> None:
                texts[name] += printable(piece.expandtabs(4))
                live.update(self._table(texts, most=self._console.height - 4), refresh=True)

            return take

        try:
            with live:
                yield tell
        finally:
            self._console.print(self._table(texts))

    def _table(self, texts: dict[str, str], most: int | None = None) -> Table:
        table = Table(expand=True, padding=(0, 1), show_edge=False, header_style="bold")
        width = max(self._console.width // max(len(texts), 1) - 4, 8)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(self._end_of(text.strip(), width, most) for text in texts.values()))
        return table

    def _end_of(self, text: str, width: int, most: int | None) -> Text:
        whole = Text(text)
        if most is None:
            return whole
        lines = whole.wrap(self._console, width)
        return whole if len(lines) <= most else Text("…\n") + Text("\n").join(lines[1 - most :])
