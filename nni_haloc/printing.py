"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Collection[str] = ()) -> None:
    """Rows of strings and numbers, a float with four digits and nothing for None; the columns of ``text`` begin at the left."""
    table, console = Table(title=title), Console()
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right")
    for row in rows:
        table.add_row(*map(shown, row))
    if not console.is_terminal:  # a pipe or a file has no width to fit
        console.width = 400
    console.print(table)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
