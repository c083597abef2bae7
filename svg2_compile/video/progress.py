"""Progress bars on the console, one a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

NAME_WIDTH = 40

Result = TypeVar("Result")


class Progress:
    """A context in which bars are shown."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn(f"{{task.description:<{NAME_WIDTH}}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=console)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def bar(self, name: str, total: int) -> Callable[[], None]:
        """Show a bar and return what moves it one on."""
        from rich.markup import escape

        short = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"
        task = self._bars.add_task(escape(short), total=total)
        return lambda: self._bars.advance(task)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False)

    def call(self, name: str, action: Callable[[], Result]) -> Result:
        """Show a bar while ``action`` runs."""
        advance = self.bar(name, 1)
        result = action()
        advance()
        return result
